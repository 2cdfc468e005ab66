"""A checkpoint's safetensors files: which tensor is in which, and that they hold numbers. Nothing is loaded.

A name is a path where it can only be one; only what can be nothing else than a hub id is asked of the hub.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rope_probe.errors import InputError

ABSENT_IS_NONE = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


def require_place(label: str) -> None:
    """Raises InputError unless `label` is a folder, or can be a hub id."""
    if Path(label).is_dir():
        return
    if is_path(label) or not _HUB_ID.fullmatch(label):
        raise InputError(f"no folder at {label!r}; give the folder of a Hugging Face checkpoint, or a hub id")


def is_path(label: str) -> bool:
    """Whether a name can only be a path: it begins like one, or its parent folder is here."""
    begins_like_one = label.startswith((".", "~", os.sep))
    return begins_like_one or (os.sep in label and Path(label).parent.exists())


def files_of_tensors(label: str) -> dict[str, str]:
    """The file that each tensor of a checkpoint is in; `label` is a folder or a hub id.

    Raises InputError for a checkpoint without safetensors files, for one that is corrupt or lacks what its index
    promises, and for an index that names other files than safetensors beside it.
    """
    single = find(label, SAFE_WEIGHTS_NAME)
    if single is not None:  # transformers looks for it first, too
        with opened(label, single) as file:
            return dict.fromkeys(file.keys(), single)
    index = find(label, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise InputError(f"checkpoint {label!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
    shard_of = _read_index(label, index)
    shards = {shard: find(label, shard) for shard in sorted(set(shard_of.values()))}
    if lost := [shard for shard, file in shards.items() if file is None]:
        raise InputError(f"checkpoint {label!r} lacks {lost[0]!r}, one of its {len(shards)} shards; copy it again")
    for shard, path in shards.items():
        with opened(label, str(path)) as file:
            inside = set(file.keys())
        promised = {name for name, holder in shard_of.items() if holder == shard}
        if absent := sorted(promised - inside):
            raise InputError(f"shard {shard!r} of {label!r} lacks the tensor {absent[0]!r} that its index promises")
        if unnamed := sorted(inside - promised):
            raise InputError(f"shard {shard!r} of {label!r} holds {unnamed[0]!r}, which its index does not name")
    return {name: str(shards[shard]) for name, shard in shard_of.items()}


def require_floats(label: str, files: dict[str, str]) -> None:
    """Raises InputError, naming the tensor, unless all are stored as floating-point numbers of 16 bits or more."""
    for path in sorted(set(files.values())):
        with opened(label, path) as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                require_float(repr(label), name, file.get_slice(name).get_dtype())


def require_float(label: str, name: str, dtype: str) -> None:
    """Raises InputError for a dtype, as safetensors or torch name it, that is no float of 16 bits or more."""
    if dtype not in _FLOATS:
        raise InputError(
            f"tensor {name!r} of {label} is stored as {dtype}, quantised or no weight; "
            "give a checkpoint in float32, bfloat16 or float16"
        )


@contextmanager
def opened(label: str, path: str) -> Iterator[Any]:
    """A safetensors file. Raises InputError, also for what is read within the block, where it is corrupt."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"weight file {Path(path).name!r} of {label!r} is corrupt: {error}; copy it again") from error


def find(label: str, file: str) -> str | None:
    """Where a file of a checkpoint is; None where there is none."""
    return cached_file(label, file, **ABSENT_IS_NONE)


def _read_index(label: str, index: str) -> dict[str, str]:
    try:
        shard_of = json.loads(Path(index).read_text())["weight_map"]
        named = list(shard_of.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{SAFE_WEIGHTS_INDEX_NAME} of {label!r} is no index of shards: it needs a weight_map from tensors to files"
        ) from error
    for shard in named:
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise InputError(
                f"{SAFE_WEIGHTS_INDEX_NAME} of {label!r} names {shard!r}; only safetensors files beside it are read"
            )
    return shard_of
