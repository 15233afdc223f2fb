"""Asks a server through LiteLLM. Run by the clients' Python; not part of the tests' own process."""

import json
import sys
from typing import Any

import litellm

URL = sys.argv[1] + "/v1"
GIVEN = json.load(sys.stdin)
HOW: Any = {"api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": 64, "num_retries": 0}
TEXT: Any = {"model": "text-completion-openai/any", **HOW}
CHAT: Any = {"model": "openai/any", "messages": [{"role": "user", "content": GIVEN["question"]}], **HOW}

plain = litellm.text_completion(prompt=GIVEN["prompt"], **TEXT)
chunks = list(litellm.text_completion(prompt=GIVEN["fim"], stream=True, **TEXT))
chat = litellm.completion(**CHAT)
streamed = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **CHAT))
print(
    json.dumps(
        {
            "plain": plain.choices[0].text,
            "plain, finish": plain.choices[0].finish_reason,
            "plain, counts": plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens > 0,
            "suffix": litellm.text_completion(prompt=GIVEN["prefix"], suffix=GIVEN["suffix"], **TEXT).choices[0].text,
            "stream": "".join(chunk.choices[0].text or "" for chunk in chunks),
            "chat": chat.choices[0].message.content,
            "chat, stream": "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices),
        }
    )
)
