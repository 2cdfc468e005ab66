"""Run directories, the only thing passed between stages: metrics.parquet, manifest.json and whatever else a run makes.

A run is written to a temporary folder beside its place and renamed when it is whole, so a folder under its final name
is complete, always. Nothing is pickled, and nothing here knows what was measured.
"""

import hashlib
import json
import os
import platform
import resource
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
from torch import Tensor
from transformers import PreTrainedModel

from rope_probe.atomic import whole_folder
from rope_probe.errors import InputError

METRICS, MANIFEST = "metrics.parquet", "manifest.json"
_TEXT, _WHOLE, _REAL = "string", "Int64", "float64"
SCHEMA = {
    "run_id": _TEXT,
    "experiment": _TEXT,
    "model": _TEXT,
    "seed": _WHOLE,
    "phase": _TEXT,
    "arm": _TEXT,
    "seq_len": _WHOLE,
    "document": _WHOLE,
    "position": _WHOLE,
    "distance": _WHOLE,
    "perturbation": _TEXT,
    "side": _TEXT,
    "delta_tokens": _REAL,
    "inject_layer": _WHOLE,
    "layer": _WHOLE,
    "site": _TEXT,
    "head": _WHOLE,
    "pair": _WHOLE,
    "wavelength": _REAL,
    "wavelength_after": _REAL,
    "metric": _TEXT,
    "value": _REAL,
    "value_float64": _REAL,
    "low": _REAL,
    "high": _REAL,
}
"""Columns of the tidy frame, in order. Where two checkpoints are compared, `wavelength` is a pair's in the first, and
`wavelength_after` in the second. `value_float64` is the float64 control of `value`; `low` and `high` are the ends
of its 95% confidence interval. A column that does not apply is null."""

_MANIFEST_KEYS = {"run_id", "experiment", "status", "config", "argv", "packages", "git", "wall_s"}
_PACKAGES = ("rope_probe", "torch", "transformers", "transformer-lens", "numpy", "pandas", "pyarrow", "safetensors")


def tidy(rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows in the schema's columns, order and types. Raises InputError for a column that the schema does not have."""
    frame = pd.DataFrame(rows)
    if unknown := [column for column in frame.columns if column not in SCHEMA]:
        raise InputError(f"column {unknown[0]!r} is not in the results schema; its columns are {', '.join(SCHEMA)}")
    return frame.reindex(columns=list(SCHEMA)).astype(SCHEMA)


class Run:
    """A run directory in the making; see `new_run`."""

    def __init__(self, folder: Path, experiment: str, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._experiment = experiment
        self.frames: list[pd.DataFrame] = []

    def record(self, frame: pd.DataFrame, **columns: Any) -> pd.DataFrame:
        """Add rows to metrics.parquet, run id, experiment and `columns` (model=..., seed=...) filled in."""
        filled = tidy(frame.assign(run_id=self.manifest["run_id"], experiment=self._experiment, **columns))
        self.frames.append(filled)
        return filled

    def _finish(self, started: float) -> None:
        tidy(pd.concat(self.frames) if self.frames else []).to_parquet(self.folder / METRICS, index=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.manifest |= {
            "wall_s": round(time.time() - started, 3),
            "peak_memory_bytes": peak,
            "peak_cuda_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "status": "complete",
        }
        _write_manifest(self.folder, self.manifest)


@contextmanager
def new_run(out: str | os.PathLike[str], experiment: str, config: Mapping[str, Any]) -> Iterator[Run]:
    """Make the run directory `out`: yields a Run whose `folder` is a temporary one, renamed to `out` on success.

    An older run at `out` is replaced, once the new one is whole. On any exception nothing is left behind.
    Raises InputError when `out` cannot be written, or is something else than a run.
    """
    with whole_folder(out, kind="run") as folder:
        started = time.time()
        run = Run(folder, experiment, _manifest(experiment, config))
        yield run
        run._finish(started)


@contextmanager
def open_run(
    out: str | os.PathLike[str], experiment: str, config: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Run]:
    """Make the run directory `out` in its own place, for jobs that may be cut short and gone on with.

    Its manifest says `running` until the block ends. When it raises, everything stays as it is, for `resume`; which
    begins anew where there is nothing yet. Raises InputError where there is a run already and it is not to be resumed,
    where it was started with another configuration, and when `out` cannot be written or is something else than a run.
    """
    out = Path(out)
    manifest = _manifest(experiment, config)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        manifest = _to_go_on(out, manifest, resume)
    else:
        with whole_folder(out, kind="run") as folder:
            _write_manifest(folder, manifest)
    started = time.time() - manifest.get("wall_s", 0.0)
    run = Run(out, experiment, manifest)
    try:
        yield run
    except BaseException:
        with suppress(OSError):
            _write_manifest(out, manifest | {"wall_s": round(time.time() - started, 3)})
        raise
    run._finish(started)


def _to_go_on(out: Path, manifest: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The manifest of the unfinished run at `out`, which is of the same configuration."""
    try:
        before = json.loads((out / MANIFEST).read_text())
        status, config = before["status"], before["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(out)!r} exists and is no run of rope_probe's, so it is not touched") from error
    if not resume:
        more = "is complete; choose another place, or remove it" if status == "complete" else "is not; resume it"
        raise InputError(f"there is a run at {str(out)!r} already, and it {more}")
    if apart := _first_difference(config, manifest["config"]):
        raise InputError(f"{str(out)!r} was started with another configuration: {apart}; resume it with the same one")
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


def read_run(run: str | os.PathLike[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Metrics and manifest of a complete run directory. Raises InputError for a folder that is not one.

    Columns that the schema has gained since the run was made are null.
    """
    run = Path(run)
    try:
        manifest = json.loads((run / MANIFEST).read_text())
        frame = pd.read_parquet(run / METRICS)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(run)!r} is not a readable run directory: {str(error).splitlines()[0]}") from error
    whole = isinstance(manifest, dict) and set(manifest) >= _MANIFEST_KEYS
    if not whole or not set(SCHEMA) >= set(frame.columns) >= {"run_id", "experiment", "metric", "value"}:
        raise InputError(f"{str(run)!r} is not a run directory of this version of rope_probe; run it again")
    if manifest["status"] != "complete":
        raise InputError(f"run {str(run)!r} is not complete; run it again")
    return tidy(frame), manifest


def read_frames(runs: Sequence[str | os.PathLike[str]]) -> pd.DataFrame:
    """Metrics of several complete run directories, one under the other. Raises InputError as `read_run` does."""
    return pd.concat([read_run(run)[0] for run in runs], ignore_index=True)


def is_complete(run: str | os.PathLike[str], config: Mapping[str, Any]) -> bool:
    """Whether `run` is a complete run of just this config, made by this version of rope_probe, so it can be reused."""
    try:
        manifest = json.loads((Path(run) / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return (
        isinstance(manifest, dict)
        and manifest.get("status") == "complete"
        and manifest.get("config") == json.loads(json.dumps(config, default=str))
        and manifest.get("packages", {}).get("rope_probe") == metadata.version("rope_probe")
    )


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """What a manifest says of a model: its rope parameters in full, dtype, and a hash of its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "model_type": model.config.model_type,
        "rope_parameters": dict(model.config.rope_parameters),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype),
        "weights_sha256": digest.hexdigest(),
    }


def hash_tokens(tokens: Tensor) -> str:
    """SHA-256 of token ids, whatever their integer type."""
    return hashlib.sha256(tokens.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


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
        "config": json.loads(json.dumps(config, default=str)),
        "argv": sys.argv,
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "git": _git(),
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
    def ask(*command: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
