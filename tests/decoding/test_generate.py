"""Decoding: the cache changes nothing, neighbours change nothing, and prompts are those of training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelter.__main__ import main
from smelter.base.errors import CheckpointError, ConfigError, UserError
from smelter.decoding.kv_cache import KVCache
from smelter.decoding.sampling import candidates, sample
from smelter.evaluation.gaps import candidate_lines, choose_cases
from smelter.kernels import head as screened
from smelter.model import Model
from smelter.run.device import pick_device
from smelter.run.load import load_model
from tests import tiny

PROMPTS = [[5, 9, 300], [17], list(range(40, 75)), [3, 3, 3, 8, 1, 0, 2]]


def uncached(model: Model, prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    """Greedy decoding that reads the whole text again for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_tokens):
            token = int(model.logits(model(torch.tensor([ids])))[0, -1].argmax())
            if token in stop_ids:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("activation_quant", ["token", "none"])
@pytest.mark.parametrize("soft_cap", [0.0, 50.0])
def test_greedy_equals_decoding_without_a_cache(activation_quant: str, soft_cap: float) -> None:
    model = tiny.model(activation_quant=activation_quant, attn_logit_soft_cap=soft_cap)
    results = tiny.write(model, PROMPTS, max_tokens=20)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.ids == uncached(model, prompt, 20)
        assert result.finish == "length"
    assert len({tuple(result.ids) for result in results}) == len(PROMPTS), "the prompts make no difference"


def test_cached_hidden_states_equal_one_pass_over_right_padded_rows() -> None:
    # Without activation quantisation, whose rounding would hide small errors or magnify them.
    model = tiny.model(activation_quant="none")
    whole = torch.randint(0, 512, (2, 24))
    with torch.no_grad():
        expected = model(whole)
        cache = KVCache(model.config, 2, 24, torch.float32, "cpu")
        lengths = torch.tensor([10, 3])
        padded = whole[:, :10].clone()
        padded[1, 3:] = 511  # padding of the shorter row: garbage that nobody may see
        positions = torch.arange(10).expand(2, -1)
        first = model(padded, positions=positions, cache=cache, mask=cache.advance(positions, 10))
        torch.testing.assert_close(first[0], expected[0, :10], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first[1, :3], expected[1, :3], atol=1e-5, rtol=1e-5)
        for _ in range(12):
            now = lengths[:, None]
            token = whole.gather(1, now)
            mask = cache.advance(now, int(lengths.max()) + 1)
            hidden = model(token, positions=now, cache=cache, mask=mask)
            for row in range(2):
                torch.testing.assert_close(hidden[row, 0], expected[row, lengths[row]], atol=1e-5, rtol=1e-5)
            lengths += 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 11}])
def test_a_row_does_not_depend_on_its_neighbours(options: dict[str, float]) -> None:
    model = tiny.model()
    seed = int(options.pop("seed", 0))
    # Stop tokens of both rows' own making, so that rows end at different times and are dropped.
    free = tiny.write(model, PROMPTS, max_tokens=24, seed=seed, **options)  # type: ignore[arg-type]
    stops = [free[0].ids[2], free[3].ids[9]]
    batched = tiny.write(model, PROMPTS, max_tokens=24, stop_ids=stops, seed=seed, **options)  # type: ignore[arg-type]
    assert len({len(result.ids) for result in batched}) > 1
    for row, prompt in enumerate(PROMPTS):
        (alone,) = tiny.write(
            model,
            [prompt],
            max_tokens=24,
            stop_ids=stops,
            seed=seed + row,
            **options,  # type: ignore[arg-type]
        )
        assert alone.ids == batched[row].ids
        assert alone.finish == batched[row].finish
        assert alone.logprobs == pytest.approx(batched[row].logprobs, abs=1e-3)


def test_stop_ids_end_a_row_and_are_not_part_of_it() -> None:
    model = tiny.model()
    (free,) = tiny.write(model, [PROMPTS[0]], max_tokens=10)
    stop = free.ids[4]
    (stopped,) = tiny.write(model, [PROMPTS[0]], max_tokens=10, stop_ids=[stop])
    assert stopped.ids == free.ids[: free.ids.index(stop)]
    assert stopped.finish == "stop"
    assert len(stopped.logprobs) == len(stopped.ids)


