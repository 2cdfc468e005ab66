"""Corpora: what windows are filled with. Key-value streams for toy vocabularies, and text by any tokenizer.

A corpus is a pure function of (seed, index): batch i does not depend on what was drawn before it, so a run can stop
anywhere and go on. Documents are drawn with replacement.
"""

import hashlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.models.weight_files import is_path
from rope_probe.windows import embedded_text
from rope_probe.windows.packing import Batch


@dataclass(frozen=True)
class KeyValueStream:
    """Documents that bind keys to values: "key value key value ...", a key with one value per document.

    A document draws m distinct keys, m log-uniform in `distinct`, gives each a random value, and emits
    `document_length / 2` pairs by sampling its keys with replacement. Token ids: 4.. are keys, the next are values.
    With `disjoint`, documents packed into one window share no key; otherwise keys collide by accident.
    """

    document_length: int
    distinct: tuple[int, int]
    keys: int = 256
    values: int = 256
    disjoint: bool = False
    kind: Literal["key_value"] = "key_value"

    FIRST_KEY = 4

    def __post_init__(self) -> None:
        low, high = self.distinct
        if self.document_length < 2 or self.document_length % 2:
            raise InputError(f"document_length must be even and 2 or more, but it is {self.document_length}")
        if self.values < 1:
            raise InputError(f"values must be 1 or more, but it is {self.values}")
        if not 1 <= low <= high <= self.keys:
            raise InputError(f"distinct must be a range inside 1..{self.keys} (the keys), but it is {low}..{high}")

    @property
    def first_value(self) -> int:
        """Token id of the first value."""
        return self.FIRST_KEY + self.keys

    @property
    def vocab_size(self) -> int:
        """Number of token ids in use."""
        return self.first_value + self.values

    def source_hash(self) -> str | None:
        """None: documents are drawn, from no source."""
        return None

    def documents(self, count: int, *, seed: int, index: int = 0) -> Int[Tensor, "count n"]:
        """`count` documents, a pure function of (seed, index)."""
        rng = np.random.default_rng([seed, index])
        distinct = self._distinct(rng, count)
        return self._documents(rng, distinct, rng.random((count, self.keys)).argsort(1))

    def _distinct(self, rng: np.random.Generator, count: int) -> np.ndarray:
        low, high = self.distinct
        return np.rint(low * (high / low) ** rng.random((count, 1)))

    def _documents(self, rng: np.random.Generator, distinct: np.ndarray, keys: np.ndarray) -> Tensor:
        """One document for each row of `keys`, over its first `distinct` ones."""
        count = len(keys)
        values = rng.integers(0, self.values, keys.shape)
        pick = (rng.random((count, self.document_length // 2)) * distinct).astype(np.int64)
        pairs = np.take_along_axis(np.stack([keys + self.FIRST_KEY, values + self.first_value], -1), pick[..., None], 1)
        return torch.from_numpy(pairs.reshape(count, self.document_length))

    def batch(self, count: int, window: int, *, seed: int, index: int = 0) -> Batch:
        """`count` windows of whole packed documents, a pure function of (seed, index).

        Raises InputError unless documents fill the window exactly, and, where their keys are to be disjoint, unless
        there are keys enough for that.
        """
        if window < self.document_length or window % self.document_length:
            raise InputError(
                f"a window of {window} tokens does not hold whole documents of {self.document_length}; "
                f"use a multiple of {self.document_length}"
            )
        bounds = torch.arange(0, count * window + 1, self.document_length, dtype=torch.int32)
        each = window // self.document_length
        documents = (
            self._disjoint(count, each, seed, index)
            if self.disjoint
            else self.documents(count * each, seed=seed, index=index)
        )
        return Batch.continuous(documents.reshape(count, window), bounds)

    def _disjoint(self, count: int, each: int, seed: int, index: int) -> Tensor:
        share = self.keys // each
        if share < self.distinct[1]:
            raise InputError(
                f"{each} documents of up to {self.distinct[1]} keys cannot be disjoint with {self.keys} keys in all; "
                f"use at most {share} keys a document"
            )
        rng = np.random.default_rng([seed, index])
        distinct = self._distinct(rng, count * each)
        dealt = rng.random((count, self.keys)).argsort(1)[:, : each * share].reshape(count * each, share)
        return self._documents(rng, distinct, dealt)


@dataclass(frozen=True)
class TextCorpus:
    """Documents of text: one per file of `files`, or one per row of a `datasets` dataset, or the text Python carries.

    `dataset` is a folder or hub id with its `subset`, `split` and `column`. `tokenizer` is a folder or hub id; None
    reads bytes. A document begins and ends as its tokenizer has it; one that marks neither gets its end-of-sequence
    token, if there is one. Documents longer than `longest` tokens are cut into pieces of that length, and what is then
    shorter than `shortest` is left out. A document longer than the window is read from a random place on.

    Raises InputError, when first read, for files, a dataset or a tokenizer that are not there, and where no document is
    long enough.
    """

    files: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    tokenizer: str | None = None
    shortest: int = 2
    longest: int | None = None
    kind: Literal["text"] = "text"

    def __post_init__(self) -> None:
        if self.files and self.dataset:
            raise InputError("files and dataset both say where the text is; give one of them")
        if self.shortest < 1 or (self.longest is not None and self.longest < self.shortest):
            raise InputError(f"documents need 1 <= shortest <= longest, but they are {self.shortest}, {self.longest}")

    @cached_property
    def loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded."""
        if self.tokenizer is None:
            return ByT5Tokenizer(extra_ids=0)
        tokenizer = checkpoints.load_tokenizer(self.tokenizer)
        if tokenizer is None:
            raise InputError(f"{self.tokenizer!r} has no tokenizer; give the folder or hub id of one")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids in use."""
        return len(self.loaded_tokenizer)

    def source_hash(self) -> str:
        """A hash of the text: of its documents, or the fingerprint that `datasets` gives a dataset."""
        if self.dataset is not None:
            return self._text()._fingerprint
        digest = hashlib.sha256()
        for document in self._texts():
            digest.update(hashlib.sha256(document.encode()).digest())
        return digest.hexdigest()

    def batch(self, count: int, window: int, *, seed: int, index: int = 0) -> Batch:
        """`count` windows of packed documents, a pure function of (seed, index).

        The document that crosses a window's end is cut there.
        """
        rng = np.random.default_rng([seed, index])
        lengths = self._lengths
        chosen: list[int] = []
        starts: list[int] = []
        sizes: list[int] = []
        for _ in range(count):
            room = window
            while room > 0:
                document = int(rng.integers(len(lengths)))
                length = int(lengths[document])
                chosen.append(document)
                starts.append(int(rng.integers(length - window + 1)) if length > window else 0)
                sizes.append(min(room, length))
                room -= sizes[-1]
        read = self._documents[chosen]["input_ids"]
        cut = zip(read, starts, sizes, strict=True)
        tokens = np.concatenate([document[start : start + size] for document, start, size in cut])
        bounds = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
        return Batch.continuous(torch.from_numpy(tokens.astype(np.int64)).reshape(count, window), bounds)

    @cached_property
    def _documents(self) -> Any:
        """A dataset of token ids, memory-mapped where its source is on disk."""
        import datasets  # takes seconds to import, and key-value streams have no use for it

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        text = self._text()
        tokens = text.map(self._pieces, batched=True, batch_size=100, remove_columns=text.column_names)
        if len(tokens) == 0:
            raise InputError(f"no document of this text has {self.shortest} tokens or more; lower `shortest`")
        return tokens.with_format("numpy")

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.asarray(self._documents["length"][:])

    def _text(self) -> Any:
        import datasets

        if self.dataset is not None:
            if is_path(self.dataset) and not Path(self.dataset).exists():
                raise InputError(f"no folder at {self.dataset!r}; give the folder of a dataset, or a hub id")
            try:
                if (Path(self.dataset) / "state.json").exists():  # written by save_to_disk
                    return datasets.load_from_disk(self.dataset).select_columns(self.column)
                return datasets.load_dataset(self.dataset, self.subset, split=self.split).select_columns(self.column)
            except Exception as error:  # as many classes of errors as there are file formats
                raise InputError(
                    f"cannot read column {self.column!r} of split {self.split!r} of dataset {self.dataset!r}: {error}"
                ) from error
        return datasets.Dataset.from_dict({self.column: self._texts()})

    def _texts(self) -> list[str]:
        return [_read(file) for file in self.files] or list(embedded_text.documents())

    def _pieces(self, rows: dict[str, list[str]]) -> dict[str, list]:
        tokenizer = self.loaded_tokenizer
        if other := [type(row).__name__ for row in rows[self.column] if not isinstance(row, str)]:
            raise InputError(f"column {self.column!r} of {self.dataset!r} must hold text, but a row is {other[0]}")
        pieces = []
        for document in tokenizer(rows[self.column], verbose=False)["input_ids"]:
            if document and tokenizer.eos_token_id is not None and self._unmarked(document):
                document = [*document, tokenizer.eos_token_id]
            step = self.longest or max(len(document), 1)
            cut = [document[start : start + step] for start in range(0, len(document), step)]
            pieces += [piece for piece in cut if len(piece) >= self.shortest]
        return {"input_ids": pieces, "length": [len(piece) for piece in pieces]}

    def _unmarked(self, document: list[int]) -> bool:
        tokenizer = self.loaded_tokenizer
        marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        return document[0] not in marks and document[-1] not in marks


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read text file {file!r}: {error}") from error
