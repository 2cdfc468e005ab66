"""Retrieval tasks in text, made offline: passkey, and six of RULER's with the sentences in words of our own.

- `passkey` (Mohtashami & Jaggi, arXiv 2305.16300): five digits, said twice, in a haystack of one repeated noise line.
- `niah_single_1`: one needle, a word key and a seven-digit number, in the same noise.
- `niah_multikey_2`, `niah_multikey_3`: the haystack is needles too, with other keys; in 3 keys and values are UUIDs.
- `vt`: a chain of 4 hops, 5 variables with one value, its assignments in order at random places in the noise.
- `cwe`: a shuffled, numbered list in which 10 words come 30 times each and the others 3 times; in windows under 4,096
  tokens 6 times and once; where ten others do not fit so, 3 times and once. Its solved example has 40 words, 10 of them
  10 times and the others 3 times; under 4,096 tokens 20, 3 times and once. All of this is RULER's
  (`generate_input_output` in scripts/data/synthetic/common_words_extraction.py), but for the last resort of 3 and 1.
- `fwe`: six-letter coded words, the k-th as often as zeta(2) says, k^-2; the first is "...", the next three are asked
  for. window / 50 words, 5 or more; only counts in which the fourth word comes more often than the fifth.

All but passkey follow RULER (arXiv 2404.06654, and its scripts). As there, the question stands at the end, the
beginning of the answer after it, and `vt` and `cwe` open with one solved example. Unlike there, prompts keep no tokens
of the window free beyond those of the answer (what a model writes may run past it), and keys and words come from
`embedded_text`.
"""

import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int
from scipy.special import zeta
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM, KeysAndValues
from rope_probe.models.tokens import prompt_ids
from rope_probe.names import TEXT_TASKS
from rope_probe.seeds import derive
from rope_probe.windows.embedded_text import documents

NOISE = "The river is wide. The hill is steep. The wind is cold. Off we set. We are home by night."
_HOPS, _COMMON, _FEWEST_UNCOMMON, _ALPHA = 4, 10, 10, 2.0
_ROOM = 16
_CWE_LARGE_WINDOW = 4096
_CWE_LARGE_EXAMPLE, _CWE_SMALL_EXAMPLE = (30, (10, 3)), (10, (3, 1))  # uncommon words, repeats of common and uncommon


@dataclass(frozen=True)
class Trial:
    """A prompt of n tokens, the m tokens of its answer as the text would go on, and the strings to be found in it.

    `distance` is the tokens from the value in the needle to its place in the answer; None where there is no needle.
    """

    prompt: Int[Tensor, " n"]
    answer: Int[Tensor, " m"]
    references: tuple[str, ...]
    distance: int | None

    @property
    def tokens(self) -> Int[Tensor, " n+m"]:
        """Prompt and answer in one row."""
        return torch.cat([self.prompt, self.answer])


@dataclass(frozen=True)
class _Draft:
    """A prompt whose haystack is yet to be cut: `text(n)` holds n units of it, from `fewest` up to below `end`."""

    text: Callable[[int], str]
    fewest: int
    end: int
    references: tuple[str, ...]
    answer: str
    unit_tokens: int = 0


