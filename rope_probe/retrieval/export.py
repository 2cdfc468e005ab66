"""Retrieval for other tools: trials as RULER's data files, results in the shape of lm-eval's JSON.

RULER (https://github.com/NVIDIA/RULER) keeps a task as `TASK/validation.jsonl`, an object a line with `index`, `input`,
`outputs` and `length`; its predictions are the same with `pred`, `others` and `truncation`. lm-eval
(https://github.com/EleutherAI/lm-evaluation-harness) has `METRIC,FILTER` and `METRIC_stderr,FILTER` for each task.
What neither knows, such as a distance, stands beside in keys of our own.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from rope_probe.errors import InputError
from rope_probe.names import TEXT_TASKS
from rope_probe.retrieval.tasks import TextTask
from rope_probe.runs.provenance import hash_tokens

TASK_VERSION = 1.0
"""Of the tasks as they are drawn; to be raised when their trials change."""
_METRICS = ("accuracy", "answer_logprob_nats")
_FILTER = "none"


def ruler_lines(
    task: TextTask,
    distances: Sequence[int | None] | None = None,
    *,
    trials: int | None = None,
    seed: int = 0,
    results: pd.DataFrame | None = None,
) -> list[dict[str, Any]]:
    """The trials of a task as lines of RULER's data files, in the order of `retrieval_trials`; arguments as there.

    `index` counts all lines; `input` is the prompt, with the beginning of the answer, without BOS; `outputs` are the
    strings to be found; `length` is the tokens of prompt and answer. Keys of our own: `task`, `seq_len`, `distance`
    (asked for), `needle_distance` (in tokens, as it came out), `seed`, `trial` and `tokens_sha256`.
    With `results`, what `retrieval_trials` gave for the same trials, each line is a prediction too: `pred` is what the
    model wrote, `others` and `truncation` are what RULER has there by default, and `accuracy` and
    `answer_logprob_nats` are beside.

    Raises InputError for a task that is not one of text, for a distance that does not fit, for results in which a trial
    is missing, or stands several times.
    """
    if not isinstance(task, TextTask):
        raise InputError(
            f"RULER's files hold text, and {task.name} has only token ids; export one of {', '.join(TEXT_TASKS)}"
        )
    chosen = task.default_distances() if distances is None else distances
    count = task.default_trials if trials is None else trials
    lines: list[dict[str, Any]] = []
    for distance in chosen:
        for number, trial in enumerate(task.draw(distance, count, seed=seed)):
            line: dict[str, Any] = {
                "index": len(lines),
                "input": task.text_of(trial.prompt),
                "outputs": list(trial.references),
                "length": len(trial.tokens),
                "task": task.name,
                "seq_len": task.window,
                "distance": distance,
                "needle_distance": trial.distance,
                "seed": seed,
                "trial": number,
                "tokens_sha256": hash_tokens(trial.tokens),
            }
            lines.append(line if results is None else {**line, **_prediction(results, line)})
    return lines


def _prediction(results: pd.DataFrame, line: Mapping[str, Any]) -> dict[str, Any]:
    """What a model made of a trial, by RULER's names."""
    same = (results["task"] == line["task"]) & (results["tokens_sha256"] == line["tokens_sha256"])
    same &= (results["seq_len"] == line["seq_len"]) & (results["seed"] == line["seed"])
    rows = results[same & (results["trial"] == line["trial"])]
    if len(rows) != 1:
        raise InputError(
            f"results must have every trial once, but trial {line['trial']} of {line['task']} at distance "
            f"{line['distance']} in window {line['seq_len']} is there {len(rows)} times"
        )
    row = rows.iloc[0]
    measured = {metric: float(row[metric]) for metric in _METRICS}
    return {"pred": str(row["written"]), "others": {}, "truncation": -1, **measured}


