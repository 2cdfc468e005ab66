"""Long texts with many needles, read once and asked about at many places: retrieval by window x distance.

- `passkey`: natural text, the embedded documents in a random order, and between two paragraphs every `every` tokens a
  pass key of five digits that belongs to a word. The usual passkey has one key a text, and so needs a pass for each
  distance; here a question says whose key it asks for. In longer windows there are more keys to be told apart.
- `niah_multikey_2` (RULER, arXiv 2404.06654): as `tasks.TextTask` has it. Every line is a needle, and any can be asked
  for.

A *cut* is a place where a line ends. A question asked there sees a window of the tokens before it, the question and its
answer. Lines are made into tokens one by one, so that cuts are the same for every question.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rope_probe.errors import InputError
from rope_probe.models.tokens import bos_of, plain_ids
from rope_probe.retrieval import tasks
from rope_probe.retrieval.reading import Reading
from rope_probe.seeds import derive
from rope_probe.windows import embedded_text

Kind = Literal["passkey", "niah_multikey_2"]
KINDS: tuple[Kind, ...] = ("passkey", "niah_multikey_2")
EVERY = 384
_SHORTEST = 40


@dataclass(frozen=True)
class Needle:
    """A key and its value, and where they stand: the place of the value's first token, and the end of the line."""

    key: str
    value: str
    place: int
    end: int


@dataclass(frozen=True)
class Question:
    """What is asked at a cut: the m tokens of the question, those of the answer, and the needle it is about.

    `distance` is the tokens from the value in the needle to its place in the answer; `keys` the needles before the cut.
    """

    needle: Needle
    at: int
    prompt: Int[Tensor, " m"]
    answer: Int[Tensor, " a"]
    keys: int

    @property
    def distance(self) -> int:
        """From the value in the needle to its place in the answer, in tokens."""
        return self.at + len(self.prompt) - self.needle.place


