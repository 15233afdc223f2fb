"""How many tokens a second do `smelter serve`, llama.cpp's server and Transformers read and write, for 1, 8 and 64?

    python benchmarks/serve.py [--quick] [--json] [--preset 50m] [--threads 2]

One model with fresh weights (speed does not depend on what they know), in one run. Each of the
1, 8 or 64 requests brings a prompt of its own, as token ids. Reading is timed with one token to write, writing with
prompts of 8 tokens, each from the first request to the last answer.
The servers are asked over HTTP; Transformers is called in this process, with all prompts as one batch. llama.cpp takes
part if `llama-server` is on PATH, in LLAMA_SERVER, or where scripts/build_llama_cpp.sh puts it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smelter.config import Config, DataConfig, TrainingConfig, preset
from smelter.export.gguf import write_gguf
from smelter.export.hf import qwen3_config
from smelter.model import Model
from smelter.run.checkpoint import load_checkpoint, save_checkpoint
from smelter.serving.llama_server import start_llama_server
from smelter.tokens.tokenizer import Tokenizer

CONCURRENCY = (1, 8, 64)
Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class Speed:
    """Tokens per second."""

    read: float
    write: float


def make_run(folder: Path, name: str, context: int) -> Path:
    """A run folder with a model of fresh weights, and its GGUF file."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py")))
    tokenizer = Tokenizer.train([source * 2], 1_024)
    config = replace(preset(name).model, max_seq_len=context, attn_logit_soft_cap=0.0, final_logit_soft_cap=0.0)
    torch.manual_seed(0)
    model = Model(config)
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    save_checkpoint(
        folder,
        1,
        config=Config(model=config, data=DataConfig(), training=TrainingConfig(run_dir=str(folder))),
        tensors=dict(model.state_dict()),
        tokenizer_file=folder / "tokenizer.json",
        state={"elapsed_seconds": 0.0, "tokens": 0},
        keep=1,
    )
    # Not by the command, which first measures what is lost on the way: here nothing is known that could be.
    write_gguf(folder / "model.gguf", model, tokenizer, name="model", gguf_type="TQ2_0")
    return folder


def make_prompts(count: int, length: int, seed: int) -> Prompts:
    """Prompts that share no beginning."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for _ in range(count)]


def post(url: str, body: dict[str, Any], key: str | None) -> Any:
    """The JSON answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


@contextmanager
def smelter_server(run: Path, threads: int) -> Iterator[tuple[str, str | None]]:
    """Our server as a process: its URL."""
    command = [sys.executable, "-m", "smelter", "serve", str(run), "--port", "0", "--slots", "64"]
    process = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1], None
    finally:
        process.terminate()
        process.wait()


def find_llama_server() -> str | None:
    """The program, if it is here."""
    built = sorted((Path.home() / ".cache/foundry-tests").glob("llama.cpp*/bin/llama-server"))
    return os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or (str(built[-1]) if built else None)


@contextmanager
def llama_server(run: Path, program: str, context: int, threads: int) -> Iterator[tuple[str, str | None]]:
    """llama.cpp's server on the TQ2_0 file: its URL and key."""
    server = start_llama_server(program, run / "model.gguf", context=context, num_slots=64, threads=threads)
    try:
        yield server.url, server.key
    finally:
        server.stop()


def over_http(url: str, key: str | None, **options: Any) -> Callable[[Prompts, int], int]:
    """A function that writes `length` tokens after each prompt, all at once, and returns how many were written."""

    def write(prompts: Prompts, length: int) -> int:
        def one(prompt: list[int]) -> int:
            body = {"prompt": prompt, "n_predict": length, "temperature": 0.0, "cache_prompt": False, **options}
            return int(post(f"{url}/completion", body, key)["tokens_predicted"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(one, prompts))

    return write


def with_transformers(run: Path) -> Callable[[Prompts, int], int]:
    """The same with Transformers' generate, in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    checkpoint = load_checkpoint(run, with_state=False)
    values = qwen3_config(checkpoint.config.model, Tokenizer.load(checkpoint.tokenizer_file))
    model: Any = Qwen3ForCausalLM(Qwen3Config(**values)).float().eval()

    def write(prompts: Prompts, length: int) -> int:
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
        return int((found.shape[1] - tokens.shape[1]) * len(prompts))

    return write


def measure(write: Callable[[Prompts, int], int], count: int, prompt_tokens: int, tokens: int) -> Speed:
    """Reading and writing speed with `count` requests at a time."""
    write(make_prompts(count, 8, seed=1), 2)  # warm
    start = time.perf_counter()
    write(make_prompts(count, prompt_tokens, seed=2), 1)
    reading = time.perf_counter() - start
    start = time.perf_counter()
    written = write(make_prompts(count, 8, seed=3), tokens)
    return Speed(count * prompt_tokens / reading, written / (time.perf_counter() - start))


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny preset, few tokens, one thread")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--preset", default="50m", help="size of the model")
    parser.add_argument("--threads", type=int, help="CPU threads of each contestant; by default all")
    options = parser.parse_args()
    name, prompt_tokens, tokens = ("tiny", 32, 8) if options.quick else (options.preset, 256, 64)
    context = 64 if options.quick else 512
    threads = options.threads or (1 if options.quick else os.cpu_count() or 1)
    torch.set_num_threads(threads)
    found: dict[str, dict[int, Speed]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", name, context)
        with smelter_server(run, threads) as (url, key):
            found["smelter serve"] = {n: measure(over_http(url, key), n, prompt_tokens, tokens) for n in CONCURRENCY}
        program = find_llama_server()
        if program is not None:
            with llama_server(run, program, context, threads) as (url, key):
                write = over_http(url, key, ignore_eos=True)
                found["llama-server TQ2_0"] = {n: measure(write, n, prompt_tokens, tokens) for n in CONCURRENCY}
        write = with_transformers(run)
        found["Transformers fp32"] = {n: measure(write, n, prompt_tokens, tokens) for n in CONCURRENCY}
    print(f"{name}, {threads} threads: tokens/s of all together; each reads {prompt_tokens}, writes {tokens}")
    print(f"{'':20}" + "".join(f"{f'{what} x{n}':>12}" for what in ("read", "write") for n in CONCURRENCY))
    for who, speeds in found.items():
        values = [getattr(speeds[n], what) for what in ("read", "write") for n in CONCURRENCY]
        print(f"{who:20}" + "".join(f"{value:12,.0f}" for value in values))
    if options.json:
        tokens_per_second = {who: {str(n): vars(speed) for n, speed in each.items()} for who, each in found.items()}
        result = {"benchmark": "serve", "quick": options.quick, "preset": name, "threads": threads}
        print(json.dumps(result | {"tok_per_sec": tokens_per_second, "llama_server": program is not None}))


if __name__ == "__main__":
    main()
