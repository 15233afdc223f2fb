"""What passes between us and an OpenCode server."""

from foundry.opencode.messages import Prompt, Reply
