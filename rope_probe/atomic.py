"""Folders that are whole or not there: written under a temporary name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rope_probe.errors import InputError


@contextmanager
def whole_folder(out: str | os.PathLike[str], *, marker: str) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` when the block ends, and vanishes when it raises.

    `marker` is a file that every such folder holds: an older one at `out` is replaced, anything else there is not.
    Raises InputError when `out` is something else than such a folder, or cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{str(out)!r} exists and holds no {marker}, so it is not replaced; choose another folder")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {str(out.parent)!r}: {error.strerror}; choose a writable folder") from error
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
