"""`rope-probe drift`: how far an extended model is from the original."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rope_probe.cli import sources
from rope_probe.cli.models import describe, describe_as, how_to_load, recorded, tell_origin
from rope_probe.cli.options import (
    DONE,
    INPUT,
    SDPA,
    AcceptTerms,
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
    complete_model,
)
from rope_probe.cli.output import Fact, Part, Table, show
from rope_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = (
    "rope-probe drift smollm2-135m --theta 1e6 --out runs/drift",
    "rope-probe drift ORIGINAL EXTENDED --out runs/drift --window 1024",
)
_RESTORED = 6
"""How many layers LongReD restores in its published recipe."""


def command(
    original: Model,
    out: Out,
    extended: Annotated[
        str | None,
        typer.Argument(
            help="What it became: a checkpoint of the same architecture.",
            show_default="ORIGINAL, with --theta or --adapter",
            autocompletion=complete_model,
        ),
    ] = None,
    theta: Annotated[
        float | None,
        typer.Option(help="Run the extended model with this theta, untrained.", rich_help_panel=INPUT),
    ] = None,
    window: WindowTokens = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document_length: DocumentLength = 64,
    tokens: TokensFile = None,
    masked: Masked = False,
    layer: Annotated[
        list[int] | None, typer.Option(help="Layers to compare.", show_default="all", rich_help_panel=DONE)
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = None,
    attn: Attn = SDPA,
    device_map: DeviceMap = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of a PEFT adapter to merge into the extended model.", rich_help_panel=INPUT),
    ] = None,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Say how far an extended model has drifted from the original: hidden states, attention by head, next tokens.

    The text is read by the original's tokenizer.
    """
    config = recorded(locals())
    from rope_probe.models.hooked import load_model
    from rope_probe.runs.progress import progress
    from rope_probe.runs.results import new_run
    from rope_probe.spans.drift import DRIFT, drift

    if extended is None and theta is None and adapter is None:
        raise InputError("drift needs two models: name the extended one too, or give --theta or --adapter")
    if theta is not None and device_map is not None:
        raise InputError("--theta needs a copy of the model in memory; leave out --device-map")
    became = original if extended is None else extended
    source = sources.Source(text, packed, random, None, document_length, tokens)
    with new_run(out, "drift", config, overwrite=overwrite, inputs=[original, became, *source.files]) as run:
        before = load_model(original, **how_to_load(attn, dtype, device, device_map, None))
        for name in dict.fromkeys((original, became)):
            tell_origin(name)
        read = sources.window_of(before, window, source, seed)
        same_weights = extended is None and adapter is None
        after = before if same_weights else load_model(became, **how_to_load(attn, dtype, device, device_map, adapter))
        if theta is not None:
            from rope_probe.models.checkpoints import with_rope

            after = load_model(with_rope(after.original_model, theta), attn=attn.value)
        changes = {"theta": None if theta is None else f"{theta:g}", "adapter": adapter}
        changed = [f"{what} {value}" for what, value in changes.items() if value is not None]
        name = ", ".join([became, *changed])
        with progress("layers", len(layer or before.blocks)) as advance:
            frame = drift(before, after, read, masked=masked, layers=layer, progress=advance)
        run.record(DRIFT, frame, model=name, seed=seed)
        describe(run, before, original, None)
        describe_as(run, after, name, became, adapter)
        run.provenance.add_tokens("window", read, masked=masked)
    show(out, _parts(frame), command="drift", as_json=as_json)


def _parts(frame: "pd.DataFrame") -> list[Part]:
    """Drift by layer, what it costs, and the layers that LongReD would restore."""
    from rope_probe.spans.drift import COSINE_DISTANCE, FINAL_NORM, attention_by_layer, ranked_layers
    from rope_probe.tracing.cone import LOGITS

    of_states = frame[frame["metric"] == COSINE_DISTANCE]
    by_layer = of_states[of_states["layer"].notna()].set_index("layer")["value"].rename("cosine_distance").to_frame()
    attention = attention_by_layer(frame).rename(columns={"mean": "attention_kl_mean", "max": "attention_kl_max"})
    table = by_layer.join(attention).reset_index()  # "-" in layers without attention
    final = of_states.loc[of_states["site"] == FINAL_NORM, "value"].item()
    of_logits = frame[frame["site"] == LOGITS].set_index("metric")["value"]
    count = min(_RESTORED, len(attention))
    ranked = ranked_layers(frame, count)
    names = {
        "cosine_distance": "1 - cosine",
        "attention_kl_mean": "attention KL",
        "attention_kl_max": "largest of a head",
    }
    return [
        Table(
            "by_layer",
            "Drift by layer: hidden states, and attention KL in nats, mean over heads",
            table,
            names=names,
        ),
        Fact("final_cosine_distance", f"after the final norm: 1 - cosine {final:.3g}", float(final)),
        Fact(
            "logits",
            ", ".join(f"{metric} {value:.4g}" for metric, value in of_logits.items()),
            {str(metric): float(value) for metric, value in of_logits.items()},
        ),
        Fact(
            "largest_attention_kl_layers",
            f"layers of largest attention KL, with the last one ({count} of {len(attention)}): "
            f"{', '.join(map(str, ranked))}",
            list(map(int, ranked)),
        ),
    ]
