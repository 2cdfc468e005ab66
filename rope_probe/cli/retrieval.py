"""`rope-probe retrieval`: what a model finds again, by distance."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rope_probe.cli.models import describe, how_to_load, recorded, tell_origin
from rope_probe.cli.options import (
    DONE,
    INPUT,
    OUTPUT,
    SDPA,
    AcceptTerms,
    Adapter,
    AsJson,
    Attn,
    Device,
    DeviceMap,
    DtypeOption,
    Model,
    Out,
    Overwrite,
    Seed,
    Task,
    windows_in_range,
)
from rope_probe.cli.output import Table, show, tell
from rope_probe.errors import InputError
from rope_probe.names import KEY_VALUE, TEXT_TASKS

if TYPE_CHECKING:
    from rope_probe.retrieval.probe import KeyValueTask
    from rope_probe.retrieval.tasks import TextTask
    from rope_probe.runs.results import Run
    from rope_probe.tracing.perturbations import AttentionTemperature

EXAMPLES = (
    "rope-probe retrieval smollm2-135m --out runs/retrieval",
    "rope-probe retrieval MODEL --out runs/vt --task vt --window 4096 --trials 32",
    "rope-probe retrieval MODEL --out runs/map --map --window 1024 --window 4096",
    "rope-probe retrieval MODEL --out runs/export --task vt --ruler --lm-eval",
)
_WINDOW = 1024
"""Tokens of a trial, by default."""
_QUICK_TASKS = ("passkey", "niah_single_1", "fwe")
"""Tasks in text that end within minutes together; the default."""


def command(
    model: Model,
    out: Out,
    task: Annotated[
        list[Task] | None,
        typer.Option(
            help=f"{', '.join((KEY_VALUE, *TEXT_TASKS))}. Can be given again.",
            metavar="TASK",
            show_default="passkey, niah_single_1 and fwe, or key_value where the checkpoint has no tokenizer",
            rich_help_panel=DONE,
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            min=4,
            callback=windows_in_range,
            help="Tokens of a trial. Can be given again, with --map.",
            show_default=f"{_WINDOW}",
            rich_help_panel=INPUT,
        ),
    ] = None,
    distance: Annotated[
        list[int] | None,
        typer.Option(
            help="Distance, in tokens. Can be given again.",
            show_default="three in text, all powers of two for key_value",
            rich_help_panel=DONE,
        ),
    ] = None,
    as_map: Annotated[
        bool,
        typer.Option(
            "--map",
            help="Each distance in every window with room for it, which tells the two apart.",
            rich_help_panel=DONE,
        ),
    ] = False,
    temperature: Annotated[
        str | None,
        typer.Option(
            help="Factor on attention scores, or log_n with --reference.",
            metavar="X",
            show_default="none",
            rich_help_panel=DONE,
        ),
    ] = None,
    reference: Annotated[
        int | None,
        typer.Option(help="Window the model was trained on, for log_n.", show_default="none", rich_help_panel=DONE),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Trials of each task and distance.",
            show_default="8 in text, 128 of key_value",
            rich_help_panel=DONE,
        ),
    ] = None,
    keys: Annotated[
        int, typer.Option(min=2, help="Key tokens of key_value's vocabulary, from id 4 on.", rich_help_panel=INPUT)
    ] = 256,
    values: Annotated[
        int, typer.Option(min=1, help="Value tokens of key_value, after the keys.", rich_help_panel=INPUT)
    ] = 256,
    ruler: Annotated[
        bool,
        typer.Option(
            "--ruler",
            help="Also write OUT/ruler/TASK/validation.jsonl: trials and answers, as RULER has them.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    lm_eval: Annotated[
        bool,
        typer.Option(
            "--lm-eval",
            help="Also write OUT/lm_eval.json: results in the shape of lm-eval's.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = None,
    attn: Attn = SDPA,
    device_map: DeviceMap = None,
    adapter: Adapter = None,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Probe retrieval by distance: accuracy and log-probability of the answer, with 95% intervals.

    key_value is for toy vocabularies; the others are text, passkey and tasks of RULER, read by the model's tokenizer.
    With --map, the distances are all that the task has, unless they are given.
    Trials are kept at OUT.trials.jsonl as they are done, so the same command goes on after it was cut short.
    """
    config = recorded(locals())
    import pandas as pd

    from rope_probe.models.hooked import load_model
    from rope_probe.retrieval.export import lm_eval_results, ruler_lines, write_ruler
    from rope_probe.retrieval.maps import map_cells
    from rope_probe.retrieval.probe import RETRIEVAL, retrieval_accuracy, retrieval_trials, trials_hash
    from rope_probe.retrieval.tasks import TextTask
    from rope_probe.runs.progress import progress
    from rope_probe.runs.provenance import Read
    from rope_probe.runs.results import new_run

    windows = sorted(set(window or [_WINDOW]))
    if len(windows) > 1 and not as_map:
        raise InputError(f"windows {', '.join(map(str, windows))} make a map; add --map, or give one of them")
    config["window"] = windows if len(windows) > 1 else windows[0]
    perturbation = _temperature(temperature, reference)
    with new_run(out, "retrieval", config, overwrite=overwrite, inputs=[model]) as run:
        hooked = load_model(model, **how_to_load(attn, dtype, device, device_map, adapter))
        tell_origin(model)
        tasks = tasks_of(model, task, windows[-1], keys, values)
        if ruler and any(one.name == KEY_VALUE for one in tasks):
            raise InputError(f"--ruler writes text, and {KEY_VALUE} has none; take one of {', '.join(TEXT_TASKS)}")
        if as_map and not task:  # the default, less what has no distances
            tasks = [one for one in tasks if one.distances() != [None]]
        sweeps = [one.default_distances() for one in tasks]
        if distance and all(sweep == [None] for sweep in sweeps):
            raise InputError(f"--distance says nothing to {', '.join(one.name for one in tasks)}; leave it out")
        sweeps = [distance if distance and sweep != [None] else sweep for sweep in sweeps]
        counts = [trials or one.default_trials for one in tasks]
        plan = list(zip(tasks, sweeps, counts, strict=True))
        if as_map:
            plan = [
                (cell, fitting, count)
                for one, count in zip(tasks, counts, strict=True)
                for cell, fitting in map_cells(hooked, one, windows, distance, trials=trials, seed=seed)
            ]
        hashes = [  # before anything is measured, since this is where a distance or a window that does not fit is found
            (one.name, trials_hash(one, d, count, seed=seed)) for one, sweep, count in plan for d in sweep
        ]
        with (
            _kept_trials(out, run) as kept,
            progress("trials", sum(count * len(sweep) for _, sweep, count in plan)) as advance,
        ):
            frames = []
            for one, sweep, count in plan:
                frame = retrieval_accuracy(
                    hooked,
                    one,
                    sweep,
                    trials=count,
                    seed=seed,
                    perturbation=perturbation,
                    progress=advance,
                    trials_file=kept,
                )
                frames.append(run.record(RETRIEVAL, frame, model=model))
        if ruler or lm_eval:
            rows = [
                retrieval_trials(  # all of them are in the file by now, so nothing is measured again
                    hooked, one, sweep, trials=count, seed=seed, perturbation=perturbation, trials_file=kept
                )
                for one, sweep, count in plan
            ]
            if ruler:
                lines = [
                    line
                    for (one, sweep, count), results in zip(plan, rows, strict=True)
                    if isinstance(one, TextTask)
                    for line in ruler_lines(one, sweep, trials=count, seed=seed, results=results)
                ]
                write_ruler(lines, run.folder / "ruler")
            if lm_eval:
                shape = lm_eval_results(pd.concat(rows), model=model, settings={"dtype": str(hooked.dtype)})
                (run.folder / "lm_eval.json").write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")
        describe(run, hooked, model, adapter)
        for name, digest in hashes:
            run.provenance.add_read(name, Read(digest))
    kept.unlink(missing_ok=True)  # only now: had the run failed at its end, its trials would still be there
    place = ["task", *(["seq_len"] if as_map else []), "distance", "metric"]
    shown = pd.concat(frames)[[*place, "value", "low", "high"]]
    title = f"Retrieval by {'window and distance' if as_map else 'distance'}, with 95% intervals"
    table = Table("retrieval", title, shown, "{:.3f}", keys=len(place), names={"seq_len": "window"})
    show(out, [table], command="retrieval", as_json=as_json)


