"""Retrieval by distance: does the model find what it saw d tokens ago?

One measurement for every task: a pass over prompt and answer gives the answer's log-probability, and says whether the
model would write just that. Where it would not, the task looks for the answer in what the model does write.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.names import KEY_VALUE, LONGEST_WINDOW
from rope_probe.retrieval.tasks import Trial
from rope_probe.runs.provenance import hash_tokens
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.windows.corpora import KeyValueStream

_TOKENS_PER_BATCH = 2**14
RETRIEVAL = declare(
    "retrieval",
    "How often a model finds what it saw `distance` tokens ago, and how likely the answer is to it; means over trials.",
    ("phase", "role", "task", "seq_len", "tokens", "distance", "low", "high"),
    {
        "accuracy": Metric("share of the answers that the model writes by greedy decoding"),
        "answer_logprob_nats": Metric("log-probability of the answer, summed over its tokens", "nats"),
        "gate_accuracy": Metric("accuracy as the gate at the end of a phase measured it"),
    },
    own={"task": Column("string", "what is asked: key_value, passkey, or a task of RULER")},
)


class RetrievalTask(Protocol):
    """What `retrieval_accuracy` asks of a task."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""

    @property
    def window(self) -> int:
        """Tokens that a trial and its answer have room in."""

    @property
    def answers(self) -> int:
        """Reference answers of a trial."""

    @property
    def vocab_size(self) -> int | None:
        """Token ids that a model needs for it, where that is known."""

    def distances(self) -> list[int] | list[None]:
        """The distances to measure by default; [None] for a task without."""

    def draw(self, distance: int | None, count: int, *, seed: int) -> list[Trial]:
        """`count` trials, a pure function of (task, distance, seed). Raises InputError for what does not fit."""

    def found(self, model: HookedCausalLM, trial: Trial) -> float:
        """Share of the answers in what `model` writes, asked where that is not token by token the trial's answer."""


@dataclass(frozen=True)
class KeyValueTask:
    """The probe of the key-value streams: a key comes once more, `distance` tokens after its only binding.

    A trial is `window` tokens of "key value" pairs; the last token is the answer. Every other pair has another key, so
    chance is 1 / values. `distance` is even: tokens from the binding's key to the query's.
    """

    stream: KeyValueStream
    window: int

    name: ClassVar[str] = KEY_VALUE
    answers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 4 <= self.window <= LONGEST_WINDOW or self.window % 2:
            raise InputError(f"window must be even and in 4..{LONGEST_WINDOW}, but it is {self.window}")

    @property
    def vocab_size(self) -> int:
        """The stream's."""
        return self.stream.vocab_size

    def trials(self, distance: int, count: int, *, seed: int) -> Int[Tensor, "count window"]:
        """`count` trials, a pure function of (seed, distance). Raises InputError for a distance that does not fit."""
        pairs, back = self.window // 2, distance // 2
        if distance % 2 or not 1 <= back < pairs:
            raise InputError(f"distance must be even and in 2..{self.window - 2} (the window), but it is {distance}")
        rng = np.random.default_rng([seed, distance, self.window])
        order = rng.random((count, self.stream.keys)).argsort(1)
        values = rng.integers(0, self.stream.values, (count, self.stream.keys))
        pick = rng.integers(1, self.stream.keys, (count, pairs))  # the query's key is order[:, 0], used nowhere else
        pick[:, [pairs - 1 - back, pairs - 1]] = 0
        keys = np.take_along_axis(order, pick, 1)
        bound = np.take_along_axis(values, keys, 1)
        tokens = np.stack([keys + self.stream.FIRST_KEY, bound + self.stream.first_value], -1)
        return torch.from_numpy(tokens.reshape(count, self.window))

    def distances(self) -> list[int]:
        """8, 16, 32, ... in the window."""
        return [2**k for k in range(3, 31) if 2**k < self.window]

    def draw(self, distance: int | None, count: int, *, seed: int) -> list[Trial]:
        """`trials`, each parted into prompt and answer."""
        if distance is None:
            raise InputError("key_value needs a distance, but it is None")
        return [Trial(row[:-1], row[-1:], (), distance) for row in self.trials(distance, count, seed=seed)]

    def found(self, model: HookedCausalLM, trial: Trial) -> float:
        """Nothing: the answer is one token, and it was not the most likely one."""
        return 0.0


