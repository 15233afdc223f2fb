"""Asks a server through LangChain. Run by the clients' Python; not part of the tests' own process."""

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI

GIVEN = json.load(sys.stdin)
HOW: Any = {"base_url": sys.argv[1] + "/v1", "api_key": "none", "model": "any", "temperature": 0, "max_retries": 0}

text, chat = OpenAI(**HOW), ChatOpenAI(**HOW)
answer = chat.invoke(GIVEN["question"])
print(
    json.dumps(
        {
            "plain": text.invoke(GIVEN["prompt"]),
            "batch": text.batch([GIVEN["prompt"], GIVEN["fim"]]),
            "stop": text.invoke(GIVEN["prompt"], stop=["print"]),
            "stream": "".join(text.stream(GIVEN["fim"])),
            "chat": answer.content,
            "chat, counts": answer.usage_metadata["output_tokens"] > 0,
            "chat, stream": "".join(str(chunk.content) for chunk in chat.stream(GIVEN["question"])),
        }
    )
)