@dataclass(frozen=True)
class Haystack:
    """T tokens with needles in them, `length` at most. `cuts` are the places where a line ends, in order."""

    kind: Kind
    tokenizer: PreTrainedTokenizerBase
    length: int
    tokens: Int[Tensor, " T"]
    needles: tuple[Needle, ...]
    cuts: tuple[int, ...]

    def cut(self, window: int) -> int:
        """The last cut that leaves room for a question and its answer in a window of so many tokens.

        Raises InputError for a window without a needle, or longer than the text.
        """
        if window > self.length:
            raise InputError(f"window must be at most {self.length} tokens, the text's, but it is {window}")
        held = [needle for needle in self.needles if needle.end <= window] or self.needles[:1]
        longest = max(sum(map(len, self._asked(needle))) for needle in held)
        fitting = [cut for cut in self.cuts if cut + longest <= window]
        if not fitting or self.needles[0].end > fitting[-1]:
            least = self.needles[0].end + longest
            raise InputError(f"window must be at least {least} tokens to hold a needle, but it is {window}")
        return fitting[-1]

    def questions(self, at: int, count: int) -> list[Question]:
        """Questions about `count` needles before a cut, the nearest, the farthest and others evenly between.

        All of them where there are fewer. Raises InputError for a place that is no cut.
        """
        if at not in self.cuts:
            raise InputError(f"at must be a cut, such as {self.cuts[-1]}, but it is {at}")
        before = [needle for needle in self.needles if needle.end <= at]
        chosen = np.unique(np.linspace(0, len(before) - 1, min(count, len(before))).round().astype(int))
        return [self._question(before[i], at, len(before)) for i in chosen]

    @cached_property
    def is_text(self) -> Bool[Tensor, " T"]:
        """Which tokens are haystack: in no needle's line."""
        text = torch.ones(len(self.tokens), dtype=torch.bool)
        starts = (0, *self.cuts)
        for needle in self.needles:
            text[max(start for start in starts if start < needle.end) : needle.end] = False
        return text

    def _question(self, needle: Needle, at: int, keys: int) -> Question:
        prompt, answer = self._asked(needle)
        return Question(needle, at, torch.tensor(prompt), torch.tensor(answer), keys)

    def _asked(self, needle: Needle) -> tuple[list[int], list[int]]:
        """Tokens of a question, and of its answer as the text would go on."""
        text = _asks(self.kind, needle.key)
        alone, whole = (plain_ids(self.tokenizer, said) for said in (text, f"{text} {needle.value}"))
        shared = next((at for at, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        return whole[:shared], whole[shared:]


def haystack(
    kind: Kind, tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0, every: int = EVERY
) -> Haystack:
    """A text of about `length` tokens: as many whole lines as fit, a pure function of its arguments.

    `every` says how many tokens a pass key has to itself. Raises InputError for an unknown kind, and for a length that
    holds no needle or, of natural text, is more than there is.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, but it is {kind!r}")
    rng = np.random.default_rng(derive(seed, "haystack", kind))
    lines = _passkeys(rng, tokenizer, every) if kind == "passkey" else _magic_numbers(rng)
    tokens, needles, cuts = bos_of(tokenizer), [], []
    for line, pair in lines:
        ids = plain_ids(tokenizer, f"{line}\n")
        if len(tokens) + len(ids) > length:
            break
        if pair is not None:
            key, value = pair
            place = len(tokens) + len(plain_ids(tokenizer, line[: line.index(value)].rstrip()))
            needles.append(Needle(key, value, place, len(tokens) + len(ids)))
        tokens += ids
        cuts.append(len(tokens))
    else:
        raise InputError(f"length must be at most {len(tokens)} tokens, what text there is, but it is {length}")
    if not needles:
        raise InputError(f"length must hold a needle or more, but {length} tokens hold none")
    return Haystack(kind, tokenizer, length, torch.tensor(tokens), tuple(needles), tuple(cuts))


def answered(reading: Reading, question: Question) -> tuple[bool, float]:
    """Whether the model would write just the answer by greedy decoding, and its log-probability in nats a token.

    One pass over question and answer after what was read up to the question's cut: where every token of the answer is
    the most likely one, given those before it, it is what greedy decoding writes. Raises InputError for logits that are
    not finite.
    """
    states = reading.ask(torch.cat([question.prompt, question.answer[:-1]]), question.at)
    logits = reading.model.unembed(states[:, -len(question.answer) :])[0].float().cpu()  # [a, V]
    reading.model.require_finite(logits, "logits")
    logprobs = logits.log_softmax(-1).gather(1, question.answer.unsqueeze(1))
    return torch.equal(logits.argmax(-1), question.answer), logprobs.double().mean().item()


# Lines: what they say, and the key and value of those that are needles ------------------------------------------------

_Line = tuple[str, tuple[str, str] | None]


def _magic_numbers(rng: np.random.Generator) -> Iterator[_Line]:
    """RULER's needles, one a line, without end."""
    keys = tasks.distinct(lambda: tasks.word_pair(rng))
    values = tasks.distinct(lambda: tasks.number(rng, 7))
    yield tasks.magic_head("number"), None
    while True:
        key, value = next(keys), next(values)
        yield tasks.magic_line("number", key, value), (key, value)


def _passkeys(rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, every: int) -> Iterator[_Line]:
    """Paragraphs of natural text, the first pass key after half of `every` tokens, the others `every` apart."""
    words = tasks.vocabulary()
    names = tasks.distinct(lambda: words[rng.integers(len(words))])
    values = tasks.distinct(lambda: tasks.number(rng, 5))
    yield "The text below holds pass keys. Keep them in mind, for you will be asked for one of them.", None
    read = every // 2
    for paragraph in _paragraphs(rng):
        if read >= every:
            read -= every
            name, value = next(names), next(values)
            yield f"The pass key of {name} is {value}. Remember it: {value} is the pass key of {name}.", (name, value)
        yield paragraph, None
        read += len(plain_ids(tokenizer, paragraph))


def _paragraphs(rng: np.random.Generator) -> Iterator[str]:
    """Paragraphs of the embedded documents, each document in its order, none of them twice."""
    texts = embedded_text.documents()
    said: set[str] = set()
    for number in rng.permutation(len(texts)):
        for paragraph in texts[number].split("\n\n"):
            spoken = " ".join(paragraph.split())
            if len(spoken) >= _SHORTEST and spoken not in said:
                said.add(spoken)
                yield spoken


def _asks(kind: Kind, key: str) -> str:
    if kind == "passkey":
        return f"What is the pass key of {key}? The pass key of {key} is"
    return tasks.magic_question("number", key)
