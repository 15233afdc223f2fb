"""A prompt's log-probabilities (`echo` with `logprobs`) are told beside the answer, and do not change it."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from smelter.decoding.engine import Engine
from smelter.decoding.healing import take_back
from smelter.decoding.request import Request
from tests import tiny
from tests.decoding.test_engine import Asked, alone_ids, random_prompts
from tests.servers import running


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with running() as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.mark.parametrize(
    "prompt", ["import os\nimport te", "def f(x):\n    ", "i", "", "a\r\n  b", "x = 1\n" * 14 + "re"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_scoring_the_prompt_changes_no_answer(client: openai.OpenAI, prompt: str, stream: bool) -> None:
    """The last token is healed as without log-probabilities, and theirs are those of the prompt as it is encoded."""
    options: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**options).choices[0].text
    if stream:
        choices = [
            chunk.choices[0] for chunk in client.completions.create(**options, logprobs=1, echo=True, stream=True)
        ]
    else:
        choices = client.completions.create(**options, logprobs=1, echo=True).choices
    told = [choice.logprobs for choice in choices if choice.logprobs]
    assert "".join(choice.text for choice in choices) == prompt + answer
    tokens = [token for each in told for token in each.tokens or []]
    offsets = [offset for each in told for offset in each.text_offset or []]
    logprobs = [logprob for each in told for logprob in each.token_logprobs or []]
    ids = tiny.tokenizer().encode(prompt) or [tiny.tokenizer().eos_id]
    assert tokens[: len(ids)] == [tiny.tokenizer().decode([i]) for i in ids]
    assert offsets == sorted(offsets)
    model = tiny.model()
    with torch.no_grad():
        rows = model.logits(model(torch.tensor([ids])))[0].log_softmax(dim=-1)
    assert logprobs[0] is None
    assert logprobs[1 : len(ids)] == pytest.approx([float(rows[i, t]) for i, t in enumerate(ids[1:])], abs=1e-3)


def test_a_scored_prompt_is_read_in_pieces_and_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between others, that wait with it and write beside it: every answer as alone."""
    monkeypatch.setattr("smelter.decoding.engine.PREFILL_TOKENS", 16)
    engine = Engine(tiny.model(), tiny.tokenizer(), num_slots=5)  # not started: all wait
    prompts = [prompt[:size] for prompt, size in zip(random_prompts(5, seed=21), (50, 4, 4, 4, 50), strict=True)]
    requests = [Request(prompt, max_tokens=12) for prompt in prompts]
    for index in (0, 2, 4):
        ids, pending = take_back(tiny.tokenizer(), tiny.tokenizer().encode("x = 1\n" * 6 + "    "))
        requests[index] = Request(ids, pending, max_tokens=12, scored_ids=prompts[index])
    asked = [Asked(engine, request) for request in requests]
    engine.start()
    for each, request in zip(asked, requests, strict=True):
        expected = alone_ids(request.ids, pending=[request.pending], max_tokens=12)
        written = tiny.tokenizer().decode_bytes(expected)[len(request.pending) :]
        assert each.all().text == written.decode("utf-8", "replace") != ""
        assert [token.id for token in (each.pieces[0].prompt or ())] == list(request.scored_ids)
    engine.stop()
    assert engine.counts.prompt_tokens >= sum(map(len, prompts))
