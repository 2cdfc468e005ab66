"""The retrieval-head score of Wu et al. (arXiv 2404.15574): which heads copy the answer out of the needle.

While the model writes the answer, a head copies a token where the key that it attends to most, at the position which
predicts the token, lies in the needle and holds that very token. Its score is the share of the needle's tokens that it
copies so. The needle is the value alone here, what the answer repeats, not the sentence around it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from rope_probe.errors import InputError
from rope_probe.models.attention import Scoring
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.retrieval.probe import RetrievalTask
from rope_probe.retrieval.tasks import Trial
from rope_probe.tracing.heads import HEADS
from rope_probe.tracing.patterns import blocks, chosen_layers, read_layers

METRIC = "retrieval_head"


def retrieval_head_scores(
    model: HookedCausalLM,
    task: RetrievalTask,
    distances: Sequence[int],
    *,
    trials: int = 16,
    seed: int = 0,
    forced: bool = False,
    layers: int | Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """The retrieval-head score of every head on a task with one needle, the key-value probe or one in text.

    Columns: `layer`, `head`, `metric`, `distance` (the one asked for, tokens), `value` (mean over trials), `trials`.
    The model writes as many tokens as the answer has, by greedy decoding; with `forced` the answer's own tokens are
    what it is taken to write. A pass over prompt and written tokens then tells where heads look. `progress` is called
    with the trials just done. Raises InputError for a task without distances, no distances or trials, and layers that
    are out of range.
    """
    chosen = chosen_layers(model, layers)
    if trials < 1 or not distances:
        raise InputError(f"trials and distances must be 1 or more, but there are {trials} and {len(distances)}")
    parts = []
    for distance in distances:
        shares = []
        for trial in task.draw(distance, trials, seed=seed):
            written = trial.answer if forced else model.greedy(trial.prompt, len(trial.answer))
            shares.append(_copied(model, trial, written, needle_of(trial), chosen))
            if progress is not None:
                progress(1)
        mean = torch.stack(shares).mean(0).numpy()  # [layers, H]
        row, head = np.indices(mean.shape).reshape(2, -1)
        part = pd.DataFrame({"layer": np.array(chosen)[row], "head": head, "metric": METRIC})
        parts.append(part.assign(distance=distance, value=mean.flatten(), trials=trials))
    return HEADS.frame(pd.concat(parts, ignore_index=True))


def needle_of(trial: Trial) -> Bool[Tensor, " n"]:
    """Where the value stands in a trial's prompt: the answer's number of tokens, `distance` before the prompt's end.

    If the answer has several tokens, wherever else all of them stand in a row too, since passkey says its value twice.
    (A single token may well be the value of other keys.) Raises InputError for a trial without a distance.
    """
    if trial.distance is None:
        raise InputError("this task has no single needle; the retrieval-head score takes tasks with a distance")
    prompt, answer = trial.prompt, trial.answer
    where = torch.zeros(len(prompt), dtype=torch.bool)
    starts = [len(prompt) - trial.distance]
    if len(answer) > 1:
        starts += (prompt.unfold(0, len(answer), 1) == answer).all(1).nonzero().flatten().tolist()
    for start in starts:
        where[max(0, start) : start + len(answer)] = True
    return where


def _copied(model: HookedCausalLM, trial: Trial, written: Tensor, needle: Tensor, layers: list[int]) -> Tensor:
    """Share of the answer's tokens that each head copies while the model writes `written`; [layers, H]."""
    tokens = torch.cat([trial.prompt, written[:-1]])
    first = len(trial.prompt) - 1
    needle = torch.cat([needle, needle.new_zeros(len(written) - 1)])
    copied: dict[int, Tensor] = {}

    def read(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        most = []
        for block in blocks(query, key, scoring, first=first):
            most.append(block.scores.argmax(-1).cpu() + block.rows.keys.start)
        attended = torch.cat(most, 1)  # [H, m]
        hits = needle[attended] & (tokens[attended] == written)
        copied[layer] = hits.double().sum(1) / len(trial.answer)

    read_layers(model, tokens.unsqueeze(0), read, layers=layers)
    return torch.stack([copied[layer] for layer in layers])
