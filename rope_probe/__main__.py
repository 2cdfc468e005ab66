"""`rope-probe`, and `python -m rope_probe`, as `accelerate launch -m rope_probe distill ...` runs it."""

import sys

from rope_probe.names import INTERRUPTED


def main() -> None:
    """Entry point; see `cli.main`. Ctrl-C ends it without a traceback while things are imported, too."""
    try:
        from rope_probe.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
