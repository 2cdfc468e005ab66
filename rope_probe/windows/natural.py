"""Windows of natural text: a document repeated or several packed, cut at whole tokens, with the tokenizer's BOS."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rope_probe.errors import InputError
from rope_probe.models.tokens import bos_of, plain_ids
from rope_probe.windows import embedded_text
from rope_probe.windows.packing import Window, pack, repeated_window


def read_text(file: str | os.PathLike[str]) -> str:
    """A text file. Raises InputError for one that cannot be read, or is no text."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the text {os.fspath(file)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(file)!r} is no text: byte {error.start} is not UTF-8") from error
    if "\0" in text:
        raise InputError(f"{os.fspath(file)!r} is no text: it holds zero bytes")
    return text


def text_window(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    document_length: int = 64,
    text: str | None = None,
    packed: bool = False,
    seed: int = 0,
) -> Window:
    """A window of `length` tokens of natural text, in documents of `document_length` tokens.

    The same document stands in it again and again or, with `packed`, one after the other of the text. A document begins
    with BOS where the tokenizer begins a text so. `text` is what they are cut from, from a place that `seed` draws; by
    default one of the embedded texts, which `seed` draws too.

    Raises InputError for a length that documents do not fill, and for a text that is shorter than is needed.
    """
    start = bos_of(tokenizer)
    inner = document_length - len(start)
    if inner < 1 or document_length > length or length % document_length:
        raise InputError(
            f"a window of {length} tokens must hold whole documents of {len(start) + 1} tokens or more, but they have "
            f"{document_length}"
        )
    copies = length // document_length
    needed = inner * (copies if packed else 1)
    rng = np.random.default_rng(seed)
    texts = _shuffled(embedded_text.documents(), rng) if text is None else [text]
    tokens = _enough(tokenizer, texts, needed)
    if tokens is None:
        there = sum(len(plain_ids(tokenizer, text)) for text in texts)
        raise InputError(f"the text must have {needed} tokens or more, but it has {there}")
    first = int(rng.integers(len(tokens) - needed + 1))
    pieces = [[*start, *tokens[begin : begin + inner]] for begin in range(first, first + needed, inner)]
    return pack(pieces, length) if packed else repeated_window(pieces[0], copies)


def _shuffled(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [texts[i] for i in rng.permutation(len(texts))]


def _enough(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], needed: int) -> list[int] | None:
    """The tokens of the first text that has enough of them; of several texts together, where none has."""
    joined: list[int] = []
    for text in texts:
        tokens = plain_ids(tokenizer, text)
        if len(tokens) >= needed:
            return tokens
        joined += tokens
    return joined if len(joined) >= needed else None