@dataclass(frozen=True)
class TextTask:
    """One of TEXT_TASKS, for one tokenizer and one window.

    Prompt and answer fill `window` tokens up to less than one unit of haystack: a line, a word of the list (`cwe`), a
    word of the nominal length (`fwe`). A prompt opens with BOS where the tokenizer adds one, and never ends with EOS.
    Raises InputError for an unknown name.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    window: int

    default_trials: ClassVar[int] = 8
    generates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.name not in TEXT_TASKS:
            raise InputError(f"task {self.name!r} is unknown; known are {', '.join(TEXT_TASKS)}")

    @property
    def by_distance(self) -> bool:
        """Whether the answer stands in one needle, at a distance that can be asked for."""
        return self.name in _NEEDLES

    @property
    def answers(self) -> int:
        """Reference answers of a trial."""
        return {"vt": _HOPS + 1, "cwe": _COMMON, "fwe": 3}.get(self.name, 1)

    @property
    def vocab_size(self) -> None:
        """Not known: tokenizers have ids that no text is made of."""
        return None

    def distances(self) -> list[int] | list[None]:
        """The powers of two that the window has room for, or what is midmost where there is none; else [None]."""
        if not self.by_distance:
            return [None]
        (near, unit), (far, _) = (self._place(distance, 0, 0) for distance in (0, self.window))
        return [2**k for k in range(3, 31) if near <= 2**k <= far - unit] or [(near + far) // 2]

    def draw(self, distance: int | None, count: int, *, seed: int) -> list[Trial]:
        """`count` trials, the i-th a pure function of (task, tokenizer, window, distance, seed, i).

        The needle stands as near to `distance` as its haystack lets it, one unit off at most.
        Raises InputError for a distance that does not fit, or is not for this task, and for a window too short.
        """
        if self.by_distance != (distance is not None):
            raise InputError(
                f"{self.name} needs a distance, but it is None"
                if self.by_distance
                else f"{self.name} has no single distance, so it takes None, but it is {distance}"
            )
        return [self._trial(distance, seed, i) for i in range(count)]

    def default_distances(self) -> list[int] | list[None]:
        """The nearest, the midmost and the farthest of `distances`."""
        if not self.by_distance:
            return [None]
        distances = self.distances()
        places = sorted({0, len(distances) // 2, len(distances) - 1})
        return [distance for i in places if (distance := distances[i]) is not None]

    def written(
        self,
        model: HookedCausalLM,
        trial: Trial,
        likely: Int[Tensor, " m"],
        read: KeysAndValues | None = None,
        row: int = 0,
    ) -> Int[Tensor, " written"]:
        """What `model` greedily writes after the prompt, until EOS.

        It has the room of twice the answer and 16 tokens more, so that an answer said in other words is not cut; that
        may be past the window. `likely` is its most likely token at each place of the answer, given those before; where
        these are the answer, it is what the model writes. `read` and `row` as in `HookedCausalLM.greedy`.
        """
        if torch.equal(likely, trial.answer):
            return trial.answer
        room = max(2 * len(trial.answer) + _ROOM, self.window - len(trial.prompt))
        if model.exact_length is not None:
            room = min(room, model.exact_length - len(trial.prompt))
        return model.greedy(trial.prompt, room, stop=self.tokenizer.eos_token_id, read=read, row=row)

    def text_of(self, tokens: Int[Tensor, " n"]) -> str:
        """Tokens as text, special ones left out."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def share_found(self, trial: Trial, written: str) -> float:
        """Share of the references in what was written, RULER's string match: any case."""
        return sum(reference.lower() in written.lower() for reference in trial.references) / self.answers

    def _trial(self, distance: int | None, seed: int, i: int) -> Trial:
        draft, text = self._fill(distance, seed, i)
        prompt, whole = self._encode(text), self._encode(text + draft.answer)
        shared = next((at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        real = None
        if distance is not None:
            real = self._distance(text, draft)
            if abs(real - distance) > draft.unit_tokens:
                near, far = (self._place(end, seed, i)[0] for end in (0, self.window))
                raise InputError(
                    f"distance must be about {near}..{far} for {self.name} in a window of {self.window} tokens, but it "
                    f"is {distance}"
                )
        return Trial(torch.tensor(whole[:shared]), torch.tensor(whole[shared:]), draft.references, real)

    def _place(self, distance: int, seed: int, i: int) -> tuple[int, int]:
        """Where the needle comes to stand, and the tokens of a unit."""
        draft, text = self._fill(distance, seed, i)
        return self._distance(text, draft), draft.unit_tokens

    def _distance(self, text: str, draft: _Draft) -> int:
        return self._count(text) - self._count(text[: text.index(draft.references[0])].rstrip())

    def _fill(self, distance: int | None, seed: int, i: int) -> tuple[_Draft, str]:
        rng = np.random.default_rng(derive(seed, self.name, str(self.window), str(distance), str(i)))
        drafts = self._needle(rng, distance) if distance is not None else _DRAFTS[self.name](rng, self.window)

        def size(draft: _Draft, units: int) -> int:
            return self._count(draft.text(units) + draft.answer)

        needed = 0
        for draft in drafts:
            needed = size(draft, draft.fewest)
            if needed <= self.window:
                units = bisect_right(range(draft.fewest, draft.end), self.window, key=partial(size, draft))
                return draft, draft.text(draft.fewest + units - 1)
        raise InputError(f"{self.name} needs a window of {needed} tokens or more, but it is {self.window}")

    def _needle(self, rng: np.random.Generator, distance: int) -> Iterator[_Draft]:
        head, line, needle, value, question = _NEEDLES[self.name](rng)
        first = line()
        if not self._count(first):
            raise InputError(f"the tokenizer makes no tokens of {first!r}, so it cannot be this model's")
        lines = [first] + [line() for _ in range(2 * self.window // self._count(first))]
        sizes = {one: self._count("\n" + one + "\n") - self._count("\n") for one in dict.fromkeys(lines)}
        before = "\n".join([head, needle])
        before = before[: before.index(value)].rstrip()
        after = self._count("\n".join([head, needle, question])) - self._count(before)
        tokens = np.array([sizes[one] for one in lines])

        def text(units: int) -> str:
            behind = np.concatenate([tokens[:units][::-1].cumsum()[::-1], [0]])  # by the lines that stand before it
            slot = int(np.abs(after + behind - distance).argmin())
            return "\n".join([head, *lines[:slot], needle, *lines[slot:units], question])

        yield _Draft(text, 1, len(lines) + 1, (value,), f" {value}", int(tokens.max()))

    def _encode(self, text: str) -> list[int]:
        return prompt_ids(self.tokenizer, text)

    def _count(self, text: str) -> int:
        return len(self._encode(text))


# Words ----------------------------------------------------------------------------------------------------------------


@cache
def vocabulary() -> tuple[str, ...]:
    """Lower-case words of four to eight letters in the embedded text, each found there twice or more."""
    found = re.findall(r"(?<=\s)[a-z]{4,8}(?=[\s,.;])", "\n".join(documents()))
    words, counts = np.unique(found, return_counts=True)
    return tuple(words[counts > 1].tolist())


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct words; two joined by a hyphen where there are not enough of them."""
    single = [vocabulary()[i] for i in rng.permutation(len(vocabulary()))]
    pairs = distinct(lambda: word_pair(rng))
    return [*single[:count], *(next(pairs) for _ in range(count - len(single)))]


def word_pair(rng: np.random.Generator) -> str:
    """Two words of the vocabulary, joined by a hyphen."""
    return "-".join(vocabulary()[i] for i in rng.integers(0, len(vocabulary()), 2))


def number(rng: np.random.Generator, digits: int) -> str:
    """A number of so many digits."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _letters(rng: np.random.Generator, count: int, start: str) -> str:
    return "".join(chr(ord(start) + i) for i in rng.integers(0, 26, count))


def distinct(draw: Callable[[], str]) -> Iterator[str]:
    """What `draw` draws, each string once."""
    seen: set[str] = set()
    while True:
        drawn = draw()
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


# Needle tasks: the head, the haystack's lines, the needle, its value, and the question --------------------------------

_Needle = tuple[str, Callable[[], str], str, str, str]


def _passkey(rng: np.random.Generator) -> _Needle:
    value = number(rng, 5)
    head = "One thing in this long and idle text matters: a pass key. Keep it in mind, for you will be asked for it."
    needle = f"The pass key is {value}. Remember it: {value} is the pass key."
    return head, lambda: NOISE, needle, value, "What is the pass key? The pass key is"


def _niah(haystack: str, kind: str) -> Callable[[np.random.Generator], _Needle]:
    def make(rng: np.random.Generator) -> _Needle:
        keys = distinct(lambda: _uuid(rng) if kind == "uuid" else word_pair(rng))
        values = distinct(lambda: _uuid(rng) if kind == "uuid" else number(rng, 7))
        key, value = next(keys), next(values)

        def line() -> str:
            return NOISE if haystack == "noise" else magic_line(kind, next(keys), next(values))

        return magic_head(kind), line, magic_line(kind, key, value), value, magic_question(kind, key)

    return make


def magic_head(kind: str) -> str:
    """What a text with magic numbers (or UUIDs: the kind) begins with."""
    return f"A magic {kind} is hidden in the text below. Keep it in mind, for a question about it follows."


def magic_line(kind: str, key: str, value: str) -> str:
    """A needle."""
    return f"One of the magic {kind}s, that of {key}, is: {value}."


def magic_question(kind: str, key: str) -> str:
    """What asks for the value of a key."""
    return f"Which magic {kind} does the text above give for {key}? The magic {kind} that it gives for {key} is"


# Tasks with several answers: drafts of a prompt, of which the first that fits is taken --------------------------------


def _vt(rng: np.random.Generator, window: int) -> Iterator[_Draft]:
    names = distinct(lambda: _letters(rng, 5, "A"))
    example_names = distinct(lambda: _letters(rng, 3, "A"))
    values = distinct(lambda: number(rng, 5))
    places = np.sort(rng.random((2, _HOPS + 1)))

    def prompt(variables: Sequence[str], value: str, units: int, places: np.ndarray) -> str:
        chain = [f"VAR {name} = {held}" for name, held in zip(variables, [value, *_held(variables)], strict=True)]
        lines = [NOISE] * units
        for slot, statement in reversed(list(zip((places * (units + 1)).astype(int), chain, strict=True))):
            lines.insert(slot, statement)
        return "\n".join([
            "Some variables are assigned a value in the text below, one by way of another. Keep track of them.", *lines,
            f"Question: Which variables hold the value {value} in the text above? Answer: By the assignments in the "
            f"text above, {_HOPS + 1} variables hold the value {value}, they are:",
        ])  # fmt: skip

    example = [next(example_names) for _ in range(_HOPS + 1)]
    solved = f"{prompt(example, next(values), 2, places[0])} {' '.join(example)}\n\n"
    asked, value = tuple(next(names) for _ in range(_HOPS + 1)), next(values)
    yield _Draft(
        lambda units: solved + prompt(asked, value, units, places[1]),
        1,
        max(2, window // 8),
        asked,
        " " + " ".join(asked),
    )


def _held(variables: Sequence[str]) -> list[str]:
    return [f"VAR {name}" for name in variables[:-1]]


def _cwe(rng: np.random.Generator, window: int) -> Iterator[_Draft]:
    example, common, rest = np.split(np.array(_words(rng, 3 * _COMMON + window // 3)), [2 * _COMMON, 3 * _COMMON])
    order = int(rng.integers(2**32))
    shown, shown_others = np.split(example, 2)

    def prompt(common: np.ndarray, others: np.ndarray, repeats: tuple[int, int]) -> str:
        entries = np.concatenate([common.repeat(repeats[0]), others.repeat(repeats[1])])
        shuffled = np.random.default_rng(order).permutation(entries)
        return "\n".join([
            "Some words in the numbered list below come more often than others. Keep those that come most often in "
            "mind.", _numbered(shuffled),
            f"Question: Which {_COMMON} words come most often in the list above? Answer: The {_COMMON} words that come "
            "most often in the list are:",
        ])  # fmt: skip

    def draft(repeats: tuple[int, int], example: tuple[int, tuple[int, int]]) -> _Draft:
        more = example[0] - len(shown_others)
        left, taken = np.split(rest, [len(rest) - more])  # from the end, which no list of that window comes to
        solved_list = prompt(shown, np.concatenate([shown_others, taken]), example[1])
        solved = f"{solved_list} {_numbered(shown)}\n"
        return _Draft(
            lambda units: solved + prompt(common, left[:units], repeats),
            _FEWEST_UNCOMMON,
            len(left) + 1,
            tuple(common.tolist()),
            " " + _numbered(common),
        )

    if window >= _CWE_LARGE_WINDOW:
        yield draft((30, 3), _CWE_LARGE_EXAMPLE)
    yield draft((6, 1), _CWE_SMALL_EXAMPLE)
    yield draft((3, 1), _CWE_SMALL_EXAMPLE)


def _numbered(words: np.ndarray) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _fwe(rng: np.random.Generator, window: int) -> Iterator[_Draft]:
    coded = distinct(lambda: _letters(rng, 6, "a"))
    words = np.array(["...", *(next(coded) for _ in range(max(5, window // 50) - 1))])
    share = np.arange(1, len(words) + 1) ** -_ALPHA / zeta(_ALPHA)
    order = int(rng.integers(2**32))
    lengths = [length for length in range(window) if int(length * share[3]) > int(length * share[4])]

    def prompt(units: int) -> str:
        text = np.random.default_rng(order).permutation(words.repeat((lengths[units] * share).astype(int)))
        return "\n".join([
            "The text below is in code. Keep count of how often each coded word comes.", " ".join(text),
            "Question: Leaving out the dots, which three coded words come most often in the text above? Answer: In the "
            "coded text above, the three words that come most often are:",
        ])  # fmt: skip

    asked = tuple(words[1:4].tolist())
    yield _Draft(prompt, 0, len(lengths), asked, " " + " ".join(asked))


_NEEDLES: dict[str, Callable[[np.random.Generator], _Needle]] = {
    "passkey": _passkey,
    "niah_single_1": _niah("noise", "number"),
    "niah_multikey_2": _niah("needles", "number"),
    "niah_multikey_3": _niah("needles", "uuid"),
}
_DRAFTS: dict[str, Callable[[np.random.Generator, int], Iterator[_Draft]]] = {"vt": _vt, "cwe": _cwe, "fwe": _fwe}
