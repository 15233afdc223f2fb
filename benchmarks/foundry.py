"""How fast does Foundry ask, and what does it cost, against other ways to ask?

A stub teacher in a process of its own answers in 200 ms. The whole command `foundry generate` is timed, from the start
of Python to the written output, with the journal on; CPU and peak memory are those of its process. Ideal: 320 records
a second with 64 in flight, 1,280 with 256. Beside it in the same run: bare aiohttp (nothing is kept: the ceiling of
this stub and client), and distilabel and curator where a Python that has them is given with --peers-python.

Through a real OpenCode server (installed by scripts/start_server.sh): requests a second with 32 in flight (ideal 160),
what one request at a time takes longer than the teacher, sessions left.

    python benchmarks/foundry.py [--quick] [--json] [--peers-python PYTHON]

What is not installed is not measured, and its figure is null.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
LATENCY = 0.2
Figures = dict[str, float | None]


@contextmanager
def stub_teacher() -> Iterator[str]:
    """A teacher in a process of its own; yields its base_url."""
    command = [sys.executable, "-m", "tests.foundry.stub_teacher", "--latency", str(LATENCY)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


def prompts(number: int) -> list[str]:
    """Questions of a usual length."""
    return [f"Write function number {i}. Explain in a comment what it does and give it types." for i in range(number)]


def timed(command: list[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak MiB) of a process. Raises RuntimeError where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    # The peak is read by wait4: it is of the one process, not of all children together.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {said}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def ours(url: str, folder: Path, number: int, in_flight: int) -> tuple[float, float, float]:
    """`foundry generate` from nothing: (records a second, ms of CPU a record, peak MiB)."""
    seeds = folder / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(number)))
    settings = folder / f"{in_flight}.toml"
    settings.write_text(
        f'[generate]\nin_flight = {in_flight}\nmax_cost = 1000\n[seeds]\nbuiltin = false\nfiles = ["{seeds}"]\n'
        f'count = {number}\n[[teacher]]\nname = "stub"\nmodel = "m"\nbase_url = "{url}"\nconcurrency = {in_flight}\n'
        "price_input = 1\nprice_output = 10\n"
    )
    out = folder / f"{in_flight}.jsonl"
    command = [sys.executable, "-m", "foundry", "generate", str(settings), "--out", str(out)]
    seconds, cpu, peak = timed(command)
    records = len(out.read_bytes().splitlines())
    if records != number:
        raise RuntimeError(f"{records} records of {number}")
    return number / seconds, cpu / number * 1e3, peak


async def _bare(url: str, number: int, in_flight: int) -> float:
    questions = iter(prompts(number))

    async def work(session: aiohttp.ClientSession) -> None:
        for prompt in questions:
            body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 2048}
            async with session.post(f"{url}/chat/completions", json=body) as response:
                assert (await response.json())["choices"]

    start = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(work(session) for _ in range(in_flight)))
    return number / (time.perf_counter() - start)


DISTILABEL = """
import json, sys
from distilabel.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration
if __name__ == "__main__":
    url, number, in_flight, prompts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.load(open(sys.argv[4]))
    with Pipeline(name="p") as pipeline:
        load = LoadDataFromDicts(data=[{"instruction": p} for p in prompts], batch_size=in_flight)
        ask = TextGeneration(llm=OpenAILLM(model="m", base_url=url, api_key="x"), input_batch_size=in_flight)
        load >> ask
    assert len(pipeline.run(use_cache=False)["default"]["train"]) == number
"""
CURATOR = """
import json, sys
from bespokelabs import curator
if __name__ == "__main__":
    url, number, in_flight, prompts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.load(open(sys.argv[4]))
    params = {"base_url": url, "api_key": "x", "max_concurrent_requests": in_flight,
              "max_requests_per_minute": 10**6, "max_tokens_per_minute": 10**9}
    llm = curator.LLM(model_name="openai/m", backend="openai", backend_params=params)
    assert len(llm(prompts).dataset) == number
"""


def peer(python: str, module: str, script: str, url: str, folder: Path, number: int) -> float | None:
    """Records a second of another program's whole command, 64 in flight; None where it is not there or fails here."""
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        return None
    (folder / f"ask_{module}.py").write_text(script)
    (folder / "prompts.json").write_text(json.dumps(prompts(number)))
    command = [python, str(folder / f"ask_{module}.py"), url, str(number), "64", str(folder / "prompts.json")]
    try:
        return number / timed(command)[0]
    except RuntimeError as error:
        print(f"{module} fails here: {str(error).splitlines()[-1]}", file=sys.stderr)
        return None


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the records and fewer")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--peers-python", action="append", default=[], help="a Python with distilabel or bespokelabs-curator (repeat)"
    )
    options = parser.parse_args()
    part = 20 if options.quick else 1
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name, stub_teacher() as url:
        folder = Path(name)
        few, many = 6_000 // part, 24_000 // part
        figures["direct_64_per_s"], figures["cpu_ms_per_record"], figures["peak_mib"] = ours(url, folder, few, 64)
        figures["bare_aiohttp_64_per_s"] = asyncio.run(_bare(url, few, 64))
        figures["direct_256_per_s"], figures["cpu_ms_per_record_256"], figures["peak_mib_256"] = ours(
            url, folder, many, 256
        )
        figures["bare_aiohttp_256_per_s"] = asyncio.run(_bare(url, many, 256))
        for key, module, script in (
            ("distilabel_64_per_s", "distilabel", DISTILABEL),
            ("curator_64_per_s", "bespokelabs", CURATOR),
        ):
            found = (peer(python, module, script, url, folder, few // 4) for python in options.peers_python)
            figures[key] = next((figure for figure in found if figure is not None), None)
    # In a process of its own, where this file is not taken for the package of the same name.
    command = [sys.executable, str(ROOT / "benchmarks/opencode.py"), "--json", *(["--quick"] if options.quick else [])]
    said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    figures |= {key: figure for key, figure in said.items() if key.startswith("opencode_")}
    for key, figure in figures.items():
        print(f"{key:32} {'not measured' if figure is None else f'{figure:12,.2f}'}")
    if options.json:
        print(json.dumps({"benchmark": "foundry", "quick": options.quick, **figures}))


if __name__ == "__main__":
    main()
