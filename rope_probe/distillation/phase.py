"""What a training phase is: its streams, theta, budget and the gate it must pass."""

import math
import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import pandas as pd

from rope_probe.distillation.streams import Data, Reading, Stream
from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.ranges import Count, NotNegative, Positive, Seed, Share, require_ranges
from rope_probe.retrieval.probe import KeyValueTask, retrieval_accuracy
from rope_probe.seeds import derive
from rope_probe.windows.corpora import KeyValueStream
from rope_probe.windows.packing import Batch


class GateError(RuntimeError):
    """A phase used its whole budget and its model still does not retrieve what its gate asks for.

    Carries what was seen: the losses of every step, and the gate's last measurement.
    """

    def __init__(self, message: str, history: list[dict[str, float]], measured: pd.DataFrame) -> None:
        super().__init__(message)
        self.history, self.measured = history, measured


@dataclass(frozen=True)
class Gate:
    """A retrieval probe that a phase must pass: at every distance, `accuracy` or more.

    It is tried every `every` steps and ends the phase when it passes, so models are compared at equal skill.
    """

    window: int
    distances: tuple[int, ...]
    accuracy: Share
    every: Count
    trials: Count = 128
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_ranges(self, "a gate")
        if not self.distances:
            raise InputError("a gate needs a distance or more, but it has none")

    def measure(self, model: HookedCausalLM, data: KeyValueStream) -> pd.DataFrame:
        """Accuracy by distance."""
        task = KeyValueTask(data, self.window)
        frame = retrieval_accuracy(model, task, self.distances, trials=self.trials, seed=self.seed)
        return frame[frame["metric"] == "accuracy"]


