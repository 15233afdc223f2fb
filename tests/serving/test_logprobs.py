"""Log-probabilities in the older form, of /v1/completions: every token by a name of its own, at its place."""

import re
from collections.abc import Iterator

import openai
import pytest

from tests import tiny
from tests.servers import running


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as (found, _):
        yield found


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_logprobs(client: openai.OpenAI) -> None:
    prompt = tiny.tokenizer().encode("import os\n")
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0, logprobs=3, echo=True)
    told = found.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.top_logprobs is not None
    assert told.token_logprobs is not None
    assert told.text_offset is not None
    assert "".join(told.tokens[: len(prompt)]) == "import os\n"
    assert told.token_logprobs[0] is None
    for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[
        len(prompt) :
    ]:
        assert logprob == max(top.values()) == pytest.approx(top[token])
    assert told.text_offset == sorted(told.text_offset)


def test_parts_of_characters_have_names_of_their_own(client: openai.OpenAI) -> None:
    """As with OpenAI: one name for all of them would leave of several likeliest tokens one."""
    found = client.completions.create(model="tiny", prompt="f(\n", max_tokens=24, temperature=0, logprobs=20)
    told = found.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.top_logprobs is not None
    assert {len(top) for top in told.top_logprobs} == {20}
    names = [name for top in told.top_logprobs for name in top]
    assert sum(name.startswith("bytes:") for name in names) > 20
    assert all(re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", name) for name in names if name.startswith("bytes:"))
    assert "\ufffd" not in "".join(names + told.tokens)
    for token, logprob, top in zip(told.tokens, told.token_logprobs or [], told.top_logprobs, strict=True):
        assert logprob == pytest.approx(top[token])


def test_streamed_logprobs_have_offsets_that_go_on(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="import ", max_tokens=12, temperature=0, logprobs=1, stream=True
    )
    text, offsets = "", []
    for chunk in stream:
        choice = chunk.choices[0]
        if choice.logprobs and choice.logprobs.text_offset:
            offsets += choice.logprobs.text_offset
        text += choice.text
    assert offsets == sorted(offsets)
    assert len(offsets) > 8
    assert offsets[-1] < len(text)
