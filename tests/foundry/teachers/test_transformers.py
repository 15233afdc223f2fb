"""The teacher in a folder, beside Transformers itself."""

import asyncio
import contextlib
import gc
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from foundry.__main__ import main as foundry
from foundry.teacher import (
    Answer,
    GarbledAnswerError,
    Question,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
)
from foundry.teachers.transformers import _choose
from tests.tiny_hf import CHATML, IDS, KINDS, ask, make_teacher, run, save_random, save_spelling


@contextmanager
def at_each_pass(work: Callable[[], object]) -> Iterator[None]:
    """Do something whenever a whole model has computed."""

    def hook(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, transformers.PreTrainedModel) and hasattr(output, "logits"):
            work()

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def load(folder: Path) -> tuple[Any, Any]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model, tokenizer = load(save_random(tmp_path, kind, seed=1))
    prompts = ["def f(x):", "a", "Sort a list of numbers in place.\n"]
    questions = [Question(prompt=prompt, temperature=0.0, max_tokens=40) for prompt in prompts]
    answers = run(make_teacher(tmp_path), *questions)
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**inputs, do_sample=False, max_new_tokens=40, pad_token_id=IDS["<end>"])
        tokens = theirs[0, inputs.input_ids.shape[1] :]
        assert torch.equal(model(theirs).logits[0, len(prompt) - 1 : -1].argmax(1), tokens)  # in one pass, no cache
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.usage == {"input": len(prompt), "output": len(tokens)}
        assert answer.finish == ("stop" if tokens[-1] == IDS["<end>"] else "length")
        assert answer.cost == 0.0
    assert len({answer.text for answer in answers}) == 3


def test_sampled_answers_do_not_depend_on_what_else_is_asked(llama: Path) -> None:
    questions = [
        Question(prompt=f"Question {number}" * number, temperature=1.0, top_p=0.9, max_tokens=30, seed=number // 2)
        for number in range(1, 9)
    ]
    alone = [run(make_teacher(llama), question)[0] for question in questions]
    together = run(make_teacher(llama), *questions)
    backwards = run(make_teacher(llama), *questions[::-1])[::-1]
    assert alone == together == backwards
    assert len({answer.text for answer in alone}) == 8


def test_teachers_at_once_share_nothing(tmp_path: Path) -> None:
    """Neither random numbers nor what Transformers patches while it loads: heads would be left without weights."""
    save_random(tmp_path, tie_word_embeddings=True)
    questions = [Question(prompt="Q", temperature=2.0, max_tokens=30, seed=seed) for seed in range(3)]
    alone = run(make_teacher(tmp_path), *questions)

    async def together() -> list[Answer]:
        teachers = [make_teacher(tmp_path) for _ in range(4)]
        answers = await asyncio.gather(*(teacher.ask(question) for teacher in teachers for question in questions))
        for teacher in teachers:
            await teacher.close()
        return answers

    assert asyncio.run(together()) == alone * 4


def test_what_else_the_folder_suggests_is_left_aside(tmp_path: Path) -> None:
    save_random(tmp_path)
    options: dict[str, Any] = {"prompt": "Q", "temperature": 1.0, "top_p": 0.9, "seed": 1, "max_tokens": 30}
    plain = ask(tmp_path, **options)
    assert len(plain.text) > 20
    suggestions: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 1,
        "num_beams": 2,
        "do_sample": True,
    }
    suggestions |= {"suppress_tokens": [IDS[character] for character in set(plain.text)], "max_length": 9}
    transformers.GenerationConfig(eos_token_id=IDS["<end>"], **suggestions).save_pretrained(tmp_path)
    assert ask(tmp_path, **options) == plain


