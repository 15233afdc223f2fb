"""What is behind the routes: our own engine, or llama.cpp's server (`llama_engine`)."""

from collections.abc import Callable, Sequence
from typing import Protocol

from smelter.decoding import Answer, Counts, Piece, Request


class AnyEngine(Protocol):
    """What is asked of either; `decoding.Engine` says more."""

    num_slots: int
    context: int
    counts: Counts

    @property
    def failure(self) -> str | None:
        """Why nothing can be asked any more."""

    @property
    def num_active(self) -> int:
        """Requests in work."""

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""

    def submit(self, requests: Sequence[Request], deliver: Sequence[Callable[[Piece], None]]) -> list[Answer]:
        """Take requests, all or none. Raises EngineBusy or EngineStopped."""

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Nobody waits for these any more."""
