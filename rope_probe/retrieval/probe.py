"""Retrieval by distance: does the model find what it saw d tokens ago?

One measurement for every task: a pass over prompt and answer gives the answer's log-probability, and says whether the
model would write just that. Where it would not, it goes on from that pass's keys and values, and the task looks for the
answer in what it does write. Every trial is kept with what was written, in a file too if asked, as soon as it is done.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM, KeysAndValues
from rope_probe.names import KEY_VALUE, LONGEST_WINDOW
from rope_probe.retrieval.tasks import Trial
from rope_probe.runs.intervals import share_interval
from rope_probe.runs.provenance import hash_tokens
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.tracing.perturbations import Perturbation
from rope_probe.windows.corpora import KeyValueStream

_TOKENS_PER_BATCH = 2**14
RETRIEVAL = declare(
    "retrieval",
    "How often a model finds what it saw `distance` tokens ago, and how likely the answer is to it; means over trials.",
    ("phase", "role", "task", "seq_len", "tokens", "distance", "perturbation", "trials", "low", "high"),
    {
        "accuracy": Metric("share of the answers that the model writes by greedy decoding"),
        "answer_logprob_nats": Metric("log-probability of the answer, summed over its tokens", "nats"),
        "gate_accuracy": Metric("accuracy as the gate at the end of a phase measured it"),
    },
    own={
        "task": Column("string", "what is asked: key_value, passkey, or a task of RULER"),
        "trials": Column("Int64", "trials that the value is a mean over"),
    },
)
_FINGERPRINT = 64


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

    @property
    def generates(self) -> bool:
        """Whether `written` may ask the model for more than its most likely tokens."""

    @property
    def default_trials(self) -> int:
        """How many trials of each distance end within minutes."""

    def default_distances(self) -> list[int] | list[None]:
        """A choice of `distances` that ends within minutes."""

    def written(
        self, model: HookedCausalLM, trial: Trial, likely: Int[Tensor, " m"], read: KeysAndValues | None, row: int
    ) -> Int[Tensor, " written"]:
        """What `model` writes after the prompt: the answer, where that is `likely`, its most likely tokens there.

        `read` holds keys and values of a pass whose row `row` begins with the prompt.
        """

    def text_of(self, tokens: Int[Tensor, " n"]) -> str:
        """Tokens as they stand in a transcript."""

    def share_found(self, trial: Trial, written: str) -> float:
        """Share of the trial's answers in what was written."""


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
    default_trials: ClassVar[int] = 128
    generates: ClassVar[bool] = False

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
        rows = self.trials(distance, count, seed=seed)
        return [Trial(row[:-1], row[-1:], (self.text_of(row[-1:]),), distance) for row in rows]

    def default_distances(self) -> list[int]:
        """All of them."""
        return self.distances()

    def written(
        self,
        model: HookedCausalLM,
        trial: Trial,
        likely: Int[Tensor, " m"],
        read: KeysAndValues | None = None,
        row: int = 0,
    ) -> Int[Tensor, " m"]:
        """The most likely token, since the answer is one."""
        return likely

    def text_of(self, tokens: Int[Tensor, " n"]) -> str:
        """Token ids, with spaces between."""
        return " ".join(map(str, tokens.tolist()))

    def share_found(self, trial: Trial, written: str) -> float:
        """1 for the value that was bound to the key, else 0."""
        return float(written == trial.references[0])


