"""A checkpoint's files: where they are, which tensor is in which, and that they hold numbers. Nothing is loaded.

- A label is a folder of safetensors files, a GGUF file, the name of a pretrained model, or a hub id.
- A label is a path where it can only be one; only what can be nothing else than a hub id is asked of the hub.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rope_probe.errors import InputError
from rope_probe.models import pretrained
from rope_probe.models.gguf_files import ENDING, is_gguf

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ABSENT_IS_NONE = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


def place_of(label: str, *, accept_terms: bool = False) -> str:
    """Where a label's files are: a folder, a GGUF file, or a hub id. The name of a pretrained model becomes its file.

    Raises InputError for a path where nothing is, for a file that is no GGUF file, for the folder of an adapter, which
    is no model by itself, and as `pretrained.file_of` does.
    """
    if pretrained.is_name(label):
        return os.fspath(pretrained.file_of(label, accept_terms=accept_terms))
    path = Path(label)
    if path.is_dir():
        _require_model(label)
        return label
    if path.is_file():
        if not is_gguf(label):
            raise InputError(f"{label!r} is a file, but no GGUF file by its name; give the folder it is in, or a .gguf")
        return label
    if is_gguf(label):
        raise InputError(f"no file at {label!r}; give the path of a GGUF file, or the folder of a checkpoint")
    if is_path(label) or not _HUB_ID.fullmatch(label):
        raise InputError(f"no folder at {label!r}; give the folder of a Hugging Face checkpoint, or a hub id")
    return label


def _require_model(folder: str) -> None:
    """Raises InputError for a folder that has something else where a checkpoint has its config."""
    inside = Path(folder)
    if (inside / CONFIG_NAME).exists():
        return
    if is_adapter(folder):
        raise InputError(f"{folder!r} is an adapter, not a model; load its base model with adapter={folder!r}")
    if files := sorted(inside.glob(f"*{ENDING}")):
        raise InputError(f"{folder!r} has no {CONFIG_NAME}, but holds GGUF files; give one of them: {str(files[0])!r}")


def is_adapter(place: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter of PEFT, and no model."""
    return Path(place, ADAPTER_CONFIG).is_file() and not Path(place, CONFIG_NAME).exists()


def as_transformers_takes(place: str) -> tuple[str, dict[str, str]]:
    """A place as the two arguments of `from_pretrained`: a folder or hub id, and the GGUF file in it."""
    if not is_gguf(place):
        return place, {}
    return os.path.dirname(os.path.abspath(place)), {"gguf_file": os.path.basename(place)}


def is_path(label: str) -> bool:
    """Whether a name can only be a path: it begins like one, or its parent folder is here."""
    begins_like_one = label.startswith((".", "~", os.sep))
    return begins_like_one or (os.sep in label and Path(label).parent.exists())


def files_of_tensors(label: str, revision: str | None = None) -> dict[str, str]:
    """The file that each tensor of a checkpoint is in; `label` is a folder or a hub id, `revision` one of the latter.

    Raises InputError for a checkpoint without safetensors files, for one that is corrupt or lacks what its index
    promises, and for an index that names other files than safetensors beside it.
    """
    single = find(label, SAFE_WEIGHTS_NAME, revision)
    if single is not None:  # transformers looks for it first, too
        with opened(label, single) as file:
            return dict.fromkeys(file.keys(), single)
    index = find(label, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        raise InputError(f"checkpoint {label!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
    shard_of = _read_index(label, index)
    shards = {shard: find(label, shard, revision) for shard in sorted(set(shard_of.values()))}
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


def find(label: str, file: str, revision: str | None = None) -> str | None:
    """Where a file of a checkpoint is; None where there is none."""
    return cached_file(label, file, revision=revision, **ABSENT_IS_NONE)


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
