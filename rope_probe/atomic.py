"""Folders that are whole or not there: written under a temporary name, then renamed."""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rope_probe.errors import InputError

MARK = ".rope_probe"


def _is_ours(folder: Path, kind: str) -> bool:
    if not folder.is_dir():
        return False
    mark = folder / MARK
    return mark.read_text() == f"{kind}\n" if mark.is_file() else not any(folder.iterdir())


def _put_back(out: Path) -> None:
    """Undo a replacement that was cut short between its two renames."""
    if not out.exists():
        for aside in out.parent.glob(f".{glob.escape(out.name)}.old-*"):
            os.replace(aside, out)
            return


@contextmanager
def whole_folder(out: str | os.PathLike[str], *, kind: str) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` when the block ends; when it raises, nothing is left behind.

    A file `.rope_probe` in it says its `kind`. A folder of the same kind at `out` is replaced, anything else is not.
    Raises InputError, before the block runs, when `out` is something else or cannot be written.
    """
    try:
        out = Path(out).resolve()
        _put_back(out)
        if out.exists() and not _is_ours(out, kind):
            raise InputError(f"{str(out)!r} exists and is no {kind} of rope_probe's, so it is not replaced")
        absent = [parent for parent in out.parents if not parent.exists()]
        mine = secrets.token_hex(4)
        partial, aside = (out.with_name(f".{out.name}.{what}-{mine}") for what in ("partial", "old"))
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {str(out)!r}: {error.strerror}; choose a writable folder") from error
    try:
        (partial / MARK).write_text(f"{kind}\n")
        yield partial
        if out.exists():
            os.replace(out, aside)
        os.replace(partial, out)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in absent:
                parent.rmdir()
        raise
