"""What passes between us and an OpenCode server."""

from foundry.opencode.messages import (
    ModelError,
    NoAnswerInTimeError,
    OpenCodeError,
    PasswordError,
    Prompt,
    Reply,
    ServerError,
    SetupError,
    UnreachableError,
    UnreadableError,
    read_error,
    read_reply,
    short,
)

__all__ = [
    "ModelError",
    "NoAnswerInTimeError",
    "OpenCodeError",
    "PasswordError",
    "Prompt",
    "Reply",
    "ServerError",
    "SetupError",
    "UnreachableError",
    "UnreadableError",
    "read_error",
    "read_reply",
    "short",
]
