"""The real llama.cpp runs what the quickstart exported, and computes what the checkpoint does.

`make test-real` builds llama.cpp and runs the quickstart first. The figures are printed (`pytest -s`) and held.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.decoding.generate import Prompt, complete_many, generate
from smelter.decoding.request import Request
from smelter.evaluation.gaps import choose_cases
from smelter.export.check import EXAMPLE, compare, infill_prompt, llama_cpp_ids, logits_of, runtime_model
from smelter.export.gguf import write_gguf
from smelter.model import Model
from smelter.run.load import load_model
from smelter.tokens.shards import ShardSet, Split
from smelter.tokens.tokenizer import Tokenizer
from tests.export.real_llama_cpp import Server, build_program, llama_cpp_folder, llama_logits, serve

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "runs" / "quickstart"
pytestmark = pytest.mark.real


class Student(NamedTuple):
    """The quickstart's model as trained, its file for llama.cpp, and text that it has not seen."""

    model: Model
    tokenizer: Tokenizer
    gguf: Path
    held_out: Split

    @property
    def context(self) -> int:
        return self.model.config.max_seq_len

    def documents(self) -> list[list[int]]:
        return [self.held_out.doc(i).tolist() for i in range(self.held_out.num_docs)]


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    return llama_cpp_folder()


@pytest.fixture(scope="module")
def student() -> Student:
    files = list((RUN / "export" / "gguf").glob("*-TQ2_0.gguf"))
    if not files:
        pytest.skip("no runs/quickstart: run `make quickstart` first")
    model, tokenizer, checkpoint = load_model(RUN)
    shards = ShardSet.open(ROOT / checkpoint.config.data.shards)
    return Student(model, tokenizer, files[0], shards.split("val"))


@pytest.fixture(scope="module")
def windows(student: Student) -> list[Tensor]:
    """The beginnings of 20 held-out documents, a context each at most."""
    found = [[student.tokenizer.eos_id, *ids][: student.context] for ids in student.documents()]
    return [torch.tensor([ids]) for ids in found if len(ids) > 100][:20]