def test_the_seed_decides_and_without_one_chance_does(llama: Path) -> None:
    fields: dict[str, Any] = {"prompt": "Q", "temperature": 1.0, "max_tokens": 30}
    seeds = [3, 3, 4, -1, 2**80]
    answers = [answer.text for answer in run(make_teacher(llama), *(Question(**fields, seed=seed) for seed in seeds))]
    for _ in range(2):
        for _ in range(5):
            with contextlib.suppress(GarbledAnswerError):  # chance may begin with <think>, and then nothing is left
                answers.append(ask(llama, **fields).text)
                break
    assert answers[0] == answers[1]
    assert len(set(answers)) == len(answers) - 1 == len(seeds) + 1


def test_samples_come_as_often_as_the_model_says(llama: Path) -> None:
    model, tokenizer = load(llama)
    logits = model(**tokenizer("Q", return_tensors="pt")).logits[0, -1].detach()
    num = 600
    questions = [Question(prompt="Q", temperature=1.5, top_p=0.8, max_tokens=1, seed=seed) for seed in range(num)]
    teacher = make_teacher(llama, logprobs=True)

    async def sample() -> Counter[str]:
        found = await asyncio.gather(*map(teacher.ask, questions), return_exceptions=True)
        await teacher.close()
        assert {type(answer) for answer in found} <= {Answer, GarbledAnswerError}  # white space alone is no answer
        return Counter(answer.text if isinstance(answer, Answer) else "" for answer in found)

    found = asyncio.run(sample())
    top_p: Any = transformers.TopPLogitsWarper(0.8)
    expected = top_p(None, (logits / 1.5)[None])[0].softmax(0)
    assert 5 < (expected > 0).sum() < len(IDS) / 1.5
    shares = {name: float(expected[number]) for name, number in IDS.items()}
    blank = sum(shares.pop(name) for name in ("<end>", "<think>", " ", "\n"))
    for name, share in {**shares, "": blank}.items():
        spread = (num * share * (1 - share)) ** 0.5
        assert abs(found.pop(name, 0) - num * share) <= 4.5 * spread + 1e-9, name
    assert not found


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=20),
    temperature=st.sampled_from([1e-6, 0.3, 1.0, 2.0]),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 100),
)
def test_a_sample_lies_in_the_nucleus(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    values = torch.tensor(logits)
    question = Question(prompt="", temperature=temperature, top_p=top_p)
    token = _choose(values, question, torch.Generator().manual_seed(seed))
    shares = ((values.double() - values.max()) / temperature).softmax(0)
    likelier = float(shares[shares > shares[token] * (1 + 1e-5)].sum())
    assert likelier < top_p + 1e-5
    assert shares[token] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_one_pass_over_the_whole(temperature: float, llama: Path) -> None:
    answer = ask(llama, "def f(x):", temperature=temperature, top_p=0.7, seed=5, max_tokens=60, logprobs=True)
    assert answer.logprobs is not None
    model, _ = load(llama)
    words = [word for word, _ in answer.logprobs]
    assert "".join(words) == answer.text
    tokens = torch.tensor([[IDS[name] for name in (*"def f(x):", *words)]])
    with torch.no_grad():
        expected = model(tokens).logits[0].log_softmax(1)
    start = len("def f(x):")
    wanted = torch.stack([expected[start + i - 1, tokens[0, start + i]] for i in range(len(words))])
    torch.testing.assert_close(torch.tensor([value for _, value in answer.logprobs]), wanted, rtol=1e-4, atol=1e-4)
    assert ask(llama, logprobs=False).logprobs is None


def test_an_answer_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?Yes .", "<end>", clean_up_tokenization_spaces=True)
    whole = ask(tmp_path, "Well?", logprobs=True)
    assert (whole.text, whole.finish, whole.usage) == ("Yes .", "stop", {"input": 5, "output": 6})
    assert whole.logprobs is not None
    assert [token for token, _ in whole.logprobs] == [*"Yes ."]
    assert ask(tmp_path, "Well?", max_tokens=6).finish == "stop"
    cut = ask(tmp_path, "Well?", max_tokens=3)
    assert (cut.text, cut.finish, cut.usage["output"]) == ("Yes", "length", 3)


def test_every_end_token_of_the_folder_ends_an_answer(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?abc", "<end>")
    transformers.GenerationConfig(eos_token_id=[IDS["<end>"], IDS["c"]]).save_pretrained(tmp_path)
    assert ask(tmp_path, "?").text == "ab"
    transformers.GenerationConfig(eos_token_id=IDS["c"]).save_pretrained(tmp_path)
    assert ask(tmp_path, "?").text == "ab"


def test_the_context_bounds_prompt_and_answer(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?ab", "?", context=20)
    full = ask(tmp_path, "?" * 15)
    assert (full.text, full.finish) == ("ab?ab", "length")
    assert ask(tmp_path, "?" * 19).text == "a"
    with pytest.raises(RejectedQuestionError, match="20 tokens leaves no room for an answer in a context of 20"):
        ask(tmp_path, "?" * 20)
    with pytest.raises(RejectedQuestionError, match="empty prompt"):
        ask(tmp_path, "")


def test_the_chat_template_is_used(tmp_path: Path) -> None:
    """The answer shows the prompt: its length counts, and its last character leads to the first."""
    save_spelling(tmp_path, *"]ok", "<end>", template=CHATML)
    answer = ask(tmp_path, "Hi", system="Be brief.")
    assert (answer.text, answer.usage["input"]) == ("ok", len("[system]Be brief.\n[user]Hi\n[a]"))
    assert ask(tmp_path, "Hi").usage["input"] == len("[user]Hi\n[a]")


def test_without_a_template_the_prompt_is_plain(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?ok", "<end>")
    assert ask(tmp_path, "Well?", system="Be brief.").usage["input"] == len("Be brief.\n\nWell?")


def test_a_template_that_takes_no_system_prompt(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}?"
    save_spelling(tmp_path, *"?ok", "<end>", template=template)
    assert ask(tmp_path, "Hi").text == "ok"
    with pytest.raises(RejectedQuestionError, match="no system role: some take no system prompt"):
        ask(tmp_path, "Hi", system="Be brief.")


def test_reasoning_is_told_apart(tmp_path: Path) -> None:
    save_spelling(tmp_path, "?", "<think>", *"plan", "</think>", *"\nYes", "<end>")
    answer = ask(tmp_path, "?")
    assert (answer.text, answer.reasoning, answer.usage["output"]) == ("Yes", "plan", 11)
    with pytest.raises(GarbledAnswerError, match="raise max_tokens") as caught:
        ask(tmp_path, "?", max_tokens=4)
    assert (caught.value.cause, caught.value.is_worth_retrying) == ("only reasoning", False)


def test_reasoning_that_the_template_opens(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"\nplan", "</think>", *"Yes", "<end>", template=CHATML)
    answer = ask(tmp_path, "Hi", extra={"thinking": True})
    assert (answer.text, answer.reasoning) == ("Yes", "plan")
    with pytest.raises(GarbledAnswerError, match="raise max_tokens"):
        ask(tmp_path, "Hi", extra={"thinking": True}, max_tokens=3)


@pytest.mark.parametrize(("temperature", "seed", "again"), [(0.0, None, False), (0.1, 1, False), (0.1, None, True)])
def test_an_empty_answer_is_asked_again_where_chance_decides(
    temperature: float, seed: int | None, again: bool, tmp_path: Path
) -> None:
    save_spelling(tmp_path, *"? ", "<end>")
    with pytest.raises(GarbledAnswerError, match=r"an empty answer \(finish: 'stop'\)") as caught:
        ask(tmp_path, "?", temperature=temperature, seed=seed)
    assert caught.value.is_worth_retrying is again


def test_a_broken_model_says_so(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?ok", "<end>")
    model, _ = load(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, IDS["o"]] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(GarbledAnswerError, match="not finite: try another dtype"):
        ask(tmp_path, "?", temperature=1.0)


def test_cancelled_it_stops_and_takes_the_next(tmp_path: Path) -> None:
    limit = 100_000
    save_spelling(tmp_path, *"?ab", "?", context=2 * limit)
    teacher = make_teacher(tmp_path)
    passes = itertools.count()

    async def main() -> Answer:
        loop, started = asyncio.get_running_loop(), asyncio.Event()

        def count() -> None:
            if next(passes) == 3:
                loop.call_soon_threadsafe(started.set)

        with at_each_pass(count):
            endless = Question(prompt="?", temperature=0.0, max_tokens=limit)
            running, waiting = (asyncio.create_task(teacher.ask(endless)) for _ in range(2))
            await started.wait()
            running.cancel()
            waiting.cancel()
            results = await asyncio.gather(running, waiting, return_exceptions=True)
            assert [type(result) for result in results] == [asyncio.CancelledError] * 2
            answer = await teacher.ask(Question(prompt="?", temperature=0.0, max_tokens=3))
            await teacher.close()
        return answer

    assert asyncio.run(main()).text == "ab?"
    assert next(passes) < limit


def test_the_event_loop_stays_free(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?ok", "<end>")
    teacher = make_teacher(tmp_path)
    released = threading.Event()

    async def main() -> Answer:
        loop = asyncio.get_running_loop()

        def wait_for_loop() -> None:
            loop.call_soon_threadsafe(released.set)
            assert released.wait(60), "the event loop is blocked"

        with at_each_pass(wait_for_loop):
            answer = await teacher.ask(Question(prompt="?", temperature=0.0))
            await teacher.close()
        return answer

    assert asyncio.run(main()).text == "ok"


def test_out_of_memory_is_a_pause(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?ok", "<end>")
    with (
        at_each_pass(lambda: torch.empty(2**60) and None),  # torch's own words
        pytest.raises(UnavailableError, match="out of memory after a prompt of 1 tokens: lower") as caught,
    ):
        ask(tmp_path, "?")
    assert caught.value.__context__ is None  # it would keep alive what filled the memory
    assert ask(tmp_path, "?").text == "ok"


def test_other_failures_of_torch_are_defects(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?ok", "<end>")
    with at_each_pass(lambda: torch.empty(2).view(3) and None), pytest.raises(RuntimeError, match="shape") as caught:
        ask(tmp_path, "?")
    assert not isinstance(caught.value, TeacherError)


def test_closed_it_holds_no_model(tmp_path: Path) -> None:
    teacher = make_teacher(save_spelling(tmp_path, *"?ok", "<end>"))
    models: list[weakref.ref[Any]] = []

    async def main() -> None:
        await teacher.ask(Question(prompt="?", temperature=0.0))
        found = (thing for thing in gc.get_objects() if type(thing) is transformers.LlamaForCausalLM)
        models.extend(weakref.ref(model) for model in found if model.name_or_path == str(tmp_path))
        await teacher.close()

    asyncio.run(main())
    assert [model() for model in models] == [None]


def test_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path: Path) -> None:
    save_spelling(tmp_path, *"?ok", "<end>")
    model, _ = load(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    dtypes: list[torch.dtype] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, transformers.LlamaForCausalLM):
            dtypes.append(output.logits.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        texts = [ask(tmp_path, "?", max_tokens=1, dtype=dtype).text for dtype in ("auto", "float32")]
    finally:
        handle.remove()
    assert texts == ["o", "o"]
    assert dtypes == [torch.bfloat16, torch.float32]


def test_it_answers_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`foundry generate` with backend = "transformers": the same bytes whatever the concurrency."""
    model = save_random(tmp_path / "model")
    written = []
    for in_flight in (1, 8):
        settings = tmp_path / f"{in_flight}.toml"
        settings.write_text(
            f"[generate]\nin_flight = {in_flight}\n[seeds]\ncount = 6\n[[teacher]]\nname = 'hf/tiny'\nuse_seed = true\n"
            f"backend = 'transformers'\nmodel = '{model}'\nmax_tokens = 8\n"
        )
        out = tmp_path / f"{in_flight}.jsonl"
        assert foundry(["generate", str(settings), "--out", str(out)]) == 0
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert written[0].count(b'"hf/tiny"') == 6
