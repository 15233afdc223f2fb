"""The infill sampler: against llama.cpp's own, in single steps, and in whole answers."""

import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smelter.decoding.batch import Row
from smelter.decoding.generate import generate
from smelter.decoding.infill import survivors
from smelter.decoding.request import Request
from smelter.decoding.sampling import candidates
from smelter.export.gguf import write_gguf
from smelter.tokens import stop_ids
from tests import tiny
from tests.export.real_llama_cpp import build_program, llama_cpp_folder

TOKENS = tiny.tokenizer()
BYTES = [TOKENS.decode_bytes([i]) for i in range(TOKENS.vocab_size)]
EOS = TOKENS.eos_id


def token(text: str) -> int:
    return BYTES.index(text.encode())


def left(probs: dict[str, float], end: float = 0.0) -> list[str]:
    """What is left of candidates with these probabilities beside `end`'s, which is "" there."""
    chances = sorted([(end, EOS), *((p, token(text)) for text, p in probs.items())], reverse=True)
    chances = [(p, i) for p, i in chances if p]
    return [BYTES[i].decode() for i in survivors([i for _, i in chances], [p for p, _ in chances], BYTES, [EOS])]


def test_the_answer_ends_where_the_end_outweighs() -> None:
    assert left({"a": 0.55, "b": 0.35}, end=0.1) == [""]
    assert left({"a": 0.55, "b": 0.36}, end=0.09) == ["a", "b", ""]  # 0.91 > 3 * 3 * 0.09
    assert left({"a": 1.0}) == ["a"]


def test_what_nobody_is_sure_of_is_dropped() -> None:
    assert left({"a": 0.7, "b": 0.2, "c": 0.1}) == ["a"]  # 0.2 is less than a third of 0.9
    assert left({"a": 0.6, "b": 0.4}) == ["a", "b"]
    assert left({"a": 0.19, "b": 0.19, "c": 0.19, "d": 0.19, "(": 0.19}) == [""]
    assert survivors([token("a"), token("b")], [0.1, 0.1], BYTES, []) == [token("a")]  # nothing can end it


def test_beginnings_of_each_other_count_together() -> None:
    same = {" ": 0.15, "  ": 0.16, "a": 0.15, "b": 0.15, "c": 0.15, "d": 0.15}
    assert left(same) == ["  "]
    assert left(same | {"  ": 0.0}) == [""]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_with_it_are_beginnings_of_certain_tokens(temperature: float) -> None:
    """Each token written is left by the sampler, given what stands before; where it ends, only the end is."""
    model, prompt = tiny.model(), TOKENS.encode(tiny.CODE[:200])[-40:]
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": 12, "top_k": 40}
    endings = set()
    for seed in range(12):
        (row,) = tiny.write(model, [prompt[seed:]], seed=seed, stop_ids=[EOS], infill_sampler=True, **options)
        endings.add(row.finish)
        with torch.no_grad():
            rows = model.logits(model(torch.tensor([prompt[seed:] + row.ids])))[0, -len(row.ids) - 1 :]
        possible = [survivors(*candidates(logits[: len(BYTES)], 40, 1.0, 0.0), BYTES, [EOS]) for logits in rows]
        assert all(chosen in kept for chosen, kept in zip(row.ids, possible, strict=False))
        if row.finish == "stop":
            assert EOS in possible[len(row.ids)]
    assert endings == {"stop", "length"}


def test_a_row_with_it_leaves_its_neighbours_alone() -> None:
    """And its log-probabilities are the model's own."""
    prompts = [TOKENS.encode(tiny.CODE[cut : cut + 90]) for cut in (0, 200, 400)]
    options: dict[str, Any] = {"temperature": 0.9, "max_tokens": 8, "top_k": 2}
    plain, certain = (tiny.write(tiny.model(), prompts, infill_sampler=on, **options) for on in (False, True))
    requests = [Request(ids, seed=i, num_top=0, infill_sampler=i == 1, **options) for i, ids in enumerate(prompts)]
    mixed = generate(tiny.model(), TOKENS, requests)
    assert [row.ids for row in mixed] == [plain[0].ids, certain[1].ids, plain[2].ids]
    assert mixed[1].logprobs == pytest.approx(certain[1].logprobs, abs=1e-4)


def test_it_may_end_an_answer_before_the_prompt_is_spelled_again() -> None:
    row = Row(Request([1], b"ab", stop_ids=[EOS], infill_sampler=True), 99)
    row.take(token("a"), b"a")
    row.take(EOS, b"")
    assert (row.finish, row.text.close(), row.num_new) == ("stop", "", 0)


@pytest.mark.real
def test_what_is_left_is_what_llama_cpp_leaves(tmp_path: Path) -> None:
    """For 2,000 distributions, from flat to sharp, with and without limits before it."""
    folder = llama_cpp_folder()
    program = build_program(folder, Path(__file__).with_name("llama_infill.cpp"), tmp_path)
    model = tiny.model()
    write_gguf(tmp_path / "model.gguf", model, TOKENS, name="tiny", gguf_type="F16")
    size, rng, cases, raw = model.config.vocab_size, np.random.default_rng(0), [], b""
    for _ in range(2_000):
        logits = rng.normal(size=size, scale=rng.uniform(0.5, 6)).astype(np.float32)
        likely = rng.choice(TOKENS.vocab_size, 6)
        logits[likely] += rng.uniform(0, 12, 6).astype(np.float32)
        logits[EOS] = rng.choice([logits[EOS], logits.max() - rng.uniform(0, 8)])
        logits[TOKENS.vocab_size :] = -1e30
        limits = int(rng.choice([0, 1, 5, 40])), float(rng.choice([1.0, 0.9])), float(rng.choice([0.0, 0.05]))
        cases.append((logits, limits))
        raw += struct.pack("<iff", *limits) + logits.tobytes()
    (tmp_path / "in").write_bytes(raw)
    files = [str(tmp_path / name) for name in ("model.gguf", "in", "out")]
    subprocess.run([str(program), *files], check=True, capture_output=True)
    ending = stop_ids(TOKENS)[::-1]  # the end of a message comes first there
    assert TOKENS.im_end_id in ending
    theirs, at, kinds = np.fromfile(tmp_path / "out", dtype=np.int32).tolist(), 0, set()
    for logits, (top_k, top_p, min_p) in cases:
        found = survivors(*candidates(torch.from_numpy(logits), top_k, top_p, min_p), BYTES, ending)
        assert found == theirs[at + 1 : at + 1 + theirs[at]]
        at += 1 + theirs[at]
        kinds.add((bool({*found} & {*ending}), len(found)))
    assert at == len(theirs)
    assert {(True, 1), (False, 1), (False, 2), (False, 3), (True, 2)} <= kinds
