"""GGUF files, the format of llama.cpp: that they are whole, and transformers' reading of them in bearable time."""

import math
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np

from rope_probe.errors import InputError

ENDING = ".gguf"


def is_gguf(place: str) -> bool:
    """Whether a place is a GGUF file, by its name."""
    return place.lower().endswith(ENDING)


def require_whole(label: str, path: str) -> None:
    """Raises InputError for a GGUF file that is none, or is shorter than its own header says."""
    if not os.path.getsize(path):
        raise InputError(f"GGUF file {label!r} is empty; copy it again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"GGUF":
            raise InputError(f"{label!r} is no GGUF file: it does not begin with 'GGUF'")
        try:
            promised = _GgufHeader(content).size
        except (struct.error, KeyError, ValueError, OverflowError) as error:
            raise InputError(f"GGUF file {label!r} is truncated or corrupt, in its header; copy it again") from error
        if len(content) < promised:
            raise InputError(
                f"GGUF file {label!r} is truncated: it has {len(content):,} bytes, but its header promises "
                f"{promised:,}; copy it again"
            )


class _GgufHeader:
    """Reads a GGUF file's header, to find how long the file must be.

    The layout is the GGUF specification's: magic, version, two counts, entries of metadata, then for each tensor its
    name, dimensions, type, and where its data begin.
    """

    _SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # noqa: RUF012
    _TEXT, _ARRAY = 8, 9

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._next = content, 4
        version, tensors, entries = self._take("IQQ")
        if version not in (2, 3):
            raise struct.error(f"version {version}")
        alignment = 32
        for _ in range(entries):
            name = self._text()
            value = self._value(self._take("I")[0])
            alignment = value if name == b"general.alignment" else alignment
        end = 0
        for _ in range(tensors):
            self._text()
            (dimensions,) = self._take("I")
            shape = self._take(f"{dimensions}Q")
            kind, offset = self._take("IQ")
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            end = max(end, offset + math.prod(shape) // per_block * block_bytes)
        self.size = -(-self._next // alignment) * alignment + end

    def _take(self, layout: str) -> tuple:
        values = struct.unpack_from(f"<{layout}", self._content, self._next)
        self._next += struct.calcsize(f"<{layout}")
        return values

    def _text(self) -> bytes:
        (length,) = self._take("Q")
        if self._next + length > len(self._content):
            raise struct.error("text beyond the end")
        text = self._content[self._next : self._next + length]
        self._next += length
        return text

    def _value(self, kind: int) -> Any:
        """A number of the metadata; None for what is none."""
        if kind in self._SCALARS:
            return self._take(self._SCALARS[kind])[0]
        if kind == self._TEXT:
            self._text()
            return None
        if kind != self._ARRAY:
            raise KeyError(kind)
        inner, count = self._take("IQ")
        if inner in self._SCALARS:
            self._next += count * struct.calcsize(f"<{self._SCALARS[inner]}")
        else:
            for _ in range(count):
                self._value(inner)
        return None


class _Reader(gguf.GGUFReader):
    """gguf's reader, ten times as fast on vocabularies.

    It has the file as a plain array, since slices of numpy's memmap take long, and reads arrays in one loop.
    """

    @property
    def data(self) -> Any:
        """The file's bytes."""
        return self._plain

    @data.setter
    def data(self, mapped: Any) -> None:
        self._plain = np.asarray(mapped)
        self._content = memoryview(mapped)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Bytes, parts, which parts are values, and types of an entry, as gguf's reader has them."""
        array, text = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
        kind, count = struct.unpack_from("<IQ", self._content, orig_offs) if raw_type == array else (None, 0)
        number = self.gguf_scalar_to_np.get(kind)
        if count == 0 or (kind != text and number is None):
            return super()._get_field_parts(orig_offs, raw_type)
        parts = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        start = end = orig_offs + 12
        if number is not None:
            end = start + count * np.dtype(number).itemsize
            numbers = self._plain[start:end].view(number)
            parts += [numbers[i : i + 1] for i in range(count)]
            return end - orig_offs, parts, list(range(2, 2 + count)), [array, gguf.GGUFValueType(kind)]
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self._content, end)
            parts += [self._plain[end : end + 8].view(np.uint64), self._plain[end + 8 : end + 8 + length]]
            end += 8 + length
        return end - orig_offs, parts, list(range(3, 3 + 2 * count, 2)), [array, text]


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Within it, transformers reads a GGUF file in bearable time and without a bar; other places as ever.

    By itself it would parse the header anew for config, weights and tokenizer, and make its map of names anew for every
    module of the model: a small model would take longer to load than to trace.
    """
    if not is_gguf(place):
        yield
        return
    import transformers.modeling_gguf_pytorch_utils as transformers_gguf  # half a second

    name_map = cache(gguf.get_tensor_name_map)
    with ExitStack() as patched:
        patched.enter_context(patch.object(gguf, "GGUFReader", _reader))
        patched.enter_context(patch.object(gguf, "get_tensor_name_map", name_map))
        patched.enter_context(patch.object(transformers_gguf, "tqdm", lambda tensors, **_: tensors))
        yield


_parsed: dict[tuple, _Reader] = {}


def _reader(path: str | os.PathLike[str]) -> _Reader:
    """A reader of a file as it is now; the last one is kept."""
    key = (os.path.abspath(path), os.stat(path).st_mtime_ns)
    if key not in _parsed:
        _parsed.clear()
        _parsed[key] = _Reader(path)
    return _parsed[key]
