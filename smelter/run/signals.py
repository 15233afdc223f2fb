"""Ctrl-C, SIGTERM and SIGHUP as a request: long work ends at a safe place, and the same command goes on there."""

import signal
from types import FrameType
from typing import Any

from smelter.base import left_alone, stop_signals
from smelter.run.distributed import print0


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop (`number` is set); the second acts at once."""

    def __init__(self, answer: str) -> None:
        """`answer` is said when the request comes: what is finished first."""
        self.number = 0
        self._answer = answer
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for stopping, handler in self._previous.items():
            signal.signal(stopping, handler)
        left_alone(number)
        print0(f"\n{signal.Signals(number).name}: {self._answer} (again: stop at once)")
