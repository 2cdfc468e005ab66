"""`rope-probe trace`: perturb what queries and keys say of position, and follow the change to the logits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rope_probe.cli import arms, sources
from rope_probe.cli.models import describe, how_to_load, recorded, tell_origin
from rope_probe.cli.options import (
    DONE,
    INPUT,
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
    Side,
    Sweep,
    Text,
    TokensFile,
    WindowTokens,
)
from rope_probe.cli.output import Table, show
from rope_probe.names import SWEEPS

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = (
    "rope-probe trace smollm2-135m --out runs/trace --window 256 --no-control",
    "rope-probe trace MODEL --out runs/heads --sweep head --layer 16",
    "rope-probe trace MODEL --out runs/frozen --freeze 0 --pair 30 --pair 31",
    "rope-probe trace MODEL --out runs/mine --perturbations mine.toml",
    "rope-probe trace MODEL --out runs/lens --sweep layer --lens --no-control",
)
_MOST = 10
"""How many parts a table of a sweep shows: those with the largest effect."""
_AGAIN = "Can be given again."


def command(
    model: Model,
    out: Out,
    window: WindowTokens = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document: Annotated[
        str | None,
        typer.Option(
            help="A document, repeated across the window: text, or token ids with commas between them.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    document_length: DocumentLength = 64,
    tokens: TokensFile = None,
    masked: Masked = False,
    sweep: Annotated[
        list[Sweep] | None,
        typer.Option(
            help=f"Go through one of {', '.join(SWEEPS)}, narrowed by --layer and --head. {_AGAIN}",
            metavar="SWEEP",
            show_default="dose and layer; none where something else is asked for",
            rich_help_panel=DONE,
        ),
    ] = None,
    shift: Annotated[
        list[float] | None,
        typer.Option(
            help=f"Tokens to shift by. {_AGAIN}",
            show_default="1/4, 1, 4, ... and the window, with --layer, --head or --pair",
            rich_help_panel=DONE,
        ),
    ] = None,
    jitter: Annotated[
        list[float] | None,
        typer.Option(help="Most tokens by which each position moves at random, by --seed.", rich_help_panel=DONE),
    ] = None,
    theta: Annotated[
        list[float] | None, typer.Option(help="Theta to rotate with instead of the model's.", rich_help_panel=DONE)
    ] = None,
    turn: Annotated[
        list[float] | None,
        typer.Option(help="Radians to turn pairs by, whatever their wavelength.", rich_help_panel=DONE),
    ] = None,
    freeze: Annotated[
        list[float] | None,
        typer.Option(help="Position to hold pairs at: content without position.", rich_help_panel=DONE),
    ] = None,
    offset: Annotated[
        list[float] | None, typer.Option(help="Tokens to move whole documents by.", rich_help_panel=DONE)
    ] = None,
    offset_document: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Documents that --offset moves.", show_default="the first, 0", rich_help_panel=DONE),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Factor on attention scores, moving nothing.", rich_help_panel=DONE),
    ] = None,
    perturbations: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of perturbations of any kind; see examples/perturbations.toml.", rich_help_panel=DONE
        ),
    ] = None,
    side: Annotated[
        list[Side] | None,
        typer.Option(
            help="q, k, or qk for both.",
            metavar="SIDE",
            show_default="each of q, k, qk; qk for --theta and --offset, q for --temperature",
            rich_help_panel=DONE,
        ),
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Layers to perturb.", show_default="all", rich_help_panel=DONE)
    ] = None,
    head: Annotated[
        list[int] | None, typer.Option(help="Heads to perturb.", show_default="all", rich_help_panel=DONE)
    ] = None,
    pair: Annotated[
        list[int] | None,
        typer.Option(help="Rotary pairs to perturb, 0 fastest.", show_default="all", rich_help_panel=DONE),
    ] = None,
    control: Annotated[
        bool, typer.Option(help="Measure in float64 too, to tell rounding from signal.", rich_help_panel=DONE)
    ] = True,
    lens: Annotated[
        bool,
        typer.Option("--lens", help="Read every layer by the model's own head, too.", rich_help_panel=DONE),
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
    """Perturb the positions of queries and keys and trace the change through the layers to the logits."""
    config = recorded(locals())
    import pandas as pd
    import torch

    from rope_probe.models.hooked import load_model
    from rope_probe.runs.progress import progress
    from rope_probe.runs.results import new_run
    from rope_probe.tracing.perturbation_files import read_perturbations
    from rope_probe.tracing.propagation import DELTAS, trace_work
    from rope_probe.tracing.propagation import trace as trace_deltas

    sizes = {
        "shift": shift,
        "jitter": jitter,
        "theta": theta,
        "turn": turn,
        "freeze": freeze,
        "offset": offset,
        "temperature": temperature,
    }
    asked = arms.Asked(
        sweeps=sweep,
        sizes={kind: given for kind, given in sizes.items() if given},
        sides=side,
        layers=layer,
        heads=head,
        pairs=pair,
        documents=offset_document,
        seed=seed,
        of_file=None if perturbations is None else read_perturbations(perturbations),
    )
    if asked.of_file is not None:  # what the file holds now
        config["perturbations"] = {arm: list(map(str, listed)) for arm, listed in asked.of_file.items()}
    source = sources.Source(text, packed, random, document, document_length, tokens)
    files = [*source.files, *([] if perturbations is None else [perturbations])]
    with new_run(out, "trace", config, overwrite=overwrite, inputs=[model, *files]) as run:
        hooked = load_model(model, **how_to_load(attn, dtype, device, device_map, adapter))
        tell_origin(model)
        read = sources.window_of(hooked, window, source, seed)
        by_arm = arms.perturbations_of(hooked, len(read), asked)
        work = trace_work(hooked, sum(map(len, by_arm.values())), lens=lens, control=control)
        twin = hooked.double() if control and hooked.dtype != torch.float64 else control
        with progress("layers of perturbed passes", work) as advance:
            traced = [
                trace_deltas(hooked, read, arm, masked=masked, lens=lens, control=twin, progress=advance).assign(
                    arm=name
                )
                for name, arm in by_arm.items()
            ]
        frame = pd.concat(traced)
        run.record(DELTAS, frame, model=model, seed=seed)
        describe(run, hooked, model, adapter)
        run.provenance.add_tokens("window", read, masked=masked)
    show(out, _tables(frame), command="trace", as_json=as_json)


def _tables(frame: "pd.DataFrame") -> list[Table]:
    """Logit KL of each arm: by dose, or of the parts with the largest effect; with a control, what is rounding."""
    from rope_probe.tracing.cone import LOGITS
    from rope_probe.tracing.propagation import is_rounding

    logits = frame[(frame["site"] == LOGITS) & (frame["metric"] == "kl_nats")]
    tables = []
    for arm, rows in logits.groupby("arm", sort=False):
        controlled = rows["value_float64"].notna().all()
        columns = ["value", "value_float64"] if controlled else ["value"]
        means = rows.groupby(["perturbation", "side"], sort=False)[columns].mean().reset_index()
        if controlled:
            rounding = is_rounding(means.assign(metric="kl_nats"))
            means["verdict"] = rounding.map({True: "rounding", False: "signal"})
        title = f"{arm}: KL of the logits, nats, mean over documents"
        if len(means) > 3 * _MOST:
            title += f"; the {_MOST} largest of {len(means)} on each side"
            means = means.sort_values("value", ascending=False).groupby("side", sort=False).head(_MOST)
        shown = means.drop(columns="side")
        names = {"value": "KL", "value_float64": "in float64"}
        tables.append(Table("logit_kl_nats", title, shown, labels={"arm": str(arm)}, names=names))
    return tables
