"""`rope-probe spans`: what changed in the weights of two checkpoints, by layer, head and rotary pair."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rope_probe.cli import sources
from rope_probe.cli.models import recorded, tell_origin, torch_dtype
from rope_probe.cli.options import (
    DONE,
    INPUT,
    SDPA,
    AcceptTerms,
    AsJson,
    Attn,
    Device,
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
    window_in_range,
)
from rope_probe.cli.output import Table, show
from rope_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = (
    "rope-probe spans BEFORE AFTER --out runs/spans",
    "rope-probe spans BEFORE ADAPTER --out runs/spans --states --window 1024",
)
_TOKENS_A_COMPARISON = 800
"""How many tokens a pass reads in the time that comparing the same weights takes, about (SmolLM2-135M, one core)."""


def command(
    before: Model,
    after: Annotated[
        str,
        typer.Argument(
            help="What it became: a checkpoint of the same architecture, or a PEFT adapter for it.",
            autocompletion=complete_model,
        ),
    ],
    out: Out,
    short: Annotated[
        int | None,
        typer.Option(
            min=1,
            callback=window_in_range,
            help="Window before, for bands of pairs.",
            show_default="its config's length",
            rich_help_panel=DONE,
        ),
    ] = None,
    long: Annotated[
        int | None,
        typer.Option(
            min=1,
            callback=window_in_range,
            help="Window after.",
            show_default="its config's length",
            rich_help_panel=DONE,
        ),
    ] = None,
    states: Annotated[
        bool,
        typer.Option(
            "--states",
            help="Run both models too, and compare their queries and keys on a window.",
            rich_help_panel=DONE,
        ),
    ] = False,
    window: WindowTokens = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a document of text or random ids.", show_default="64", rich_help_panel=INPUT
        ),
    ] = None,
    tokens: TokensFile = None,
    masked: Masked = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = None,
    attn: Attn = SDPA,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare the weights of two checkpoints by layer, head and rotary pair, and their queries and keys if asked.

    Weights are read tensor by tensor from safetensors files, so models of any size fit. Which of the changes matter is
    measured from Python, by rope_probe.span_effects.
    """
    config = recorded(locals())
    from rope_probe.models.hooked import load_model
    from rope_probe.models.pretrained import origin_of
    from rope_probe.runs.progress import progress
    from rope_probe.runs.results import new_run
    from rope_probe.spans import compare_spans, compare_states, landmarks, span_statistics
    from rope_probe.spans.states import SPAN_STATES
    from rope_probe.spans.statistics import LANDMARKS, SPAN_STATISTICS
    from rope_probe.spans.stored import describe_checkpoint, resolved, weights_of
    from rope_probe.spans.weights import SPANS

    of_states = (window, text, packed, random, document_length, tokens, masked, device, dtype, attn)
    if not states and of_states != (None, None, False, False, None, None, False, "cpu", None, SDPA):
        raise InputError(
            "--window, --text, --packed, --random, --document-length, --tokens, --masked, --device, --dtype and --attn "
            "need --states"
        )
    if tokens is not None and document_length is not None:
        raise InputError("--tokens and --document-length both say what to read; give one of them")
    source = sources.Source(text, packed, random, None, document_length or 64, tokens)
    with new_run(out, "spans", config, overwrite=overwrite, inputs=[before, after, *source.files]) as run:
        for name in (before, after):
            tell_origin(name)
        became = resolved(after, before)
        one, other = weights_of(before), weights_of(became)
        size = one.model.num_parameters()
        of_pass, read = 0, None
        if states:
            kind: dict[str, Any] = {"attn": attn.value, "dtype": torch_dtype(dtype), "device": device}
            adapter = None if became is after else after
            start, end = load_model(before, **kind), load_model(before if adapter else after, **kind, adapter=adapter)
            read = sources.window_of(start, window, source, seed)
            of_pass = size * len(read) // _TOKENS_A_COMPARISON
            run.provenance.add_tokens("window", read, masked=masked)
        with progress("weights compared", size + 2 * of_pass) as advance:
            if read is not None:
                compared = compare_states(start, end, read, masked=masked, progress=lambda _: advance(of_pass))
                run.record(SPAN_STATES, compared, model=after, seed=seed)
            changed = run.record(SPANS, compare_spans(before, became, progress=advance), model=after)
        short, long = (
            given or weights.model.config.max_position_embeddings for given, weights in ((short, one), (long, other))
        )
        statistics = span_statistics(changed, short=short, long=long, seed=seed)
        run.record(SPAN_STATISTICS, statistics, model=after, seed=seed)
        geometry = landmarks(one.model, other.model, short=short, long=long)
        run.record(LANDMARKS, geometry, model=after)
        kernel = attn.value if states else None
        base, merged = (after, None) if became is after else (before, after)
        for name, described, origin in (
            (before, describe_checkpoint(before), origin_of(before)),
            (after, describe_checkpoint(base, adapter=merged), origin_of(base)),
        ):
            run.provenance.models[name] = dataclasses.replace(described, attention_kernel=kernel, origin=origin)
    show(out, _tables(changed, statistics, geometry), command="spans", as_json=as_json)


def _tables(changed: "pd.DataFrame", statistics: "pd.DataFrame", geometry: "pd.DataFrame") -> list[Table]:
    """How much each part changed, how the queries' change is spread, and the query spans that changed most."""
    whole = changed[changed["head"].isna()]
    parts = whole.assign(part=whole["site"].str.rpartition(".")[2], layer=whole["layer"].astype("string").fillna("-"))
    by_layer, norms = (
        parts[parts["metric"] == metric].pivot_table(index="layer", columns="part", values="value", sort=False)
        for metric in ("rel_change", "change_norm")
    )
    wanted = statistics[statistics["site"].str.endswith(("W_Q", "W_K"))]
    spread = wanted.pivot_table(index=["site", "change"], columns="metric", values="value", sort=False)
    windows = geometry.pivot_table(index=["phase", "seq_len"], columns="metric", values="value", sort=False)
    by_pair = changed[changed["pair"].notna() & changed["site"].str.endswith("W_Q")]
    of_pair = by_pair.pivot_table(
        index=["layer", "head", "pair", "wavelength", "wavelength_after"], columns="metric", values="value"
    )
    columns = ["rel_change", "change_norm", "cosine", "norm_change", "rotation_tokens", "qk_rel_change"]
    most = of_pair.nlargest(10, "rel_change").reindex(columns=columns)
    told = (
        ("rel_change_by_layer", "Relative change of the weights by layer", by_layer, "{:.3g}", 1),
        ("change_norm_by_layer", "Norm of the change of the weights by layer", norms, "{:.3g}", 1),
        ("spread", "How it is spread over heads and pairs", spread, "{:.3g}", 2),
        ("landmarks", "Where the windows lie in the rotary spectrum", windows, "{:,.6g}", 2),
        ("largest", "The query spans that changed most", most, "{:.4g}", 3),
    )
    return [
        Table(key, title, frame.rename_axis(columns=None).reset_index(), number, keys)
        for key, title, frame, number, keys in told
    ]
