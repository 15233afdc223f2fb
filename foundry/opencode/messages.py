"""What an OpenCode server is asked and what it answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question and how it is to be answered."""

    text: str
    model: str
    """ "provider/model", as in the server's configuration."""
    agent: str = "foundry"
    system: str = ""
    """System prompt; empty: none is sent."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """More parts of the request that the vendor gets, e.g. {"seed": 1}."""

    def body(self) -> dict[str, Any]:
        """The message as the server takes it: settings travel in `system`, where our plugin finds them."""
        provider, _, model = self.model.partition("/")
        settings = {"system": self.system, "options": dict(self.options)}
        settings |= {
            key: value for key in ("temperature", "top_p", "max_tokens") if (value := getattr(self, key)) is not None
        }
        return {
            "agent": self.agent,
            "model": {"providerID": provider, "modelID": model},
            "system": json.dumps({"foundry": settings}, separators=(",", ":")),
            "parts": [{"type": "text", "text": self.text}],
        }


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said."""

    text: str
    reasoning: str
    finish: str
    """OpenCode's word: "stop", "length", "content-filter", "tool-calls", "unknown"."""
    usage: Mapping[str, int]
    """Tokens: input, output, reasoning, cache_read, cache_write."""
    cost: float
    """US dollars, by the prices in the server's configuration."""

    @classmethod
    def read(cls, answer: Any) -> Self:
        """The server's answer to a message. For another shape, whatever Python raises (KeyError, TypeError ...)."""
        info = answer["info"]
        words = {"text": "", "reasoning": ""}
        for part in answer["parts"]:
            if part["type"] in words and not part.get("ignored"):
                words[part["type"]] += part["text"]
        tokens = info.get("tokens") or {}
        counts = {key: tokens.get(key) for key in ("input", "output", "reasoning")}
        counts |= {f"cache_{key}": (tokens.get("cache") or {}).get(key) for key in ("read", "write")}
        return cls(
            **words,
            finish=str(info.get("finish") or "unknown"),
            usage={key: int(count) for key, count in counts.items() if count},
            cost=float(info.get("cost") or 0),
        )