@pytest.fixture(scope="module")
def server(llama_cpp: Path, student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(llama_cpp, student.gguf, student.context, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def test_logits_are_the_checkpoints(
    llama_cpp: Path, student: Student, windows: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same numerics llama.cpp computes the same; what differs otherwise is rounding, measured one by one.

    An int8 activation that falls to the other side of a rounding edge moves all that follows, so every kind of rounding
    (of the embedding to Q8_0, of attention to f16, of activations per token or per block) costs about as much as it
    would to round the activations a second time.
    """
    program = build_program(llama_cpp, ROOT / "tests" / "export" / "llama_logits.cpp", tmp_path)
    exact = tmp_path / "exact.gguf"
    write_gguf(exact, student.model, student.tokenizer, name="exact", gguf_type="TQ2_0", embedding_type="F32")
    rounded = tmp_path / "rounded.gguf"
    write_gguf(rounded, student.model, student.tokenizer, name="rounded", gguf_type="TQ2_0", embedding_type="Q8_0")
    as_trained, in_blocks = logits_of(student.model), logits_of(runtime_model(student.model, "block256"))
    found = {}
    for name, ours, file, attention in (
        ("same numerics: blocks, F32 embedding and attention", in_blocks, exact, "f32"),
        ("blocks, F32 embedding, f16 attention", in_blocks, exact, "f16"),
        ("blocks, Q8_0 embedding, f32 attention", in_blocks, rounded, "f32"),
        ("blocks, Q8_0 embedding, f16 attention", in_blocks, rounded, "f16"),
        ("as trained, the exported file as it is served", as_trained, student.gguf, "f32"),
    ):
        logits = llama_logits(program, file, windows, tmp_path, attention)
        theirs = {id(window): rows for window, rows in zip(windows, logits, strict=True)}
        found[name] = compare(ours, lambda tokens, theirs=theirs: theirs[id(tokens)], windows)  # type: ignore[misc]
    ours_nll = mean_nll([as_trained(window) for window in windows], windows)
    theirs_nll = mean_nll([theirs[id(window)] for window in windows], windows)
    with capsys.disabled():
        print(f"\nllama.cpp beside us at {sum(window.numel() for window in windows):,} positions:")
        for name, (kl, same) in found.items():
            print(f"  {name:50}  KL {kl:.1e} nats, same next token {same:.2%}")
        print(f"  nats per token of the text: ours {ours_nll:.4f}, the served file {theirs_nll:.4f}")
    (kl, same), *_, (served_kl, served_same) = found.values()
    assert kl <= 1e-4
    assert same >= 0.99
    assert served_kl <= 1e-4
    assert served_same >= 0.99
    assert theirs_nll == pytest.approx(ours_nll, rel=2e-3)


def mean_nll(logits: list[Tensor], windows: list[Tensor]) -> float:
    """Mean surprise in nats of each window's tokens after the first."""
    pairs = list(zip(logits, windows, strict=True))
    total = sum(float(F.cross_entropy(rows[:-1], window[0, 1:], reduction="sum").detach()) for rows, window in pairs)
    return total / sum(window.numel() - 1 for window in windows)


def test_greedy_continuations_are_the_checkpoints(
    server: Server, student: Student, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = choose_cases(student.held_out.num_docs, lambda i: student.tokenizer.decode(student.documents()[i]), 200)
    prompts = [student.tokenizer.encode(case.prefix)[-64:] or [student.tokenizer.eos_id] for case in cuts]
    assert len(prompts) == 200
    requests = [Request(prompt, max_tokens=32, stop_ids=[student.tokenizer.eos_id]) for prompt in prompts]
    ours = generate(student.model, student.tokenizer, requests)
    options = {"n_predict": 32, "temperature": 0, "cache_prompt": False, "return_tokens": True}
    same = 0
    for prompt, result in zip(prompts, ours, strict=True):
        answer = server.ask("/completion", {"prompt": prompt, **options})
        same += [i for i in answer["tokens"] if i != student.tokenizer.eos_id] == result.ids
    with capsys.disabled():
        print(f"\n{same} of 200 greedy continuations of 32 tokens are the checkpoint's")
    assert same >= 170


def test_infilling_and_completions_write_what_we_write(server: Server, student: Student) -> None:
    """/infill as llama.cpp has it, and /v1/completions with the same prompt as text, as Zed and Minuet send it."""
    same = 0
    cases = choose_cases(student.held_out.num_docs, lambda i: student.tokenizer.decode(student.documents()[i]), 20)
    for case in cases:
        prefix, suffix = case.prefix[-200:], case.suffix[:100]
        greedy = {"temperature": 0, "cache_prompt": False}
        answer = server.ask("/infill", {"input_prefix": prefix, "input_suffix": suffix, "n_predict": 16, **greedy})
        expected = student.tokenizer.fim_prompt(prefix, suffix)
        text = student.tokenizer.decode(expected, skip_special_tokens=False)
        assert answer["tokens_evaluated"] == len(expected)
        assert answer["prompt"] == text
        completion = server.ask("/v1/completions", {"prompt": text, "max_tokens": 16, **greedy})
        assert completion["usage"]["prompt_tokens"] == len(expected)
        assert completion["choices"][0]["text"] == answer["content"]
        prompt = Prompt(prefix, suffix)
        (ours,) = complete_many(student.model, student.tokenizer, [prompt], max_tokens=16, order="psm")
        same += answer["content"] == ours
    assert same >= 14


def test_it_answers_as_llama_vim_asks(server: Server, student: Student) -> None:
    """Whole lines as prefix, the current line's beginning as prompt, its sampler, and a ring of other files."""
    values: dict[str, Any] = {
        "input_prefix": "import os\n\n\ndef names(folder):\n",
        "input_suffix": "\n    return found\n",
        "input_extra": [{"text": "import sys\n", "filename": "other.py"}],
        "prompt": "    found = os.",
        "n_predict": 16,
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 1_500,
        "response_fields": ["content", "truncated", "tokens_cached", "timings/predicted_n"],
    }
    answer = server.ask("/infill", values)
    assert set(answer) == {"content", "truncated", "tokens_cached", "timings/predicted_n"}
    assert isinstance(answer["content"], str)
    assert answer["timings/predicted_n"] <= 16


def test_a_long_file_fits(server: Server, student: Student) -> None:
    """More code than the context holds: the server keeps what is nearest to the cursor."""
    text = max((student.tokenizer.decode(ids) for ids in student.documents()), key=len)
    assert len(student.tokenizer.encode(text)) > 3 * student.context
    half = len(text) // 2
    values = {"input_prefix": text[:half], "input_suffix": text[half:], "n_predict": 8, "temperature": 0}
    answer = server.ask("/infill", values)
    assert 0.8 * student.context / 2 <= answer["tokens_evaluated"] <= student.context / 2 + 4
    assert not answer["truncated"]


def test_every_text_becomes_the_same_tokens(llama_cpp: Path, student: Student, tmp_path: Path) -> None:
    program = llama_cpp / "bin" / "llama-tokenize"
    for ids in student.documents():
        text = student.tokenizer.decode(ids)
        assert llama_cpp_ids(program, student.gguf, text, parse_special=False, work=tmp_path) == ids
    prompt = infill_prompt(student.tokenizer)
    found = llama_cpp_ids(program, student.gguf, prompt["text"], parse_special=True, work=tmp_path)
    assert found == prompt["ids"] == student.tokenizer.fim_prompt(*EXAMPLE)


def test_the_server_knows_the_model(server: Server, student: Student) -> None:
    meta = server.ask("/v1/models")["data"][0]["meta"]
    assert meta["n_vocab"] == student.model.config.vocab_size
    assert meta["n_ctx_train"] == student.context
    assert meta["n_params"] == student.model.config.num_params_estimate
    assert json.dumps(server.ask("/props")).count("<|fim_prefix|>") <= 1
