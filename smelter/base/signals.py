"""What asks a program to end: Ctrl-C, SIGTERM, and SIGHUP, which comes when the terminal is closed.

Whoever has nothing to finish ends by an exception, so that what is half written is removed and what is locked is given
back. Under `nohup` SIGHUP is ignored, and stays so.
"""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """SIGTERM or SIGHUP came: not an error, and nothing that catches errors may keep it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return tuple(n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def left_alone(number: int) -> None:
    """After SIGHUP the terminal is gone or going, and writing to it an error: what is said from now on is dropped."""
    if number != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed already
            # A terminal that is gone no longer says that it is one, but still is no file and no pipe.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped` in the block, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        left_alone(number)
        raise Stopped(number)

    ours = [number for number in stop_signals() if number != signal.SIGINT]
    previous = {number: signal.signal(number, handle) for number in ours}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