def retrieval_accuracy(
    model: HookedCausalLM,
    task: RetrievalTask,
    distances: Sequence[int | None],
    *,
    trials: int = 128,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Accuracy and log-probability of the answer at each distance; a tidy frame with 95% intervals in `low`, `high`.

    Metrics, means over trials:
    - `accuracy`: share of a trial's answers that the model writes by greedy decoding (see the task's `found`). For a
      task of one answer with Wilson's interval, else with Student's over trials, inside 0..1.
    - `answer_logprob_nats`: log-probability of the answer as the trial spells and orders it, summed over its tokens,
      each given those before it (teacher forcing). With a normal interval.

    Tasks without a distance take [None]. The model needs a vocabulary that holds the task's. `progress` is called with
    the trials just done. Raises InputError for a distance that does not fit the window, for no distances or trials, and
    for logits that are not finite.
    """
    if trials < 1:
        raise InputError(f"trials must be 1 or more, but it is {trials}")
    if task.vocab_size is not None and task.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{task.name} uses {task.vocab_size} token ids, but the model's vocabulary has {model.config.vocab_size}"
        )
    rows = []
    if not distances:
        raise InputError(
            f"there is no distance to measure {task.name} at; its window of {task.window} tokens is too short"
        )
    for distance in distances:
        shares, logprobs = [], []
        drawn = task.draw(distance, trials, seed=seed)
        size = max(1, _TOKENS_PER_BATCH // task.window)
        for batch in (drawn[start : start + size] for start in range(0, trials, size)):
            with model.measuring():
                for trial, (hit, logprob) in zip(batch, _forced(model, batch), strict=True):
                    shares.append(1.0 if hit else task.found(model, trial))
                    logprobs.append(logprob)
            if progress is not None:
                progress(len(batch))
        columns = {"task": task.name, "seq_len": task.window, "distance": distance, "seed": seed}
        low, high = _accuracy_interval(shares, task.answers)
        rows.append({**columns, "metric": "accuracy", "value": float(np.mean(shares)), "low": low, "high": high})
        mean = float(np.mean(logprobs))
        low, high = _normal_interval(logprobs)
        rows.append({**columns, "metric": "answer_logprob_nats", "value": mean, "low": low, "high": high})
    return RETRIEVAL.frame(rows)


def trials_hash(task: RetrievalTask, distance: int | None, count: int, *, seed: int) -> str:
    """SHA-256 of the tokens of a task's trials, for a manifest."""
    rows = [trial.tokens for trial in task.draw(distance, count, seed=seed)]
    return hash_tokens(pad_sequence(rows, batch_first=True, padding_value=-1))


@torch.no_grad()
def _forced(model: HookedCausalLM, batch: Sequence[Trial]) -> Iterator[tuple[bool, float]]:
    """Per trial: whether each token of its answer is the most likely one, and the log-probability of all of them.

    Shorter trials are filled up behind, where a causal model does not look.
    """
    hidden = model.hidden(pad_sequence([trial.tokens[:-1] for trial in batch], batch_first=True))
    for row, trial in enumerate(batch):
        start = len(trial.prompt) - 1
        read = hidden[row : row + 1, start : start + len(trial.answer)]
        logits, answer = model.unembed(read)[0].float().cpu(), trial.answer.unsqueeze(1)
        model.require_finite(logits, "logits")
        hit = bool((logits.argmax(-1, keepdim=True) == answer).all())
        yield hit, logits.log_softmax(-1).gather(1, answer).double().sum().item()


def _accuracy_interval(shares: Sequence[float], answers: int) -> tuple[float, float]:
    if answers == 1:
        low, high = stats.binomtest(int(sum(shares)), len(shares)).proportion_ci(method="wilson")
    else:
        low, high = np.clip(student_interval(pd.Series(shares)), 0, 1)
    return float(low), float(high)


def _normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean; the mean itself where nothing varies."""
    mean, error = float(np.mean(values)), float(np.std(values)) / math.sqrt(len(values))
    low, high = stats.norm.interval(0.95, loc=mean, scale=error) if error else (mean, mean)
    return float(low), float(high)


def student_interval(values: pd.Series) -> tuple[float, float]:
    """95% interval of a mean over seeds, Student's t; unbounded for one value, which tells no spread."""
    if len(values) < 2:
        return -math.inf, math.inf
    if not values.std(ddof=1):
        return float(values.mean()), float(values.mean())
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=values.sem())
    return float(low), float(high)
