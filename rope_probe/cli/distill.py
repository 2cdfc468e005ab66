"""`rope-probe distill`: train a student through phases, as a TOML file says."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rope_probe.cli.options import DONE, MACHINE, OUTPUT, AsJson, Dtype, Kernel, seed_in_range
from rope_probe.cli.output import Fact, show
from rope_probe.errors import InputError
from rope_probe.names import MIRRORS, MISSED_GATE

if TYPE_CHECKING:
    from rope_probe.distillation import DistillConfig

EXAMPLES = (
    "rope-probe distill examples/text.toml",
    "rope-probe distill examples/longred_toy.toml --resume --mirror tensorboard",
)
_Mirror = StrEnum("_Mirror", {kind.upper(): kind for kind in MIRRORS})  # type: ignore[misc]


def command(
    config: Annotated[Path, typer.Argument(help="TOML file; see docs/distillation.md.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory to write.", show_default="the config's", rich_help_panel=OUTPUT),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was cut short.", rich_help_panel=DONE)
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, callback=seed_in_range, help="Seed.", show_default="the config's", rich_help_panel=DONE),
    ] = None,
    mirror: Annotated[
        _Mirror | None,
        typer.Option(
            help=f"Show the training log as it is written in {' or '.join(MIRRORS)}.",
            metavar="WHERE",
            show_default="the config's, or nowhere",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda.", show_default="the config's, or what is there", rich_help_panel=MACHINE),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="float32, or bfloat16 for autocast.", metavar="DTYPE", rich_help_panel=MACHINE)
    ] = None,
    attn: Annotated[
        Kernel | None,
        typer.Option(help="Attention kernel.", metavar="KERNEL", show_default="the config's", rich_help_panel=MACHINE),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a student through phases of a window and a theta each, by distillation, cross-entropy or a mix.

    Ctrl-C and SIGTERM end it after the step under way, with a snapshot that --resume goes on from; exit code 4.
    """
    from accelerate import PartialState

    from rope_probe.distillation import distill, read_config
    from rope_probe.runs.results import read_manifest

    changes = {"out": out, "seed": seed, "device": device, "dtype": dtype, "attn": attn, "mirror": mirror}
    given = {key: value if key == "seed" else str(value) for key, value in changes.items() if value is not None}
    settings = read_config(config, **given)
    try:
        run = distill(settings, resume=resume)
        missed = read_manifest(run).get("missed_gate")
        if PartialState().is_main_process:
            if missed:
                print(missed, file=sys.stderr)
            show(run, _facts(settings, run, missed), command="distill", as_json=as_json)
    finally:
        if PartialState._shared_state:
            PartialState().destroy_process_group()  # its threads would run into the interpreter's end
    if missed:
        raise typer.Exit(MISSED_GATE)


def _facts(config: "DistillConfig", run: Path, missed: str | None) -> list[Fact]:
    """The last checkpoint, and the command that measures it in lm-eval."""
    from rope_probe.distillation.job import CHECKPOINTS
    from rope_probe.retrieval.lm_eval import lm_eval_command

    phase = next(one for one in reversed(config.phases) if (run / CHECKPOINTS / one.name).exists())
    checkpoint = run / CHECKPOINTS / phase.name
    facts = [Fact("checkpoint", f"checkpoint: {checkpoint}", str(checkpoint)), Fact("missed_gate", "", missed)]
    try:
        measured = lm_eval_command(checkpoint, [max(stream.window for stream in phase.mix)])
    except InputError as error:
        return [*facts, Fact("lm_eval", f"lm_eval: {error}", None)]
    return [*facts, Fact("lm_eval", f"RULER's tasks by lm_eval:\n{measured}", measured)]