@dataclass(frozen=True)
class Phase(Reading):
    """One stage of training on windows of packed documents.

    What is read: about `batch_tokens` a step, from one stream or several. A phase of one stream has that stream's
    fields itself: windows of `window` tokens of `data`, read as `Reading` says. One of several has `streams` instead,
    mixed within every step.

    How the student rotates: `theta`, or full transformers `rope_parameters`; as it did before where both are None.

    How it learns: by the terms of its streams, in `accumulate` parts a step. `matrix_lr` is Muon's learning rate for
    the matrices inside the layers, `lr` AdamW's for the rest; without it AdamW trains everything. Both rise over
    `warmup` steps, then stay ("constant") or fall to a tenth at `steps` ("cosine"). Gradients are clipped at the norm
    `clip_norm`. With a `gate`, `steps` is the cap. Raises InputError for values that cannot be.
    """

    name: str
    data: Data | None = None
    window: int | None = None
    steps: Count = 0
    batch_tokens: Count = 0
    lr: Positive = 0.0
    theta: Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    matrix_lr: Positive | None = None
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Count = 50
    weight_decay: NotNegative = 0.1
    clip_norm: Positive = 1.0
    accumulate: Count = 1
    gate: Gate | None = None
    streams: tuple[Stream, ...] = ()

    def __post_init__(self) -> None:
        require_ranges(self, f"phase {self.name!r}")
        if not re.fullmatch(r"\w[\w.-]{,99}", self.name):
            raise InputError(
                f"a phase's name becomes a folder's: up to 100 letters, digits, dots, dashes; not {self.name!r}"
            )
        if self.theta is not None and self.rope_parameters is not None:
            raise InputError(f"phase {self.name!r} has both theta and rope_parameters; give one of them")
        self._check_streams()
        self.windows_of_a_part(1)
        if self.gate is not None and self.probed is None:
            raise InputError(f"phase {self.name!r} has a gate, which probes key-value retrieval, on other data")

    def _check_streams(self) -> None:
        own = self._own_fields()
        if self.streams:
            changed = [name for name, value in own.items() if value != _OWN_DEFAULTS[name]]
            if changed:
                raise InputError(f"phase {self.name!r} has streams, so {changed[0]} is a key of each of them")
            names = [stream.name for stream in self.mix]
            for name in names:
                if names.count(name) > 1:
                    raise InputError(f"two streams of phase {self.name!r} are called {name!r}; name each differently")
        elif self.data is None or self.window is None:
            absent = "data" if self.data is None else "a window"
            raise InputError(f"phase {self.name!r} has no {absent}; give data and window, or streams of them")
        else:
            try:
                Stream(**own)
            except InputError as error:
                raise InputError(f"phase {self.name!r}: {error}") from error
            if self.batch_tokens % self.window:
                raise InputError(
                    f"batch_tokens of phase {self.name!r} must be a multiple of the window, {self.window}, but it is "
                    f"{self.batch_tokens}"
                )

    def _own_fields(self) -> dict[str, Any]:
        """The fields that a phase of one stream shares with its stream."""
        return {name: getattr(self, name) for name in _OWN_DEFAULTS}

    @property
    def rope(self) -> float | dict[str, Any] | None:
        """What the student is to rotate by, as `checkpoints.with_rope` takes it; None leaves it as it is."""
        return self.rope_parameters if self.theta is None else self.theta

    @cached_property
    def mix(self) -> tuple[Stream, ...]:
        """The streams that every step reads, each with its name."""
        streams = self.streams or (Stream(**self._own_fields()),)
        return tuple(replace(stream, name=stream.name or str(i)) for i, stream in enumerate(streams))

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """How many windows of each stream a step reads.

        `batch_tokens` is split by the streams' `tokens` into whole windows: first as many as each has room for, then
        one more by largest remainder, as long as there is room. The same whatever the parts and processes.
        """
        total = sum(stream.part for stream in self.mix)
        exact = [self.batch_tokens * stream.part / total / stream.window for stream in self.mix]
        windows = [int(count + 1e-9) for count in exact]
        left = self.batch_tokens - sum(n * stream.window for n, stream in zip(windows, self.mix, strict=True))
        for i in sorted(range(len(windows)), key=lambda i: windows[i] - exact[i]):
            if exact[i] - windows[i] > 1e-9 and self.mix[i].window <= left:
                windows[i] += 1
                left -= self.mix[i].window
        return tuple(windows)

    @property
    def step_tokens(self) -> int:
        """Tokens that a step reads: `batch_tokens`, less what is no whole window of any stream."""
        return sum(n * stream.window for n, stream in zip(self.windows, self.mix, strict=True))

    @property
    def factors(self) -> tuple[float, ...]:
        """What each stream counts for in the loss; see `streams`."""
        total = sum(stream.share for stream in self.mix)
        return tuple(stream.share / total for stream in self.mix)

    @property
    def probed(self) -> KeyValueStream | None:
        """The data that a gate probes: the first key-value stream's."""
        return next((stream.data for stream in self.mix if isinstance(stream.data, KeyValueStream)), None)

    def batches(self, seed: int, step: int) -> list[Batch]:
        """The windows of one step, stream by stream, a pure function of (seed, step)."""
        seeds = self.seeds(seed)
        return [
            stream.batch(count, seed=seeds[i], step=step)
            for i, (stream, count) in enumerate(zip(self.mix, self.windows, strict=True))
        ]

    def batch(self, seed: int, step: int) -> Batch:
        """The windows of one step of a phase of one stream. Raises InputError for one of several."""
        if len(self.mix) > 1:
            raise InputError(f"phase {self.name!r} has {len(self.mix)} streams; ask for batches")
        return self.batches(seed, step)[0]

    def seeds(self, seed: int) -> list[int]:
        """A seed for each stream, so that no two of them draw alike."""
        if len(self.mix) == 1:
            return [seed]
        return [derive(seed, "stream", str(stream.name)) for stream in self.mix]

    def windows_of_a_part(self, processes: int) -> list[int]:
        """How many windows of each stream every process reads in each of `accumulate` parts of a step.

        Raises InputError where windows cannot be shared so, and where a stream has none.
        """
        parts = processes * self.accumulate
        for stream, count in zip(self.mix, self.windows, strict=True):
            if count == 0:
                raise InputError(
                    f"stream {stream.name!r} of phase {self.name!r} gets no window of {stream.window} tokens in a step "
                    f"of {self.batch_tokens}; make batch_tokens a multiple of {self._shared_by(parts)}"
                )
            if count % parts:
                what = f"a batch of phase {self.name!r}" if len(self.mix) == 1 else f"stream {stream.name!r}"
                raise InputError(
                    f"{what} has {count} windows, which {processes} processes cannot share in {self.accumulate} parts "
                    f"each; make batch_tokens a multiple of {self._shared_by(parts)}"
                )
        return [count // parts for count in self.windows]

    def _shared_by(self, parts: int) -> int:
        """The least `batch_tokens` of which every stream gets its exact part, in windows that `parts` can share."""
        ratio = [Fraction(stream.part).limit_denominator(1000) for stream in self.mix]
        scale = math.lcm(*(share.denominator for share in ratio))
        shares = [max(1, int(share * scale)) for share in ratio]
        needed = [stream.window * parts for stream in self.mix]
        return sum(shares) * math.lcm(*(n // math.gcd(n, share) for n, share in zip(needed, shares, strict=True)))

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the learning rates at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        if self.schedule == "constant":
            return rise
        return rise * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))


_OWN_DEFAULTS = {field.name: field.default for field in fields(Phase) if field.name in ("data", "window")} | {
    field.name: field.default for field in fields(Reading)
}
"""The fields that a phase of one stream has itself, and what they are where it has several."""
