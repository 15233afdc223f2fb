"""Asks a server with OpenAI's Python package. Run by the clients' Python; not part of the tests' own process."""

import asyncio
import json
import sys
from typing import Any

import openai

URL = sys.argv[1] + "/v1"
GIVEN = json.load(sys.stdin)
CHAT: Any = [{"role": "user", "content": GIVEN["question"]}]
GREEDY: Any = {"model": "any", "temperature": 0}


def completions(client: openai.OpenAI) -> dict[str, Any]:
    """/v1/completions in the forms that the package has."""
    ask = client.completions.create
    plain = ask(prompt=GIVEN["prompt"], max_tokens=64, **GREEDY)
    limited = ask(prompt=GIVEN["prompt"], max_tokens=2, **GREEDY)
    beyond = ask(prompt=GIVEN["prompt"], max_tokens=1_000_000, **GREEDY)
    stopped = ask(prompt=GIVEN["prompt"], max_tokens=64, stop=["print"], **GREEDY)
    several = ask(prompt=[GIVEN["prompt"], GIVEN["fim"]], max_tokens=64, n=2, **GREEDY)
    chunks = list(
        ask(prompt=GIVEN["fim"], max_tokens=64, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    usage = [chunk.usage for chunk in chunks if chunk.usage][-1]
    return {
        "plain": plain.choices[0].text,
        "plain, model": plain.model,
        "plain, finish": plain.choices[0].finish_reason,
        "plain, total": plain.usage.total_tokens - plain.usage.prompt_tokens - plain.usage.completion_tokens,
        "limited": limited.choices[0].text,
        "limited, finish": limited.choices[0].finish_reason,
        "limited, tokens": limited.usage.completion_tokens,
        "beyond": beyond.choices[0].text,
        "stopped": stopped.choices[0].text,
        "several": [choice.text for choice in several.choices],
        "several, indices": [choice.index for choice in several.choices],
        "ids": ask(prompt=GIVEN["ids"], max_tokens=64, **GREEDY).choices[0].text,
        "tokens in the prompt": ask(prompt=GIVEN["fim"], max_tokens=64, **GREEDY).choices[0].text,
        "suffix": ask(prompt=GIVEN["prefix"], suffix=GIVEN["suffix"], max_tokens=64, **GREEDY).choices[0].text,
        "stream": "".join(chunk.choices[0].text for chunk in chunks if chunk.choices),
        "stream, finish": [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1],
        "stream, tokens": usage.completion_tokens,
    }


def chat(client: openai.OpenAI) -> dict[str, Any]:
    """/v1/chat/completions."""
    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **GREEDY)
    chunks = list(client.chat.completions.create(messages=CHAT, stream=True, **GREEDY))
    content = answer.choices[0].logprobs.content
    return {
        "chat": answer.choices[0].message.content,
        "chat, role": answer.choices[0].message.role,
        "chat, finish": answer.choices[0].finish_reason,
        "chat, logprobs": "".join(token.token for token in content),
        "chat, sure": min(token.logprob for token in content) > -0.1,
        "chat, alternatives": {len(token.top_logprobs) for token in content} == {2},
        "chat, stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    }


def mistakes(client: openai.OpenAI) -> dict[str, Any]:
    """Which exception the package makes of an answer that is none."""
    found = {}
    for name, values in {
        "too long": {"prompt": GIVEN["ids"] * 100},
        "no prompt": {"prompt": None},
        "text for a number": {"prompt": "a", "temperature": "warm"},
    }.items():
        try:
            client.completions.create(model="any", **values)
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, bool(error.message)]
    return {"mistakes": found}


async def together() -> dict[str, Any]:
    """Eight requests at once."""
    async with openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0) as client:
        tasks = [client.completions.create(prompt=GIVEN["fim"], max_tokens=64, **GREEDY) for _ in range(8)]
        return {"together": [answer.choices[0].text for answer in await asyncio.gather(*tasks)]}


with openai.OpenAI(base_url=URL, api_key="none", max_retries=0) as client:
    models = {"models": [model.id for model in client.models.list()]}
    print(json.dumps(models | completions(client) | chat(client) | mistakes(client) | asyncio.run(together())))
