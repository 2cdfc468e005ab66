"""Run directories, the only thing passed between stages: tables/NAME.parquet, manifest.json and what else a run makes.

A run is written to a temporary folder beside its place and renamed when it is whole, so a folder under its final name
is complete, always. Nothing is pickled, and nothing here knows what was measured.
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from rope_probe.errors import InputError, reason
from rope_probe.runs.folders import MARK, whole_folder
from rope_probe.runs.provenance import Provenance
from rope_probe.runs.tables import TABLES, Table, Tables

TABLES_FOLDER, MANIFEST = "tables", "manifest.json"
WRITER = ".writer"
"""File in a running run that says who writes to it."""
KEEP_TIME_EVERY_S = 1.0
_MANIFEST_TYPES: dict[str, tuple[type, ...]] = {
    "run_id": (str,),
    "experiment": (str,),
    "status": (str,),
    "config": (dict,),
    "argv": (list,),
    "packages": (dict,),
    "git": (dict, type(None)),
    "wall_s": (int, float),
    "tables": (dict,),
}
"""What a manifest holds at least, and as what."""
_PACKAGES = ("rope_probe", "torch", "transformers", "transformer-lens", "numpy", "pandas", "pyarrow", "safetensors")


class Run:
    """A run directory in the making; see `new_run` and `open_run`.

    `provenance` is what it is made from: models and what they read. It becomes a part of the manifest.
    """

    def __init__(self, folder: Path, experiment: str, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.provenance = Provenance()
        self._experiment = experiment
        self._recorded: dict[str, list[pd.DataFrame]] = {}
        self._started = time.monotonic()
        self._wall_before = float(manifest.get("wall_s", 0.0))
        self._kept_time = self._started

    def record(self, table: Table, rows: pd.DataFrame | Sequence[Mapping[str, Any]], **columns: Any) -> pd.DataFrame:
        """Add rows to a table, run id, experiment and `columns` (model=..., seed=...) filled in; returns them so.

        Raises InputError for columns and metrics that the table does not have.
        """
        keys = {"run_id": self.manifest["run_id"], "experiment": self._experiment}
        filled = table.frame(pd.DataFrame(rows).assign(**keys, **columns))
        self._recorded.setdefault(table.name, []).append(filled)
        return filled

    def keep_time(self, *, at_once: bool = False) -> None:
        """Write the wall time so far into the manifest, if the last time is a while ago or it is to be now."""
        now = time.monotonic()
        if at_once or now - self._kept_time >= KEEP_TIME_EVERY_S:
            self._kept_time = now
            _write_manifest(self.folder, self.manifest | {"wall_s": self._wall_s()})

    def finish(self) -> None:
        """Write the tables and the complete manifest."""
        folder = self.folder / TABLES_FOLDER
        folder.mkdir(exist_ok=True)
        rows = {}
        for name, frames in self._recorded.items():
            table = pd.concat(frames, ignore_index=True)
            with (folder / f"{name}.parquet").open("wb") as file:  # a path of no UTF-8 is none to parquet
                table.to_parquet(file, index=False)
            rows[name] = len(table)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.manifest |= self.provenance.as_manifest()
        self.manifest |= {
            "tables": rows,
            "wall_s": self._wall_s(),
            "peak_memory_bytes": peak,
            "peak_cuda_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "status": "complete",
        }
        _write_manifest(self.folder, self.manifest)

    def _wall_s(self) -> float:
        """Seconds that all sessions of this run took."""
        return round(self._wall_before + time.monotonic() - self._started, 3)


@contextmanager
def new_run(
    out: str | os.PathLike[str],
    experiment: str,
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Run]:
    """Make the run directory `out`: yields a Run whose `folder` is a temporary one, renamed to `out` on success.

    With `overwrite`, an older run of the same experiment at `out` is replaced, once the new one is whole. `inputs` are
    paths that are read for it. On any exception nothing is left behind. Raises InputError as `whole_folder` does: when
    `out` cannot be written, is something else, or holds what the older run did not write.
    """
    with whole_folder(out, kind=_kind(experiment), overwrite=overwrite, inputs=inputs) as folder:
        run = Run(folder, experiment, _manifest(experiment, config))
        yield run
        run.finish()


@contextmanager
def open_run(
    out: str | os.PathLike[str],
    experiment: str,
    config: Mapping[str, Any],
    *,
    inputs: Mapping[str, Any],
    resume: bool = False,
) -> Iterator[Run]:
    """Make the run directory `out` in its own place, for jobs that may be cut short and gone on with.

    Its manifest says `running` until the block ends. When it raises, everything stays as it is, for `resume`; unless
    nothing was done yet, and then nothing is left behind. A resumption begins anew where there is nothing. `inputs` are
    hashes of what is read, by name: a run is gone on with only if they are the same. One process at a time writes.

    Raises InputError where there is a run already and it is not to be resumed, where it was started with another
    configuration or other inputs, where another process writes to it, and when `out` cannot be written or is something
    else than a run.
    """
    manifest = _manifest(experiment, config) | {"inputs": _as_json(inputs)}
    if _is_taken(out):
        _to_go_on(Path(out), manifest, resume)
    else:
        with whole_folder(out, kind=_kind(experiment)) as folder:
            _write_manifest(folder, manifest)
    out = Path(out)
    with one_writer(out):
        run = Run(out, experiment, _to_go_on(out, manifest, resume))
        try:
            yield run
        except BaseException:
            with suppress(OSError):
                run.keep_time(at_once=True)
                if _is_bare(out):
                    shutil.rmtree(out)
            raise
        run.finish()


@contextmanager
def one_writer(run: Path) -> Iterator[None]:
    """Within it, this process alone writes to a run directory.

    The lock ends with the process, however that ends. Raises InputError, naming process and host, where another holds
    it.
    """
    lock = FileLock(run / WRITER, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{str(run)!r} is being written by {_writer(run)}; wait for it, or stop it") from error
    try:
        (run / WRITER).write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}) + "\n")
        yield
        (run / WRITER).unlink(missing_ok=True)
    finally:
        lock.release()


def _writer(run: Path) -> str:
    try:
        writer = json.loads((run / WRITER).read_text())
        return f"process {writer['process']} on {writer['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _is_bare(run: Path) -> bool:
    """Whether nothing was done in a run that was opened: it holds no more than `open_run` wrote, and an empty log."""
    own = {MARK, MANIFEST, WRITER}
    return all(path.name in own or (path.suffix == ".jsonl" and not path.stat().st_size) for path in run.iterdir())


def _is_taken(out: str | os.PathLike[str]) -> bool:
    """Whether something is at `out` that a run cannot simply be made in."""
    place = Path(out)
    try:
        return place.exists() and not (place.is_dir() and not any(place.iterdir()))
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(out)!r}: {error.strerror}; choose another place") from error


def _read_manifest_to_go_on(out: Path) -> dict[str, Any]:
    try:
        before = _read_manifest(out)
    except InputError as error:
        raise InputError(f"{str(out)!r} exists and is no run of rope_probe's, so it is not touched") from error
    whole = isinstance(before, dict) and {"status", "config", "run_id", "experiment"} <= before.keys()
    if not whole or not isinstance(before.get("wall_s", 0.0), float | int):
        raise InputError(f"the manifest of {str(out)!r} is not as rope_probe wrote it, so it is not touched")
    return before


def _to_go_on(out: Path, manifest: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The manifest of the unfinished run at `out`, which is of the same configuration and inputs."""
    before = _read_manifest_to_go_on(out)
    if before["run_id"] == manifest["run_id"]:  # made just now
        return before
    if not resume:
        complete = before["status"] == "complete"
        more = "is complete; choose another place, or remove it" if complete else "is not; resume it"
        raise InputError(f"there is a run at {str(out)!r} already, and it {more}")
    if before["experiment"] != manifest["experiment"]:
        raise InputError(f"{str(out)!r} is a {_kind(str(before['experiment']))}, not a {_kind(manifest['experiment'])}")
    if apart := _first_difference(before["config"], manifest["config"]):
        raise InputError(f"{str(out)!r} was started with another configuration: {apart}; resume it with the same one")
    if apart := _first_difference(before.get("inputs", {}), manifest["inputs"]):
        raise InputError(f"{str(out)!r} was started with other inputs: {apart}; resume it with the same ones")
    return before | {"status": "running"}


