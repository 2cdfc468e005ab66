"""Exceptions that are no faults: what was asked for cannot be done, or was stopped on request."""

_LONGEST_REASON = 300


class InputError(ValueError):
    """Bad input from the user: a path, an option, a checkpoint or a tensor that does not fit.

    The message names the offending value and what would be right, on one line. The command line turns it into exit
    code 2; anything else that is raised is a fault of rope_probe and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Stopped(Exception):  # noqa: N818  (it is no error)
    """A run that can be gone on with was asked to stop, and did; the message says where it stands, and how to resume.

    The command line's exit code 4.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the CPU or of a device did not suffice."""
    of_torch = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return of_torch or isinstance(error, MemoryError) or "allocate memory" in str(error)


def reason(error: BaseException) -> str:
    """What somebody else's exception says, on one line of bearable length."""
    text = " ".join(str(error).split())
    text_shown = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
    return f"{type(error).__name__}: {text_shown}" if text_shown else type(error).__name__