@pytest.mark.parametrize(
    "settings", [(0.8, 0, 1.0), (0.8, 0, 1.0, 0.05), (0.8, 40, 1.0), (0.8, 0, 0.9), (0.8, 40, 0.9)]
)
def test_a_row_of_logits_that_are_no_numbers_ends_no_other(settings: tuple[Any, ...]) -> None:
    """It gets some token that there is."""
    logits, uniforms = torch.randn(3, 300, generator=torch.manual_seed(1)), torch.tensor([0.3, 0.9, 0.6])
    expected = sample(logits, uniforms, *settings).tolist()
    for bad in (torch.nan, torch.inf):
        logits[1] = bad
        found = sample(logits, uniforms, *settings).tolist()
        assert (found[0], found[2]) == (expected[0], expected[2])
        assert 0 <= found[1] < 300
        assert len(candidates(logits[1], 40, 0.9, 0.0)[0]) == 1


def test_a_full_context_ends_the_row_but_not_the_others() -> None:
    model = tiny.model()
    context = model.config.max_seq_len
    full = [i % 500 for i in range(context - 3)]
    results = tiny.write(model, [full, [7]], max_tokens=20)
    assert [len(result.ids) for result in results] == [3, 20]
    assert results[0].finish == "length"
    assert results[0].ids == uncached(model, full, 3)
    assert results[1].ids == uncached(model, [7], 20)


def test_log_probabilities_are_the_models() -> None:
    model = tiny.model(activation_quant="none")
    (result,) = tiny.write(model, [PROMPTS[0]], max_tokens=6, temperature=1.3, seed=3)
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0] + result.ids])
        logits = model.logits(model(ids)).log_softmax(-1)[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.gather(-1, torch.tensor(result.ids)[:, None]).squeeze(-1)
    assert result.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]])
    count, temperature = 40_000, 0.8
    ids = sample(logits.expand(count, -1), torch.rand(count, generator=torch.manual_seed(0)), temperature, 0, 1.0)
    shares = torch.bincount(ids, minlength=5) / count
    torch.testing.assert_close(shares, (logits / temperature).softmax(-1)[0], atol=0.01, rtol=0)


def test_top_k_and_top_p_cut_where_they_should() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    everywhere = torch.linspace(0, 0.9999, 400)

    def seen(top_k: int, top_p: float) -> set[int]:
        return set(sample(logits.expand(400, -1), everywhere, 1.0, top_k, top_p).tolist())

    assert seen(0, 1.0) == {0, 1, 2, 3}
    assert seen(2, 1.0) == {1, 3}
    assert seen(0, 0.65) == {1, 3}  # 0.4 + 0.3 reaches 0.65
    assert seen(0, 0.75) == {1, 2, 3}
    assert seen(0, 0.01) == {1}  # never fewer than one
    assert seen(10, 1.0) == {0, 1, 2, 3}


def by_definition(logits: Tensor, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """Nucleus sampling of one row, in Python's own numbers."""
    probs = (logits / temperature).softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[: top_k or None]
    total, before, kept = sum(probs[i] for i in order) if top_k else 1.0, 0.0, []
    for i in order:
        if before < top_p:
            kept.append(i)
        before += probs[i] / total
    if not top_k and top_p >= 1:
        kept = list(range(len(probs)))
    plain = logits.softmax(-1).tolist()
    kept = [i for i in kept if plain[i] >= min_p * max(plain)]
    threshold, reached = uniform * sum(probs[i] for i in kept), 0.0
    for i in kept:
        reached += probs[i]
        if reached > threshold:
            return i
    return max(i for i in kept if probs[i] > 0)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])  # from flat, where the nucleus is most of the vocabulary
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (0, 0.9), (0, 0.3), (40, 1.0), (40, 0.8), (1, 1.0), (900, 0.99)]
)
def test_sampling_is_what_it_is_defined_to_be(spread: float, top_k: int, top_p: float, min_p: float) -> None:
    """Also in a batch of rows some of which are flat, and where most tokens are impossible."""
    generator = torch.manual_seed(3)
    spreads = torch.tensor([spread, 3.0]).repeat(12)
    logits = torch.randn(24, 700, generator=generator, dtype=torch.double) * spreads[:, None]
    logits[5, 3:] = -torch.inf
    uniforms = torch.rand(24, generator=generator, dtype=torch.double)
    uniforms[:3] = torch.tensor([0.0, 0.5, 1 - 1e-9], dtype=torch.double)
    found = sample(logits, uniforms, 0.7, top_k, top_p, min_p).tolist()
    assert found == [
        by_definition(row, float(uniform), 0.7, top_k, top_p, min_p)
        for row, uniform in zip(logits, uniforms, strict=True)
    ]
    alone = [int(sample(logits[i, None], uniforms[i, None], 0.7, top_k, top_p, min_p)) for i in range(24)]
    assert alone == found