def write_ruler(lines: Iterable[Mapping[str, Any]], folder: str | os.PathLike[str]) -> list[Path]:
    """Write lines as RULER lays them out, `folder/TASK/validation.jsonl`, and return the files.

    A task's lines are numbered anew in its file, so that several windows and seeds can go into one. Raises InputError
    for no lines, and for a file that is there already.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_task.setdefault(line["task"], []).append(line)
    if not by_task:
        raise InputError("there are no trials to write; give ruler_lines a distance and trials")
    files = {task: Path(folder) / task / "validation.jsonl" for task in by_task}
    if there := [file for file in files.values() if file.exists()]:
        raise InputError(f"{there[0]} is there already; give another folder, or remove it")
    for task, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        numbered = ({**line, "index": index} for index, line in enumerate(by_task[task]))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in numbered)
        file.write_text(text, encoding="utf-8")
    return list(files.values())


def lm_eval_results(trials: pd.DataFrame, *, model: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `retrieval_trials` measured, in the shape of lm-eval's results JSON; frames of several tasks can be joined.

    Each task, window and distance is a task of its own there, named after them; `configs` has them as numbers. A value
    is the mean over trials (of all seeds), and its stderr lm-eval's: the sample's standard deviation over the root of
    their number, "N/A" for one trial. `model` is what the model is called, and `settings` what else `config` is to
    say, such as dtype or rope parameters.

    Scores are those of our own tasks, which follow RULER in words of their own: not to be mixed with lm-eval's.
    Raises InputError for a frame without trials, and for one with several models or perturbations.
    """
    needed = {"task", "seq_len", "distance", "seed", "trial", "model", *_METRICS}
    if missing := sorted(needed - set(trials.columns)):
        raise InputError(f"lm-eval's shape is made of trials, which have a column {missing[0]!r}; see retrieval_trials")
    if trials.empty:
        raise InputError("there are no trials to export")
    told = trials["perturbation"].fillna("") if "perturbation" in trials else pd.Series("", trials.index)
    for what, several in (("models", trials["model"].unique()), ("perturbations", told.unique())):
        if len(several) > 1:
            raise InputError(f"these trials are of {len(several)} {what}; export one at a time")
    shape: dict[str, Any] = {
        "results": {}, "group_subtasks": {}, "configs": {}, "versions": {}, "n-shot": {}, "higher_is_better": {},
        "n-samples": {},
    }  # fmt: skip
    for (task, window, distance), rows in trials.groupby(["task", "seq_len", "distance"], dropna=False, sort=False):
        at = None if pd.isna(distance) else int(distance)
        name = f"{task}_{window}" if at is None else f"{task}_{window}_{at}"
        alias = f"{task}, window {window}" if at is None else f"{task}, window {window}, distance {at}"
        shape["results"][name] = {"alias": alias, **_means(rows)}
        shape["group_subtasks"][name] = []
        shape["configs"][name] = {
            "task": name,
            "output_type": "generate_until",
            "num_fewshot": 0,
            "metadata": {
                "version": TASK_VERSION,
                "task": task,
                "window": int(window),
                "distance": at,
                "seeds": sorted(int(seed) for seed in rows["seed"].unique()),
            },
        }
        shape["versions"][name] = TASK_VERSION
        shape["n-shot"][name] = 0
        shape["higher_is_better"][name] = dict.fromkeys(_METRICS, True)
        shape["n-samples"][name] = {"original": len(rows), "effective": len(rows)}
    config: dict[str, Any] = {
        "model": "rope_probe",
        "model_args": {"pretrained": model},
        "limit": None,
        "gen_kwargs": {"do_sample": False},
    }
    if perturbation := told.iloc[0]:
        config["perturbation"] = perturbation
    return {
        **shape,
        "config": {**config, **(settings or {})},
        "model_name": model,
        "model_source": "rope_probe",
        "rope_probe_version": version("rope_probe"),
        "transformers_version": version("transformers"),
    }


def _means(rows: pd.DataFrame) -> dict[str, float | str]:
    """Means over trials by lm-eval's names, each with its standard error."""
    found: dict[str, float | str] = {}
    for metric in _METRICS:
        values = rows[metric].astype(float)
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else "N/A"
        found |= {f"{metric},{_FILTER}": float(values.mean()), f"{metric}_stderr,{_FILTER}": error}
    return found
