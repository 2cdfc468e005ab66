"""Retrieval by distance: does the model find what it saw d tokens ago?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor

from rope_probe.corpora import KeyValueStream
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM
from rope_probe.results import tidy

_TOKENS_PER_BATCH = 2**14


@dataclass(frozen=True)
class KeyValueTask:
    """The probe of the key-value streams: a key comes once more, `distance` tokens after its only binding.

    A trial is `window` tokens of "key value" pairs; the last token is the answer. Every other pair has another key, so
    chance is 1 / values. `distance` is even: tokens from the binding's key to the query's.
    """

    stream: KeyValueStream
    window: int

    def __post_init__(self) -> None:
        if self.window < 4 or self.window % 2:
            raise InputError(f"window must be even and 4 or more, but it is {self.window}")

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


def retrieval_accuracy(
    model: HookedCausalLM,
    task: KeyValueTask,
    distances: Sequence[int],
    *,
    trials: int = 128,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Accuracy and log-probability of the answer at each distance; a tidy frame with 95% intervals in `low`, `high`.

    Metrics: `accuracy` (answer is the most likely token; Wilson interval) and `answer_logprob_nats` (mean, normal
    interval). The model needs a vocabulary that holds the task's. `progress` is called with the trials just done.
    Raises InputError for a distance that does not fit the window, or no trials.
    """
    if trials < 1:
        raise InputError(f"trials must be 1 or more, but it is {trials}")
    rows = []
    for distance in distances:
        tokens = task.trials(distance, trials, seed=seed)
        hits, logprobs = [], []
        with torch.no_grad():
            for batch in tokens.split(max(1, _TOKENS_PER_BATCH // task.window)):
                logits = model.unembed(model.hidden(batch[:, :-1])[:, -1:])[:, 0].float().cpu()
                answer = batch[:, -1:]
                hits.append(logits.argmax(-1, keepdim=True) == answer)
                logprobs.append(logits.log_softmax(-1).gather(1, answer))
                if progress is not None:
                    progress(len(batch))
        hit, logprob = torch.cat(hits).double(), torch.cat(logprobs).double()
        at = {"seq_len": task.window, "distance": distance, "seed": seed}
        low, high = stats.binomtest(int(hit.sum()), trials).proportion_ci(method="wilson")
        rows.append({**at, "metric": "accuracy", "value": hit.mean().item(), "low": low, "high": high})
        mean, spread = logprob.mean().item(), 1.96 * logprob.std(correction=0).item() / math.sqrt(trials)
        rows.append({**at, "metric": "answer_logprob_nats", "value": mean, "low": mean - spread, "high": mean + spread})
    return tidy(rows)


def student_interval(values: pd.Series) -> tuple[float, float]:
    """95% interval of a mean over seeds, Student's t; unbounded for one value, which tells no spread."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