def test_the_seed_decides_and_greedy_needs_none() -> None:
    model = tiny.model()

    def ids(seed: int, temperature: float) -> list[int]:
        return tiny.write(model, [[5, 6]], max_tokens=12, temperature=temperature, seed=seed)[0].ids

    assert ids(1, 1.0) == ids(1, 1.0) != ids(2, 1.0)
    assert ids(1, 0.0) == ids(2, 0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"n_indent": -1}, "n_indent"),
        ({"prompts": [[1], []]}, "prompt 1"),
        ({"prompts": [[1] * 96]}, "1 to 95"),
    ],
)
def test_options_out_of_range_are_named(change: dict[str, object], words: str) -> None:
    options: dict[str, object] = {"prompts": [[1]], "max_tokens": 2} | change
    prompts = options.pop("prompts")
    with pytest.raises(UserError, match=words):
        tiny.write(tiny.model(), prompts, **options)  # type: ignore[arg-type]


def test_no_prompts_give_no_texts() -> None:
    assert tiny.write(tiny.model(), [], max_tokens=3) == []


LINES = st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r"), max_size=20))


@given(LINES)
@settings(max_examples=50)
def test_cases_take_whole_lines_out_of_their_documents(lines: list[str]) -> None:
    text = "\n".join([*lines, "    value = compute(1)", "# a comment that is long"])
    cases = choose_cases(1, lambda _: text, 100)
    assert len(cases) == len(candidate_lines(text)) >= 1
    for case in cases:
        assert case.prefix + case.middle + case.suffix == text
        assert case.suffix[:1] in ("", "\n") or case.suffix[:1].isspace()
        assert "\n" not in case.middle
        assert not case.middle.startswith("#")
        assert not case.prefix.rpartition("\n")[2].strip()


def test_cases_are_the_same_each_time_and_spread_over_documents() -> None:
    read: list[int] = []

    def text(i: int) -> str:
        read.append(i)
        return "" if i == 3 else f"    first_{i} = compute()\n    second_{i} = compute()\nx\n"

    cases = choose_cases(8, text, 7)
    assert {case.doc for case in cases} == {0, 1, 2, 4, 5, 6, 7}
    assert cases == choose_cases(8, text, 7)
    assert cases != choose_cases(8, text, 7, seed=1)
    assert len(choose_cases(8, text, 100)) == 14
    read.clear()
    choose_cases(1_000, text, 2)
    assert len(read) <= 3, "only the documents that are needed are read"


def test_generation_leaves_compiled_blocks_alone() -> None:
    model = tiny.model()
    expected = tiny.write(model, PROMPTS, max_tokens=8)
    import torch._dynamo

    torch._dynamo.reset()
    for block in model.layers:
        block.compile(backend="eager")
    torch._dynamo.utils.counters.clear()
    results = tiny.write(model, PROMPTS, max_tokens=8)
    assert [result.ids for result in results] == [result.ids for result in expected]
    assert not torch._dynamo.utils.counters["frames"], "a decoding step was compiled"


@pytest.mark.gpu
def test_cuda_writes_what_the_cpu_writes() -> None:
    first = tiny.write(tiny.model(), PROMPTS, max_tokens=4)
    second = tiny.write(tiny.model().to("cuda"), PROMPTS, max_tokens=4)
    assert [result.ids for result in first] == [result.ids for result in second]