def retrieval_accuracy(
    model: HookedCausalLM,
    task: RetrievalTask,
    distances: Sequence[int | None] | None = None,
    *,
    trials: int | None = None,
    seed: int = 0,
    perturbation: Perturbation | None = None,
    progress: Callable[[int], Any] | None = None,
    trials_file: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Accuracy and log-probability of the answer at each distance; a tidy frame with 95% intervals in `low`, `high`.

    Metrics, means over trials:
    - `accuracy`: share of a trial's answers that the model writes by greedy decoding (see the task). With Wilson's
      interval, for several answers a trial with the dispersion between trials (`runs.intervals.share_interval`).
    - `answer_logprob_nats`: log-probability of the answer as the trial spells and orders it, summed over its tokens,
      each given those before it (teacher forcing). With a normal interval.

    Tasks without a distance take [None]. By default a few distances and trials that end within minutes: the task's own
    `default_distances` and `default_trials`. `perturbation`, `progress` and `trials_file` as in `retrieval_trials`,
    which raises InputError for what cannot be measured.
    """
    table = retrieval_trials(
        model,
        task,
        distances,
        trials=trials,
        seed=seed,
        perturbation=perturbation,
        progress=progress,
        trials_file=trials_file,
    )
    rows = []
    count = int(table["trial"].max()) + 1
    for done in (table.iloc[first : first + count] for first in range(0, len(table), count)):
        shares, logprobs = done["accuracy"].tolist(), done["answer_logprob_nats"].tolist()
        distance = done["distance"].iloc[0]
        columns = {"task": task.name, "seq_len": task.window, "seed": seed, "trials": count}
        columns["distance"] = None if pd.isna(distance) else int(distance)
        columns["perturbation"] = None if perturbation is None else str(perturbation)
        low, high = _accuracy_interval(shares, task.answers)
        rows.append({**columns, "metric": "accuracy", "value": float(np.mean(shares)), "low": low, "high": high})
        mean = float(np.mean(logprobs))
        low, high = _normal_interval(logprobs)
        rows.append({**columns, "metric": "answer_logprob_nats", "value": mean, "low": low, "high": high})
    return RETRIEVAL.frame(rows)


def retrieval_trials(
    model: HookedCausalLM,
    task: RetrievalTask,
    distances: Sequence[int | None] | None = None,
    *,
    trials: int | None = None,
    seed: int = 0,
    perturbation: Perturbation | None = None,
    progress: Callable[[int], Any] | None = None,
    trials_file: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """A row for each trial, with what the model wrote; a plain frame, in the order of distances and trials.

    Columns: `task`, `seq_len` (the window), `distance` (asked for), `seed`, `trial` (its number), `needle_distance` (in
    tokens, as it came out), `accuracy` and `answer_logprob_nats` (as in `retrieval_accuracy`), `references` (a list of
    what was to be found), `written`, `tokens_sha256` (of prompt and answer), `model` (a fingerprint of its weights),
    and `perturbation` where there was one.

    A `perturbation` is at work in every pass, the writing included; the window is then read anew for every token that
    is written. Its positions are counted from the start of the trial.

    With a `trials_file`, rows are appended to it as JSON lines, as soon as their trials are done, and trials that it
    holds already are not run again; several tasks can share one. `progress` is called with the trials just done, those
    of the file too. The model needs a vocabulary that holds the task's. Raises InputError for a distance that does not
    fit the window, for no distances or trials, for logits that are not finite, for a file that is no such list, and for
    one with trials of another model.
    """
    distances = task.default_distances() if distances is None else distances
    count = task.default_trials if trials is None else trials
    if count < 1:
        raise InputError(f"trials must be 1 or more, but it is {count}")
    if task.vocab_size is not None and task.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{task.name} uses {task.vocab_size} token ids, but the model's vocabulary has {model.config.vocab_size}"
        )
    if not distances:
        raise InputError(
            f"there is no distance to measure {task.name} at; its window of {task.window} tokens is too short"
        )
    of_model = _fingerprint(model)
    kept = _TrialsFile(trials_file, of_model) if trials_file is not None else None
    rows: list[dict[str, Any]] = []
    for distance in distances:
        asked = {"task": task.name, "seq_len": task.window, "distance": distance, "seed": seed}
        if perturbation is not None:
            asked["perturbation"] = str(perturbation)
        drawn = task.draw(distance, count, seed=seed)
        keys = [{**asked, "trial": i, "tokens_sha256": hash_tokens(trial.tokens)} for i, trial in enumerate(drawn)]
        done = {i: row for i, key in enumerate(keys) if (row := kept.row(key) if kept else None) is not None}
        if progress is not None and done:
            progress(len(done))
        left = [i for i in range(count) if i not in done]
        size = max(1, _TOKENS_PER_BATCH // task.window)
        for batch in (left[start : start + size] for start in range(0, len(left), size)):
            with model.hooks(fwd_hooks=[] if perturbation is None else perturbation.hooks(model)):
                for i, measured in zip(batch, _measured(model, task, [drawn[i] for i in batch]), strict=True):
                    done[i] = {**keys[i], **measured, "model": of_model}
                    if kept is not None:
                        kept.append(done[i])
            if progress is not None:
                progress(len(batch))
        rows += [done[i] for i in range(count)]
    frame = pd.DataFrame(rows)
    return frame.astype({"distance": "Int64", "needle_distance": "Int64"})


def _measured(model: HookedCausalLM, task: RetrievalTask, batch: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """What is found of each trial of a batch."""
    with model.measuring():
        with model.keeping_keys() if task.generates else nullcontext() as read:
            forced = list(_forced(model, batch))
        for row, (trial, (likely, logprob)) in enumerate(zip(batch, forced, strict=True)):
            tokens = task.written(model, trial, likely, read, row)
            text = task.text_of(tokens)
            hit = torch.equal(tokens, trial.answer)  # also where a tokenizer does not spell its tokens as they were
            yield {
                "needle_distance": trial.distance,
                "accuracy": 1.0 if hit else task.share_found(trial, text),
                "answer_logprob_nats": logprob,
                "references": list(trial.references),
                "written": text,
            }


class _TrialsFile:
    """A file of trials that are done: a JSON line for each, of one model."""

    _KEYS = ("task", "seq_len", "distance", "seed", "trial", "tokens_sha256")

    def __init__(self, path: str | os.PathLike[str], of_model: str) -> None:
        self._path = Path(path)
        if self._path.is_symlink():
            raise InputError(f"trials are kept in {str(path)!r}, but that is a link; remove it")
        self._rows: dict[tuple, dict[str, Any]] = {}
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # cut short while it was written
            with self._path.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
            lines = lines[:-1]
        for number, line in enumerate(lines, 1):
            row = self._parsed(line, number)
            if row["model"] != of_model:
                raise InputError(f"{path}, line {number} is a trial of another model; give each model its own file")
            self._rows[self._key(row)] = row

    def row(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row of a trial, if it is done."""
        return self._rows.get(self._key(key))

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row. Raises OSError where there is no room."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _key(self, row: dict[str, Any]) -> tuple:
        return (*(row[name] for name in self._KEYS), row.get("perturbation"))

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        wanted = {*self._KEYS, "model", "needle_distance", "accuracy", "answer_logprob_nats", "references", "written"}
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or set(row) - {"perturbation"} != wanted:
            raise InputError(f"{self._path}, line {number} is no trial; a file of trials has one JSON object a line")
        return row


def _fingerprint(model: HookedCausalLM) -> str:
    """What tells a model from others: its type and dtype, and the first numbers of each weight that is in memory."""
    digest = hashlib.sha256(f"{model.config.model_type} {model.dtype}".encode())
    for name, weight in model.original_model.named_parameters():
        digest.update(name.encode())
        if weight.device.type != "meta":
            digest.update(repr(weight.detach().flatten()[:_FINGERPRINT].double().tolist()).encode())
    return digest.hexdigest()[:16]


def forced_answers(
    model: HookedCausalLM, task: RetrievalTask, distance: int | None, *, trials: int, seed: int = 0
) -> pd.DataFrame:
    """A row for each trial: whether every token of the answer is the most likely one, given those before it.

    Columns: `trial`, `hit` (0 or 1) and `answer_logprob_nats`. One pass over each trial and nothing is written, so it
    is the quick measurement where hooks are attached. Raises InputError for a distance that does not fit the window,
    and for logits that are not finite.
    """
    rows = []
    for number, trial in enumerate(task.draw(distance, trials, seed=seed)):
        with model.measuring():
            ((likely, logprob),) = _forced(model, [trial])
        hit = float(torch.equal(likely, trial.answer))
        rows.append({"trial": number, "hit": hit, "answer_logprob_nats": logprob})
    return pd.DataFrame(rows)


def trials_hash(task: RetrievalTask, distance: int | None, count: int, *, seed: int) -> str:
    """SHA-256 of the tokens of a task's trials, for a manifest."""
    rows = [trial.tokens for trial in task.draw(distance, count, seed=seed)]
    return hash_tokens(pad_sequence(rows, batch_first=True, padding_value=-1))


@torch.no_grad()
def _forced(model: HookedCausalLM, batch: Sequence[Trial]) -> Iterator[tuple[Int[Tensor, " m"], float]]:
    """Per trial: the most likely token at each place of its answer, and the log-probability of the whole answer.

    Shorter trials are filled up behind, where a causal model does not look.
    """
    hidden = model.hidden(pad_sequence([trial.tokens[:-1] for trial in batch], batch_first=True))
    for row, trial in enumerate(batch):
        start = len(trial.prompt) - 1
        read = hidden[row : row + 1, start : start + len(trial.answer)]
        logits, answer = model.unembed(read)[0].float().cpu(), trial.answer.unsqueeze(1)
        model.require_finite(logits, "logits")
        yield logits.argmax(-1), logits.log_softmax(-1).gather(1, answer).double().sum().item()


def _accuracy_interval(shares: Sequence[float], answers: int) -> tuple[float, float]:
    if answers == 1:
        low, high = stats.binomtest(int(sum(shares)), len(shares)).proportion_ci(method="wilson")
    else:
        low, high = share_interval(shares, answers)  # answers of one trial go together, as trials of a seed do
    return float(low), float(high)


def _normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean; the mean itself where nothing varies."""
    mean, error = float(np.mean(values)), float(np.std(values)) / math.sqrt(len(values))
    low, high = stats.norm.interval(0.95, loc=mean, scale=error) if error else (mean, mean)
    return float(low), float(high)
