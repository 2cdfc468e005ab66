"""What a command says when it cannot do what was asked: one line, and an exit code."""

import re
import sys

from rope_probe.cli.output import tell

BAD_INPUT = 2
_NEEDS_LESS_MEMORY = {
    "trace": "a shorter --window, --no-control or --dtype bfloat16 needs less",
    "heads": "a shorter --window, fewer layers (--layer) or --dtype bfloat16 needs less",
    "spans": "a shorter --window, or no --states, needs less",
    "retrieval": "a shorter --window or --dtype bfloat16 needs less",
    "drift": "a shorter --window, fewer layers (--layer) or --dtype bfloat16 needs less",
    "distill": "a smaller batch_tokens or window, or a larger accumulate, needs less",
}


def refuse(why: str) -> int:
    """Say what is wrong; returns the exit code."""
    tell(f"error: {why}")
    return BAD_INPUT


def of_memory(error: BaseException) -> str:
    """What was asked for that memory did not have, and what would be smaller."""
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ \w+)", str(error))
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    remedy = _NEEDS_LESS_MEMORY.get(command, "something smaller is needed")
    return f"out of memory{f' when asked for {asked[1]}' if asked else ''}; {remedy}"
