"""Options that commands share: their types, their groups in --help, and what completes them in a shell."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from rope_probe.names import KERNELS, KEY_VALUE, LONGEST_WINDOW, PRETRAINED, SWEEPS, TEXT_TASKS

INPUT, DONE, OUTPUT, MACHINE = "Input", "What is done", "Output", "Machine"
"""Groups of options in --help."""


class Side(StrEnum):
    """What of attention is perturbed."""

    Q = "q"
    K = "k"
    QK = "qk"


class Dtype(StrEnum):
    """What to compute in."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Kernel = StrEnum("Kernel", {kernel.upper(): kernel for kernel in KERNELS})  # type: ignore[misc]
SDPA = Kernel("sdpa")
Sweep = StrEnum("Sweep", {kind.upper(): kind for kind in SWEEPS})  # type: ignore[misc]
Task = StrEnum("Task", {task.upper(): task for task in (KEY_VALUE, *TEXT_TASKS)})  # type: ignore[misc]


class Command(TyperCommand):
    """A command whose --help is narrow enough for 80 columns.

    What stands for an option's value is one word, and --help itself is in the last group, not in one of its own.
    """

    def get_params(self, ctx: Any) -> Any:
        """All of them, shortly named."""
        return _shortly_named(super().get_params(ctx))

    def get_help_option(self, ctx: Any) -> Any:
        """The option, put into its group."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = MACHINE
        return option


class Group(TyperGroup):
    """All commands; flags among its own options say nothing of types."""

    def get_params(self, ctx: Any) -> Any:
        """All of them, shortly named."""
        return _shortly_named(super().get_params(ctx))


def _shortly_named(params: Iterable[Any]) -> list[Any]:
    """The parameters, without the names that Python has for their types."""
    named = list(params)
    for param in named:
        if isinstance(param, TyperArgument):
            param.display_type_rich = lambda ctx: None  # type: ignore[method-assign]  # its own name is enough
        elif isinstance(param, TyperOption) and param.metavar is None:
            param.metavar = "" if param.is_flag else _word_of(str(param.type_descriptor.annotation))
    return named


def _word_of(annotation: str) -> str:
    """What --help shows for a value of this type."""
    if "Path" in annotation:
        return "PATH"
    return "N" if "int" in annotation or "float" in annotation else "TEXT"


def as_epilog(examples: Sequence[str]) -> str:
    """Examples as the end of a --help, a line each."""
    return "\n\n".join(["Examples:", *examples])


def window_in_range(tokens: int | None) -> int | None:
    """A window that is no slip of the keyboard. Raises typer.BadParameter for another."""
    if tokens is not None and tokens > LONGEST_WINDOW:
        raise typer.BadParameter(f"a window is {LONGEST_WINDOW} tokens or less, but it is {tokens}")
    return tokens


def windows_in_range(windows: list[int] | None) -> list[int] | None:
    """Windows that are no slips of the keyboard. Raises typer.BadParameter for another."""
    for tokens in windows or []:
        window_in_range(tokens)
    return windows


def seed_in_range(seed: int | None) -> int | None:
    """A seed that 63 bits hold. Raises typer.BadParameter for another."""
    if seed is not None and seed >= 2**63:
        raise typer.BadParameter(f"a seed is below 2^63, but it is {seed}")
    return seed


def complete_model(incomplete: str) -> list[str]:
    """Names of pretrained models, folders and .gguf files that begin with what is typed."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") or not incomplete else typed.parent
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        entries = []
    fitting = [entry for entry in entries if entry.is_dir() or entry.suffix == ".gguf"]
    paths = [f"{entry}/" if entry.is_dir() else str(entry) for entry in fitting if not entry.name.startswith(".")]
    return [name for name in (*PRETRAINED, *paths) if name.startswith(incomplete)]


def _accept_gemma_terms(accepted: bool) -> bool:
    if accepted:
        from rope_probe.models.pretrained import accept_terms

        accept_terms("gemma3-270m")
    return accepted


MODEL_HELP = f"Checkpoint folder, .gguf file, hub id, or a name: {', '.join(PRETRAINED)}."
Model = Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=complete_model)]

WindowTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        callback=window_in_range,
        help="Tokens in the window.",
        show_default="all of --tokens, or 512",
        rich_help_panel=INPUT,
    ),
]
DocumentLength = Annotated[
    int, typer.Option(min=1, help="Tokens of a document of text or random ids.", rich_help_panel=INPUT)
]
TokensFile = Annotated[
    Path | None,
    typer.Option(
        help="File of documents to pack, one a line: text, or token ids where the first line is numbers.",
        rich_help_panel=INPUT,
    ),
]
Masked = Annotated[
    bool, typer.Option("--masked/--unmasked", help="Keep attention inside documents.", rich_help_panel=INPUT)
]
Text = Annotated[
    Path | None,
    typer.Option(
        help="Text file to cut documents from.",
        show_default="the embedded text, where there is a tokenizer",
        rich_help_panel=INPUT,
    ),
]
Packed = Annotated[
    bool,
    typer.Option("--packed", help="Different documents of the text, instead of one repeated.", rich_help_panel=INPUT),
]
Random = Annotated[bool, typer.Option("--random", help="Random token ids instead of text.", rich_help_panel=INPUT)]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder of a PEFT adapter to merge into the model.", rich_help_panel=INPUT)
]
AcceptTerms = Annotated[
    bool,
    typer.Option(
        "--accept-gemma-terms",
        callback=_accept_gemma_terms,
        help="Accept the terms of use of gemma3-270m, once.",
        rich_help_panel=INPUT,
    ),
]

Seed = Annotated[
    int,
    typer.Option(min=0, callback=seed_in_range, help="Seed of everything drawn at random.", rich_help_panel=DONE),
]

Out = Annotated[Path, typer.Option(help="Run directory to write.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an older run of this command at --out.", rich_help_panel=OUTPUT),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=OUTPUT)]

Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1.", rich_help_panel=MACHINE)]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help=f"Dtype to compute in: {', '.join(Dtype)}.",
        metavar="DTYPE",
        show_default="as the checkpoint was saved",
        rich_help_panel=MACHINE,
    ),
]
Attn = Annotated[
    Kernel,
    typer.Option(help=f"Attention kernel: {', '.join(KERNELS)}.", metavar="KERNEL", rich_help_panel=MACHINE),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model: auto, or disk to leave its weights there (trace needs --no-control then).",
        show_default="no",
        rich_help_panel=MACHINE,
    ),
]
