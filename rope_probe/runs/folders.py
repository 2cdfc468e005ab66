"""Folders that are whole or not there: written under a temporary name, then renamed. Nobody else's files are touched.

A file `.rope_probe` in each folder says what kind it is, and which files were written with it. From that, a later run
knows what it may replace: a folder of the same kind, as it was written.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rope_probe.errors import InputError

MARK = ".rope_probe"
LOCK = ".rope_probe.lock"
_PARTIAL, _ASIDE, _REMOVED = "partial", "old", "removed"
_RANDOM_BYTES = 4
_MAKING_S = 60.0
_HASHED_BYTES = 2**20


@contextmanager
def whole_folder(
    out: str | os.PathLike[str],
    *,
    kind: str,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out` when the block ends; when it raises, nothing is left behind.

    An empty folder at `out` is taken. With `overwrite`, an older folder of the same `kind` is replaced, if it holds
    only what was written with it; it stays aside until the new one is in place. `inputs` are paths that the work reads:
    `out` must not be or hold one of them. Where `out` turns out to be taken only at the end, the finished folder is
    kept under another name, which the error tells.

    Raises InputError, before the block runs, when `out` cannot be written or replaced; see above for the end.
    """
    target = _resolved(out)
    _refuse_inputs_inside(target, inputs)
    absent = [parent for parent in target.parents if not parent.exists()]
    own_name = secrets.token_hex(_RANDOM_BYTES)
    partial, aside = (target.with_name(f".{target.name}.{what}-{own_name}") for what in (_PARTIAL, _ASIDE))
    try:
        clean_up_after_killed(target)
        _refuse_what_is_there(target, kind, overwrite)
        _try_renaming(target, aside)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {str(target)!r}: {error.strerror}; choose a writable folder") from error
    try:
        with FileLock(partial / LOCK):
            write_mark(partial, kind)
            yield partial
            write_mark(partial, kind)  # with all that was written
            _sync(partial)
            _put_in_place(partial, target, aside, kind, overwrite)
            (target / LOCK).unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in absent:
                parent.rmdir()
        raise


def write_mark(folder: Path, kind: str) -> None:
    """Say what kind of folder this is, and which files it holds now."""
    files = {name: _fingerprint(folder / name) for name in sorted(_files(folder))}
    (folder / MARK).write_text(json.dumps({"kind": kind, "files": files}, indent=1) + "\n")


def kind_of(folder: Path) -> str | None:
    """The kind that a folder's mark says; None where there is no mark that can be read."""
    return None if (mark := _read_mark(folder)) is None else mark["kind"]


def clean_up_after_killed(target: Path) -> None:
    """Undo what a killed run left beside `target`: put back a folder that was set aside, remove half-written ones.

    Only folders under the temporary names made here are touched, and none that a living process is writing.
    """
    name = glob.escape(target.name)
    for aside in _temporary(target.parent, name, _ASIDE):
        if not target.exists():
            os.replace(aside, target)
        elif _changed_file(aside) is None:
            shutil.rmtree(aside, ignore_errors=True)
    for partial in _temporary(target.parent, name, _PARTIAL):
        _remove_unless_written(partial)


