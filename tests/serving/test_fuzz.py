"""The server against its own description: whatever schemathesis makes of it, no answer is a 5xx."""

import warnings
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers import running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports
    import schemathesis
    from schemathesis.checks import not_a_server_error

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.filterwarnings("default")]


def test_no_input_is_a_defect() -> None:
    """50 cases for every operation, some valid by the description and some not."""
    with running(num_slots=8, max_queue=64) as (url, service):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        statuses: dict[str, set[int]] = {}
        for found in schema.get_all_operations():
            operation: Any = found.ok()  # type: ignore[union-attr]
            cases = st.one_of([operation.as_strategy(mode) for mode in schemathesis.GenerationMode])

            @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=cases)
            def answers(case: Any) -> None:
                response = case.call_and_validate(checks=[not_a_server_error], timeout=120)
                statuses.setdefault(case.operation.label, set()).add(response.status_code)

            answers()
        assert {"POST /v1/completions", "POST /infill", "GET /health"} <= statuses.keys()
        assert {200, 400} <= statuses["POST /infill"]
        assert service.engine.failure is None
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
