"""Being asked to stop, by Ctrl-C or SIGTERM, and doing so between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """The signal that asked this process to stop; None as long as none did."""

    received: signal.Signals | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it, the first Ctrl-C or SIGTERM is only noted; a second one raises KeyboardInterrupt at once.

    Signals reach the main thread of a process alone, so elsewhere nothing is ever noted.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.received is not None:
            raise KeyboardInterrupt
        request.received = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