def _first_difference(before: Any, now: Any, key: str = "") -> str | None:
    """Where two configurations differ first; None where they do not."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = [(before.get(k), now.get(k), f"{key}.{k}" if key else k) for k in {**before, **now}]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inner = [(a, b, f"{key}.{i}") for i, (a, b) in enumerate(zip(before, now, strict=True))]
    else:
        return None if before == now else f"{key} was {before!r} and is {now!r}"
    return next((apart for one in inner if (apart := _first_difference(*one))), None)


def read_run(run: str | os.PathLike[str]) -> tuple[Tables, dict[str, Any]]:
    """Tables and manifest of a complete run directory. Raises InputError for a folder that is not one.

    Columns that a table has gained since the run was made are null. A table that nobody here declares is as stored.
    """
    run = Path(run)
    manifest = _read_complete_manifest(run)
    return Tables({name: _read_table(run, name) for name in manifest["tables"]}), manifest


def read_manifest(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a complete run directory, without its tables. Raises InputError as `read_run` does."""
    return _read_complete_manifest(Path(run))


def read_tables(runs: Sequence[str | os.PathLike[str]]) -> Tables:
    """Tables of several complete run directories, one under the other. Raises InputError as `read_run` does."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for run in runs:
        for name, frame in read_run(run)[0].items():
            parts.setdefault(name, []).append(frame)
    return Tables({name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()})


def _read_complete_manifest(run: Path) -> dict[str, Any]:
    manifest = _read_manifest(run)
    if not isinstance(manifest, dict) or not set(manifest) >= set(_MANIFEST_TYPES):
        raise InputError(f"{str(run)!r} is not a run directory of this version of rope_probe; run it again")
    for key, kinds in _MANIFEST_TYPES.items():
        if not isinstance(manifest[key], kinds) or isinstance(manifest[key], bool):
            raise InputError(f"{key} in the manifest of {str(run)!r} is {manifest[key]!r}, not as a run writes it")
    if manifest["status"] != "complete":
        raise InputError(f"run {str(run)!r} is not complete; run it again")
    if odd := [name for name in manifest["tables"] if not name.isidentifier()]:
        raise InputError(f"the manifest of {str(run)!r} names a table {odd[0]!r}, which no run writes")
    return manifest


def _read_manifest(run: Path) -> Any:
    try:
        return json.loads((run / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(run)!r} is not a readable run directory: {reason(error)}") from error


def _read_table(run: Path, name: str) -> pd.DataFrame:
    file = run / TABLES_FOLDER / f"{name}.parquet"
    try:
        with file.open("rb") as stored:  # a folder of that name would be read as a data set
            frame = pd.read_parquet(stored)
    except Exception as error:  # a file can be wrong in as many ways as parquet has parts
        raise InputError(f"{str(run)!r} is not a readable run directory: {reason(error)}") from error
    if name not in TABLES:
        return frame
    try:
        return TABLES[name].read(frame)
    except InputError as error:
        raise InputError(f"table {name!r} of {str(run)!r} is not as a run writes it: {error}") from error


def source_hash(script: Path | None) -> str:
    """SHA-256 over the package's Python files, and those of the script that uses it."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files if script is None else [*files, script]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _running_script() -> Path | None:
    """The script that this process runs, where it is no part of the package."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    package = Path(__file__).resolve().parents[1]
    if main is None or not Path(main).is_file() or Path(main).suffix != ".py":
        return None
    return None if Path(main).resolve().is_relative_to(package) else Path(main)


def is_complete(run: str | os.PathLike[str], config: Mapping[str, Any], *, sources: str | None = None) -> bool:
    """Whether `run` is a complete run of just this config, made by this version of rope_probe, so it can be reused.

    With `sources`, a `source_hash`, only if it was made by those.
    """
    try:
        manifest = _read_manifest(Path(run))
    except InputError:
        return False
    return (
        isinstance(manifest, dict)
        and manifest.get("status") == "complete"
        and manifest.get("config") == _as_json(config)
        and isinstance(packages := manifest.get("packages"), dict)
        and packages.get("rope_probe") == metadata.version("rope_probe")
        and (sources is None or manifest.get("sources_sha256") == sources)
        and isinstance(tables := manifest.get("tables"), dict)
        and all((Path(run) / TABLES_FOLDER / f"{name}.parquet").is_file() for name in tables)
    )


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    partial = folder / f".{MANIFEST}"
    partial.write_text(json.dumps(manifest, indent=2, default=str) + "\n")
    os.replace(partial, folder / MANIFEST)


def _manifest(experiment: str, config: Mapping[str, Any]) -> dict[str, Any]:
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return {
        "run_id": f"{experiment}-{started}-{os.urandom(3).hex()}",
        "experiment": experiment,
        "status": "running",
        "tables": {},
        "config": _as_json(config),
        "argv": sys.argv,
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "git": _git(),
        "sources_sha256": source_hash(_running_script()),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """The commit of the project's own checkout; None where the package is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]

    def ask(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None  # the repository around an environment's site-packages says nothing of this code
        ask("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _kind(experiment: str) -> str:
    """What the mark of a run's folder says."""
    return f"{experiment} run"


def _as_json(value: Any) -> Any:
    """A value as it comes back from a manifest."""
    return json.loads(json.dumps(value, default=str))