def test_loading_gives_the_saved_model(tmp_path: Path) -> None:
    made = tiny.model()
    run = tiny.checkpoint(tmp_path / "run", made)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, tokens, checkpoint = load_model(run)
    assert torch.equal(before, torch.get_rng_state()), "loading a model moved the caller's random numbers"
    assert not model.training
    assert (checkpoint.step, checkpoint.state) == (7, None)
    assert tokens.hash == tiny.tokenizer().hash
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        assert torch.equal(model.logits(model(ids)), made.logits(made(ids)))


def test_a_checkpoint_of_another_shape_or_tokenizer_is_refused(tmp_path: Path) -> None:
    made = tiny.model()
    del made.layers[1].mlp
    with pytest.raises(CheckpointError, match="another model"):
        load_model(tiny.checkpoint(tmp_path / "a", made))
    with pytest.raises(CheckpointError, match="512"):
        load_model(tiny.checkpoint(tmp_path / "b", tiny.model(), tiny.tokenizer(600)))


@pytest.mark.parametrize("name", ["tpu9", "cuda:99"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        pick_device(name)


def test_command_line_writes_the_completion_alone(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    run = str(tiny.checkpoint(tmp_path / "run", tiny.model()))
    assert main(["complete", run, "--prompt", "def f(", "--max-tokens", "8", "--device", "cpu"]) == 0
    out = capsysbinary.readouterr()
    assert out.out.decode() == tiny.complete("def f(", max_tokens=8)
    assert out.out
    assert not out.err
    assert main(["complete", run, "--prefix", "", "--suffix", "é漢🙂", "--max-tokens", "8", "--device", "cpu"]) == 0
    out = capsysbinary.readouterr()
    assert out.out.decode() == tiny.complete("", "é漢🙂", max_tokens=8)
    assert not out.err


def test_empty_and_broken_prompts_work(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    run = str(tiny.checkpoint(tmp_path / "run", tiny.model()))
    for options in (["--prompt", ""], ["--prefix", ""], ["--suffix", ""], ["--prompt", "caf\udce9"]):
        assert main(["complete", run, *options, "--max-tokens", "3", "--device", "cpu"]) == 0
        assert not capsysbinary.readouterr().err


@pytest.mark.parametrize("options", [["--prompt"], ["--prefix"], ["--suffix"]])
def test_a_long_context_is_cut_and_says_so(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], options: list[str]
) -> None:
    run = str(tiny.checkpoint(tmp_path / "run", tiny.model()))
    assert main(["complete", run, *options, tiny.CODE[:3_000], "--max-tokens", "16", "--device", "cpu"]) == 0
    out = capsysbinary.readouterr()
    assert out.err.endswith(b"used the nearest 80\n")
    assert out.err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "either --prompt"),
        (["--prompt", "a", "--suffix", "b"], "either --prompt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "a", "--device", "cudaa"], "device 'cudaa'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    run = str(tiny.checkpoint(tmp_path / "run", tiny.model()))
    assert main(["complete", run, *options]) == 2
    out = capsys.readouterr()
    assert words in out.err
    assert out.err.count("\n") == 1
    assert not out.out
    assert main(["complete", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_without_logprobs_it_writes_the_same(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows then take their token from the screened head, but where they have something to spell."""
    monkeypatch.setattr(screened, "MIN_PRODUCTS", 0)
    model, prompts = tiny.model(), [[1, 2, 3], [4], list(range(30))]
    model.freeze()
    calls: list[int] = []
    likeliest = model.likeliest

    def counted(hidden: Tensor, count: int) -> Tensor:
        calls.append(len(hidden))
        return likeliest(hidden, count)

    monkeypatch.setattr(model, "likeliest", counted)
    for pending in ([b"", b"", b""], [b"", b"de", b""]):
        options: dict[str, Any] = {"max_tokens": 12, "temperature": temperature, "seed": 3}
        told = tiny.write(model, prompts, pending=pending, **options)
        assert not calls
        bare = tiny.write(model, prompts, pending=pending, num_top=None, **options)
        assert [each.ids for each in bare] == [each.ids for each in told]
        assert [each.logprobs for each in bare] == [[], [], []]
        assert all(len(each.logprobs) == len(each.ids) for each in told)
        assert len(calls) == (12 if temperature == 0.0 else 0)
        assert sum(calls) == 12 * len(prompts) * (temperature == 0.0) or any(pending)
        assert not (any(pending) and calls and calls[0] == len(prompts))
        calls.clear()