def clean_up_inside(folder: Path) -> None:
    """Remove what killed runs left in a folder of folders: half-written ones, and half-removed ones.

    For a process that is the only one to write there.
    """
    for partial in _temporary(folder, "*", _PARTIAL):
        _remove_unless_written(partial, alone=True)
    for removed in _temporary(folder, "*", _REMOVED):
        shutil.rmtree(removed, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder made here. It is never seen half there."""
    hidden = folder.with_name(f".{folder.name}.{_REMOVED}-{secrets.token_hex(_RANDOM_BYTES)}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def _remove_unless_written(partial: Path, *, alone: bool = False) -> None:
    """Remove a half-written folder that no living process holds.

    An empty one is of a process that was killed just after it was made, or of one that makes it right now. It goes when
    this process is `alone`, or when it is old.
    """
    if not any(partial.iterdir()):
        if alone or time.time() - partial.stat().st_mtime > _MAKING_S:
            partial.rmdir()
    elif (partial / LOCK).exists():
        with suppress(Timeout), FileLock(partial / LOCK, timeout=0):
            shutil.rmtree(partial, ignore_errors=True)


def _temporary(parent: Path, name: str, what: str) -> list[Path]:
    """Folders under the temporary names that whole_folder and remove_folder give; `name` is a pattern."""
    digits = "[0-9a-f]" * 2 * _RANDOM_BYTES
    folders = parent.glob(f".{name}.{what}-{digits}")
    return sorted(path for path in folders if path.is_dir() and not path.is_symlink())


def _resolved(out: str | os.PathLike[str]) -> Path:
    if not os.fspath(out):
        raise InputError("the folder to write has no name; give --out a path")
    try:
        return Path(out).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise InputError(f"{os.fspath(out)!r} is no path that can be written: {error}") from error


def _refuse_inputs_inside(target: Path, inputs: Sequence[str | os.PathLike[str]]) -> None:
    for given in inputs:
        if _lies_inside(given, target):
            raise InputError(
                f"{os.fspath(given)!r} is read for this and lies inside {str(target)!r}, so that is not replaced; "
                "choose another --out"
            )


def _lies_inside(given: str | os.PathLike[str], target: Path) -> bool:
    try:
        return Path(given).exists() and Path(given).resolve().is_relative_to(target)
    except (OSError, RuntimeError, ValueError):  # what cannot be resolved is told where it is read
        return False


def _refuse_what_is_there(target: Path, kind: str, overwrite: bool) -> None:
    """Raises InputError unless `target` is absent, empty, or may be replaced."""
    if why := _refusal(target, target, kind, overwrite):
        raise InputError(why)


def _refusal(folder: Path, target: Path, kind: str, overwrite: bool) -> str | None:
    """Why `folder`, which is at `target` or was set aside from there, may not be replaced; None where it may."""
    if not os.path.lexists(folder):
        return None
    where = repr(str(target))
    if not folder.is_dir():
        return f"{where} exists and is no folder; choose another --out"
    if not any(folder.iterdir()):
        return None
    kind_there = kind_of(folder)
    if kind_there is None:
        maker = "an older version of rope_probe" if (folder / MARK).exists() else "someone else"
        return f"{where} exists and was made by {maker}, so it is not replaced; remove it, or choose another --out"
    if kind_there != kind:
        return f"{where} exists and is a {kind_there}, not a {kind}, so it is not replaced; choose another --out"
    if changed := _changed_file(folder):
        return f"{where} {changed}, so it is not replaced; choose another --out, or remove it"
    if not overwrite:
        return f"there is a {kind} at {where} already; --overwrite replaces it, or choose another --out"
    return None


def _changed_file(folder: Path) -> str | None:
    """What is in a folder that was not written with it, or not so; None where it is as it was written."""
    mark = _read_mark(folder)
    if mark is None:
        return "was made by someone else"
    written, there = mark["files"], sorted(_files(folder))
    for name in there:
        if name not in written:
            return f"holds {name!r}, which was not written with it"
        if _fingerprint(folder / name) != written[name]:
            return f"holds {name!r}, which was changed since"
    gone = sorted(set(written) - set(there))
    return f"no longer holds {gone[0]!r}" if gone else None


def _fingerprint(file: Path) -> int | str:
    """A file's size, and its hash where that is quick; "" for what is no file."""
    if not file.is_file():
        return ""
    size = file.stat().st_size
    return size if size > _HASHED_BYTES else hashlib.sha256(file.read_bytes()).hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """Relative paths of all files in a folder, and of folders that hold none."""
    for where, folders, files in os.walk(folder):
        names = files if files or folders else ["."]
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in (*names, *links):
            path = Path(where, name).relative_to(folder).as_posix()
            if path not in (MARK, LOCK):
                yield path


def _read_mark(folder: Path) -> dict | None:
    try:
        mark = json.loads((folder / MARK).read_text())
        if isinstance(mark["kind"], str) and isinstance(mark["files"], dict):
            return mark
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _try_renaming(target: Path, aside: Path) -> None:
    """Find out now, before the work, that `target` can be renamed: a mount point cannot."""
    if not target.exists():
        return
    try:
        os.rename(target, aside)
    except OSError as error:
        raise InputError(
            f"{str(target)!r} is there and cannot be renamed ({error.strerror}), as a mount point cannot; "
            "choose a folder inside it"
        ) from error
    os.rename(aside, target)


def _put_in_place(partial: Path, target: Path, aside: Path, kind: str, overwrite: bool) -> None:
    """Rename `partial` to `target`, looking once more at what is there; keep it elsewhere where that may not be."""
    try:
        why = _refusal(target, target, kind, overwrite)
        if why is None and target.exists():
            os.replace(target, aside)
            if why := _refusal(aside, target, kind, overwrite):  # it may have changed between look and rename
                os.replace(aside, target)
        if why is None:
            os.replace(partial, target)
            _sync_folder(target.parent)
            shutil.rmtree(aside, ignore_errors=True)
            return
    except OSError as error:
        why = f"cannot write to {str(target)!r}: {error.strerror}"
        if aside.exists() and not target.exists():
            os.replace(aside, target)
    kept = target.with_name(f"{target.name}-{partial.name[-2 * _RANDOM_BYTES :]}")
    os.replace(partial, kept)
    (kept / LOCK).unlink(missing_ok=True)
    raise InputError(f"{why}. What was computed is kept at {str(kept)!r}")


def _sync(folder: Path) -> None:
    """Have all that a folder holds on the disk before its name is."""
    for where, _, files in os.walk(folder):
        for name in files:
            path = Path(where, name)
            if path.is_file() and not path.is_symlink():
                _sync_file(path)
        _sync_folder(Path(where))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    try:
        _sync_file(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some file systems sync no folders
            raise
