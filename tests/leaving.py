"""How a test's process that is one of several ends."""

import os
import threading
from contextlib import suppress
from typing import Any

PATIENCE_S = 20.0


def leave(accelerator: Any) -> None:
    """End this process, when all is done and told.

    Now and then torch's threads abort in the interpreter's teardown, or a process waits for one that is gone already.
    """
    threading.Timer(PATIENCE_S, os._exit, (0,)).start()
    with suppress(Exception):
        accelerator.wait_for_everyone()
    os._exit(0)
