"""Streams: what a step of training reads side by side, each with its own data, positions, masks and terms.

The loss of a step is

    sum over streams s of  share_s / (sum of shares)  x  sum over the terms of s of  weight  x  mean of the term,

each mean being over all positions of s in the step (or those with a target), whatever the parts and processes. A share
is thus a stream's weight in an average over streams, and by default its part of the tokens as well, as if the step were
an average over micro-batches of equal size. LongReD (arXiv 2502.07365) mixes 8 long, 6 short and 2 short-to-long
micro-batches of 16: shares 8, 6 and 2, with terms of weight 1, 5 and 10, make 1/2 CE + 1.875 L_short + 1.25 L_s2l.
`tokens` takes the two apart: a stream of share 4 and tokens 1 counts as four, and reads as one.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Discriminator

from rope_probe.distillation.terms import AnyKind, Divergence, Term
from rope_probe.errors import InputError
from rope_probe.ranges import Count, Positive, WindowLength, require_ranges
from rope_probe.seeds import derive
from rope_probe.windows import samplers
from rope_probe.windows.corpora import KeyValueStream, TextCorpus
from rope_probe.windows.packing import Batch, Positions
from rope_probe.windows.samplers import Coin

Data = Annotated[KeyValueStream | TextCorpus, Discriminator("kind")]
Terms = tuple[Annotated[Term, AnyKind], ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How windows are read, and what is learnt from them.

    `positions` are the student's; `target_window` is what skipped ones are spread over, and `coin` says whether the
    schemes that flip one flip it for every step or for every window (see `windows.samplers`). A teacher reads the same
    documents at `teacher_positions`, by default the student's. `masked` and `teacher_masked` keep the attention of
    student and teachers inside documents; where the student's is, tokens that begin a document are no targets, since
    nothing foretells them. `terms` are what is learnt. Logits are made for `chunk` positions at a time.
    """

    positions: Positions = "continuous"
    target_window: WindowLength | None = None
    coin: Coin = "batch"
    teacher_positions: Positions | None = None
    masked: bool = False
    teacher_masked: bool = False
    terms: Terms = (Divergence(),)
    chunk: Count = 256


@dataclass(frozen=True)
class Stream(Reading):
    """One of the sources that every step of a phase reads: windows of `window` tokens of `data`.

    `share` is its weight in the loss, relative to the phase's other streams; `tokens` its part of the tokens of a step,
    likewise relative, and as large as its share by default. `name` stands before what is told of it in records; the
    default is its number, from 0. Raises InputError for values that cannot be.
    """

    data: Data
    window: WindowLength
    share: Positive = 1.0
    tokens: Positive | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "a stream")
        if not any(term.weight > 0 for term in self.terms):
            weights = [term.weight for term in self.terms]
            raise InputError(f"terms must hold one of a weight above 0, but their weights are {weights}")
        alike = self.teacher_positions in (None, self.positions)
        if alike and any(term.averaged_over == "moved" for term in self.terms):
            raise InputError(
                f"a term compares positions with others, but students and teachers both read {self.positions} ones; "
                'give teacher_positions, such as "continuous"'
            )
        for scheme in (self.positions, self.teacher_positions):
            if scheme in samplers.SCHEMES:
                samplers.require_room(scheme, self.window, self.target_window)
        if self.name is not None and not re.fullmatch(r"\w[\w.-]{,99}", self.name):
            raise InputError(
                f"a stream's name is made of up to 100 letters, digits, dots and dashes, but it is {self.name!r}"
            )

    @property
    def part(self) -> float:
        """Its part of the tokens of a step, relative to those of other streams."""
        return self.share if self.tokens is None else self.tokens

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that its terms read, each once."""
        return tuple(dict.fromkeys(term.teacher for term in self.terms if term.teacher is not None))

    def reach(self, positions: Positions | None) -> int:
        """How many positions a scheme runs over, of the student's where there is none."""
        scheme = positions or self.positions
        if scheme in samplers.SCHEMES:
            return samplers.reach(scheme, self.window, self.target_window)
        return max(self.window, self.target_window or 0) if scheme == "skipped" else self.window

    def batch(self, count: int, *, seed: int, step: int) -> Batch:
        """`count` windows at the student's positions, a pure function of (seed, step)."""
        batch = self.data.batch(count, self.window, seed=seed, index=step)
        return self._placed(batch, self.positions, seed, step)

    def as_teachers_read(self, batch: Batch, *, seed: int, step: int) -> Batch:
        """The windows of a `batch` at the teachers' positions."""
        if self.teacher_positions is None:
            return batch
        return self._placed(batch, self.teacher_positions, seed, step)

    def _placed(self, batch: Batch, positions: Positions, seed: int, step: int) -> Batch:
        seed_of_step = derive(seed, str(step))
        return batch.placed(positions, target_window=self.target_window, seed=seed_of_step, coin=self.coin)
