"""How answers end, beside the real llama-server with the quickstart's file."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from smelter.decoding.generate import generate
from smelter.decoding.request import Request
from smelter.decoding.text import Text
from smelter.model import Model
from smelter.run.load import load_model
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenizer import Tokenizer
from tests.export.real_llama_cpp import Server, llama_cpp_folder, serve

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "runs" / "quickstart"
NUM_PROMPTS = 30
pytestmark = pytest.mark.real


class Student(NamedTuple):
    """The quickstart's model, and prompts that end where a line does."""

    model: Model
    tokenizer: Tokenizer
    gguf: Path
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def student() -> Student:
    files = list((RUN / "export" / "gguf").glob("*-TQ2_0.gguf"))
    if not files:
        pytest.skip("no runs/quickstart: run `make quickstart` first")
    model, tokenizer, checkpoint = load_model(RUN)
    held_out = ShardSet.open(ROOT / checkpoint.config.data.shards).split("val")
    prompts = []
    for number in range(held_out.num_docs):
        ids = held_out.doc(number).tolist()
        end = next((i for i in range(100, len(ids)) if tokenizer.decode_bytes(ids[i - 1 : i]).endswith(b"\n")), None)
        prompts += [ids[end - 100 : end]] if end else []
    assert len(prompts) >= NUM_PROMPTS
    return Student(model, tokenizer, files[0], prompts[:NUM_PROMPTS])


@pytest.fixture(scope="module")
def server(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(llama_cpp_folder(), student.gguf, student.model.config.max_seq_len, log) as running:
        yield running


def ask(server: Server, prompt: list[int], **options: Any) -> dict[str, Any]:
    values = {"prompt": prompt, "n_predict": 100, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    return server.ask("/completion", values | options)


@pytest.mark.parametrize("n_indent", [1, 4, 8])
def test_a_line_indented_less_ends_the_same_text(server: Server, student: Student, n_indent: int) -> None:
    num_cut = 0
    for prompt in student.prompts:
        whole, theirs = ask(server, prompt), ask(server, prompt, n_indent=n_indent)
        text = Text(n_indent=n_indent)
        text.push(whole["content"].encode())
        assert text.close() == theirs["content"]
        if text.has_ended:
            assert theirs["stop_type"] == "limit"
            num_cut += len(theirs["content"]) < len(whole["content"])
    assert num_cut > NUM_PROMPTS // 4


def test_time_ends_an_answer_with_a_line_break(server: Server, student: Student) -> None:
    """As ours does in test_engine.py."""
    num_cut = 0
    for prompt in student.prompts:
        whole, theirs = ask(server, prompt), ask(server, prompt, t_max_predict_ms=1)
        assert whole["content"].startswith(theirs["content"])
        if whole["content"] != theirs["content"]:
            num_cut += 1
            assert "\n" in student.tokenizer.decode(theirs["tokens"][-1:])
            assert theirs["stop_type"] == "limit"
    assert num_cut > NUM_PROMPTS // 4


def test_the_infill_sampler_ends_answers_as_early(
    server: Server, student: Student, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 answers each, as llama.vim has them sampled; what is left of one distribution is held in test_infill.py."""
    limits: dict[str, Any] = {"top_k": 40, "top_p": 0.9}
    ours, theirs, without = [], [], []
    for seed in range(5):
        requests = [
            Request(
                prompt,
                max_tokens=32,
                temperature=1.0,
                seed=1_000 * seed + number,
                stop_ids=[student.tokenizer.eos_id],
                infill_sampler=True,
                **limits,
            )
            for number, prompt in enumerate(student.prompts)
        ]
        ours += [len(row.ids) for row in generate(student.model, student.tokenizer, requests)]
        for prompt in student.prompts:
            options = limits | {"n_predict": 32, "seed": seed}
            theirs.append(len(ask(server, prompt, samplers=["top_k", "top_p", "infill"], **options)["tokens"]))
            if seed == 0:
                without.append(len(ask(server, prompt, samplers=["top_k", "top_p"], **options)["tokens"]))
    means = [statistics.mean(lengths) for lengths in (ours, theirs, without)]
    error = statistics.stdev(ours + theirs) * (2 / len(ours)) ** 0.5
    with capsys.disabled():
        print(f"\nmean tokens of an answer: ours {means[0]:.1f}, llama-server's {means[1]:.1f}, standard error of the")
        print(f"  difference {error:.2f}; llama-server's without the infill sampler {means[2]:.1f}")
    assert abs(means[0] - means[1]) < 4 * error
    assert means[1] < means[2] - 4 * error  # how much shorter depends on the model
