"""What a window is made of, as the options of several commands say it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rope_probe.errors import InputError

if TYPE_CHECKING:
    from rope_probe.models.hooked import HookedCausalLM
    from rope_probe.windows.packing import Window


@dataclass(frozen=True)
class Source:
    """What a window is made of: text, random ids, a document given, or a file of documents.

    Raises InputError where two of them are asked for.
    """

    text: Path | None
    packed: bool
    random: bool
    document: str | None
    document_length: int
    tokens: Path | None

    def __post_init__(self) -> None:
        given = {"--text": self.text, "--random": self.random or None, "--document": self.document}
        named = [name for name, value in {**given, "--tokens": self.tokens}.items() if value is not None]
        if len(named) > 1:
            raise InputError(f"{' and '.join(named)} both say what to read; give one of them")
        if self.packed and named and named != ["--text"]:
            raise InputError(f"--packed packs text, but {named[0]} is no text; leave one of them out")

    @property
    def files(self) -> list[Path]:
        """The files that are read for it."""
        return [file for file in (self.text, self.tokens) if file is not None]


def window_of(model: "HookedCausalLM", length: int | None, source: Source, seed: int) -> "Window":
    """The window that a source fills, as a model reads it. Raises InputError where they do not fit each other."""
    from rope_probe.windows import natural, packing

    if source.tokens is not None:
        documents = _read_documents(model, source.tokens)
        return packing.pack(documents, sum(map(len, documents)) if length is None else length)
    length = 512 if length is None else length
    if source.document is not None:
        return _repeated(_document(model, source.document), length)
    document_length = source.document_length
    if document_length > length:
        raise InputError(f"--document-length must be at most the window, {length}, but it is {document_length}")
    text = None if source.text is None else natural.read_text(source.text)
    if source.random or (text is None and not source.packed and model.tokenizer is None):
        return _repeated(_random_ids(model, document_length, seed), length)
    if model.tokenizer is None:
        raise InputError("text needs a tokenizer, and this checkpoint has none; --random reads random token ids")
    if length % document_length:
        raise InputError(f"--window must hold whole documents of {document_length} tokens, but it is {length}")
    options: dict[str, Any] = {"document_length": document_length, "packed": source.packed, "seed": seed}
    return natural.text_window(model.tokenizer, length, text=text, **options)


def _random_ids(model: "HookedCausalLM", count: int, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


def _repeated(ids: list[int], length: int) -> "Window":
    from rope_probe.windows.packing import repeated_window

    if length % len(ids):
        raise InputError(f"--window must hold whole documents of {len(ids)} tokens, but it is {length}")
    return repeated_window(ids, length // len(ids))


def _document(model: "HookedCausalLM", given: str) -> list[int]:
    """The tokens of --document: ids with commas between them, or else text."""
    words = given.replace(",", " ")
    if not words.strip():
        raise InputError(f"--document needs at least one token id, or text, but it is {given!r}")
    return _text_ids(model, given, f"--document {given!r}") if _is_text(words) else _token_ids(words, "--document")


def _read_documents(model: "HookedCausalLM", file: Path) -> list[list[int]]:
    """The documents of --tokens, one a line; its first line says whether they are token ids or text."""
    from rope_probe.windows.natural import read_text

    lines = read_text(file).splitlines()
    documents = [(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not documents:
        raise InputError(f"--tokens {str(file)!r} holds no documents; it takes one a line, as token ids or as text")
    if _is_text(documents[0][1]):
        return [_text_ids(model, line, where) for where, line in documents]
    return [_token_ids(line, where) for where, line in documents]


def _is_text(line: str) -> bool:
    """Whether a line is text: fewer than half of its words have digits. A slip in a list of ids is no text."""
    words = line.split()
    return 2 * sum(any(map(str.isdigit, word)) for word in words) < len(words)


def _token_ids(text: str, where: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise InputError(f"{where}: token ids are whole numbers, but {str(error).split(': ')[-1]} is not") from error


def _text_ids(model: "HookedCausalLM", text: str, where: str) -> list[int]:
    """The tokens of a document of text, with BOS where the tokenizer begins a text so."""
    from rope_probe.models.tokens import prompt_ids

    if model.tokenizer is None:
        raise InputError(
            f"{where} is text, which needs a tokenizer, and this checkpoint has none; token ids are whole numbers"
        )
    return prompt_ids(model.tokenizer, text)
