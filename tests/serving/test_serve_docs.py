"""docs/serve.md: every curl line of it is run against a server, and every route is in it."""

import re
import shutil
import subprocess

import pytest

from smelter.serving import about_routes, app, llama_routes, openai_routes
from tests import tiny
from tests.servers import ROOT, running

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
CURLS = re.findall(r"^    (curl .*)$", PAGE, re.MULTILINE)


@pytest.mark.slow
def test_every_curl_line_works() -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    assert len(CURLS) >= 10
    with running(model=tiny.model(max_seq_len=512)) as (url, _):
        for line in CURLS:
            command = line.replace("http://127.0.0.1:8080", url).replace("curl -s", "curl --fail-with-body -s")
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}"
            assert done.stdout


def test_every_route_is_in_it() -> None:
    for module in (app, about_routes, llama_routes, openai_routes):
        source = (ROOT / str(module.__file__)).read_text(encoding="utf-8")
        for path in re.findall(r'@(?:router|app)\.\w+\("(/[^"{]*)', source):
            assert re.search(rf"(?<!/v1){re.escape(path.rstrip('/'))}(?!\w)", PAGE), path
