"""`rope-probe heads`: what each head attends to."""

from typing import TYPE_CHECKING, Annotated

import typer

from rope_probe.cli import sources
from rope_probe.cli.models import describe, how_to_load, recorded, tell_origin
from rope_probe.cli.options import (
    DONE,
    SDPA,
    AcceptTerms,
    Adapter,
    AsJson,
    Attn,
    Device,
    DeviceMap,
    DocumentLength,
    DtypeOption,
    Masked,
    Model,
    Out,
    Overwrite,
    Packed,
    Random,
    Seed,
    Text,
    TokensFile,
    WindowTokens,
)
from rope_probe.cli.output import Table, show
from rope_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from rope_probe.models.hooked import HookedCausalLM
    from rope_probe.retrieval.tasks import TextTask

EXAMPLES = (
    "rope-probe heads smollm2-135m --out runs/heads",
    "rope-probe heads MODEL --out runs/heads --window 1024 --pairs --trials 8",
    "rope-probe heads MODEL --out runs/massive --massive",
)
_SHOWN = 5
"""How many heads are printed of each kind of attention."""


def command(
    model: Model,
    out: Out,
    window: WindowTokens = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document_length: DocumentLength = 64,
    tokens: TokensFile = None,
    masked: Masked = False,
    layer: Annotated[
        list[int] | None, typer.Option(help="Layers to look at.", show_default="all", rich_help_panel=DONE)
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="What each rotary pair adds to scores, too.", rich_help_panel=DONE)
    ] = False,
    massive: Annotated[
        bool,
        typer.Option("--massive", help="How long queries and keys are in each pair, too.", rich_help_panel=DONE),
    ] = False,
    trials: Annotated[
        int,
        typer.Option(min=0, help="Passkey trials for the retrieval-head score; 0 leaves it out.", rich_help_panel=DONE),
    ] = 0,
    distance: Annotated[
        int | None,
        typer.Option(min=1, help="Their distance.", show_default="half the window", rich_help_panel=DONE),
    ] = None,
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
    """Say what each head attends to: the token before, earlier copies, the start, how far back, and by which pairs."""
    config = recorded(locals())
    import pandas as pd

    from rope_probe.models.hooked import load_model
    from rope_probe.retrieval.heads import retrieval_head_scores
    from rope_probe.runs.progress import progress
    from rope_probe.runs.results import new_run
    from rope_probe.tracing.heads import HEAD_PAIRS, HEADS, head_scores, pair_contributions
    from rope_probe.tracing.massive import MASSIVE_VALUES, massive_values

    if distance is not None and not trials:
        raise InputError("--distance is that of --trials; give both, or neither")
    source = sources.Source(text, packed, random, None, document_length, tokens)
    with new_run(out, "heads", config, overwrite=overwrite, inputs=[model, *source.files]) as run:
        hooked = load_model(model, **how_to_load(attn, dtype, device, device_map, adapter))
        tell_origin(model)
        read = sources.window_of(hooked, window, source, seed)
        task = _passkey(hooked, model, len(read)) if trials else None
        depth = len(hooked.blocks)
        work = (
            len(layer or hooked.blocks) * (1 + pairs + massive) + trials * depth
        )  # a trial is a pass through all layers
        with progress("layers", work) as advance:
            scores = head_scores(hooked, read, masked=masked, layers=layer, progress=advance)
            run.record(HEADS, scores, model=model, seed=seed)
            if pairs:
                contributions = pair_contributions(hooked, read, masked=masked, layers=layer, progress=advance)
                run.record(HEAD_PAIRS, contributions, model=model, seed=seed)
            lengths = None
            if massive:
                lengths = massive_values(hooked, read, masked=masked, layers=layer, progress=advance)
                run.record(MASSIVE_VALUES, lengths, model=model, seed=seed)
            if task is not None:
                copied = retrieval_head_scores(
                    hooked,
                    task,
                    [distance or len(read) // 2],
                    trials=trials,
                    seed=seed,
                    layers=layer,
                    progress=lambda done: advance(done * depth),
                )
                run.record(HEADS, copied, model=model, seed=seed)
                scores = pd.concat([scores, copied])
        describe(run, hooked, model, adapter)
        run.provenance.add_tokens("window", read, masked=masked)
    tables = [*_tables(scores), *([] if lengths is None else _tables_of_lengths(lengths))]
    show(out, tables, command="heads", as_json=as_json)


def _passkey(model: "HookedCausalLM", name: str, window: int) -> "TextTask":
    """The task that retrieval heads are looked for on."""
    from rope_probe.retrieval.tasks import TextTask

    if model.tokenizer is None:
        raise InputError(f"--trials are in text, but {name!r} has no tokenizer; leave them out")
    return TextTask("passkey", model.tokenizer, window)


def _tables(scores: "pd.DataFrame") -> list[Table]:
    """The heads with the largest share of each kind of attention."""
    from rope_probe.gallery.figures.heads import PANELS

    tables = []
    for metric, what in PANELS.items():
        rows = scores[(scores["metric"] == metric) & scores["value"].notna()]
        if len(rows):
            most = rows.nlargest(_SHOWN, "value")[["layer", "head", "value"]]
            title = f"{metric}, share of attention {what}: the largest"
            labels, names = {"metric": metric}, {"value": "share"}
            tables.append(Table("largest", title, most, "{:.3f}", keys=2, labels=labels, names=names))
    return tables


def _tables_of_lengths(lengths: "pd.DataFrame") -> list[Table]:
    """The rotary pairs that are longest against the median of their head, of queries, keys and values."""
    from rope_probe.gallery.figures.massive import PANELS

    ratios = lengths[(lengths["metric"] == "ratio") & lengths["pair"].notna() & lengths["value"].notna()]
    tables = []
    for states, what in PANELS.items():
        rows = ratios[ratios["states"] == states]
        if len(rows):
            most = rows.nlargest(_SHOWN, "value")[["layer", "head", "pair", "wavelength", "value"]]
            title = f"{what}, length of a pair over the median of its head: the largest"
            names = {"value": "ratio"}
            tables.append(Table("massive", title, most, "{:.3g}", keys=3, labels={"states": states}, names=names))
    return tables