def _temperature(factor: str | None, reference: int | None) -> "AttentionTemperature | None":
    """What --temperature and --reference ask for. Raises InputError for what is no temperature."""
    from rope_probe.tracing.perturbations import AttentionTemperature

    if factor is None:
        if reference is not None:
            raise InputError("--reference goes with --temperature log_n; give both, or neither")
        return None
    if factor == "log_n":
        return AttentionTemperature("log_n", reference=reference)
    try:
        number = float(factor)
    except ValueError:
        raise InputError(f"--temperature must be a number or log_n, but it is {factor!r}") from None
    return AttentionTemperature(number, reference=reference)


@contextmanager
def _kept_trials(out: Path, run: "Run") -> Iterator[Path]:
    """The file beside `out` where trials are kept as they are done; it is copied into the run at the end.

    What was begun here is removed where input turns out to be bad; where the work is cut short, it stays.
    """
    target = out.resolve()
    kept = target.with_name(f"{target.name}.trials.jsonl")
    begun_before = kept.exists() or kept.is_symlink()
    try:
        yield kept
    except InputError:
        if not begun_before:
            kept.unlink(missing_ok=True)
        raise
    except KeyboardInterrupt:
        if kept.exists():
            tell(f"what is done so far is in {str(kept)!r}; the same command goes on from there")
        raise
    shutil.copyfile(kept, run.folder / "trials.jsonl")


def tasks_of(
    model: str, asked: list[Task] | None, window: int, keys: int, values: int
) -> "list[KeyValueTask | TextTask]":
    """The tasks asked for, or those by default. Raises InputError for one in text without a tokenizer."""
    from rope_probe.models import checkpoints
    from rope_probe.retrieval.probe import KeyValueTask
    from rope_probe.retrieval.tasks import TextTask
    from rope_probe.windows.corpora import KeyValueStream

    tokenizer = None if asked == [KEY_VALUE] else checkpoints.load_tokenizer(model)
    tasks: list[KeyValueTask | TextTask] = []
    default = (KEY_VALUE,) if tokenizer is None else _QUICK_TASKS
    names = list(dict.fromkeys(map(str, asked) if asked else default))
    for name in names:
        if name == KEY_VALUE:
            stream = KeyValueStream(window, distinct=(1, keys), keys=keys, values=values)
            tasks.append(KeyValueTask(stream, window))
        elif tokenizer is None:
            raise InputError(f"task {name!r} is text, but {model!r} has no tokenizer; only key_value runs without")
        else:
            tasks.append(TextTask(name, tokenizer, window))
    return tasks
