"""The command line, `rope-probe`: typed functions, one line on stderr and exit code 2 for bad input."""

import dataclasses
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from rope_probe.errors import InputError, Stopped, is_out_of_memory
from rope_probe.names import (
    INTERRUPTED,
    KERNELS,
    KEY_VALUE,
    LONGEST_WINDOW,
    MISSED_GATE,
    STOPPED,
    SWEEPS,
    TEXT_TASKS,
)

if TYPE_CHECKING:  # what takes seconds to import is imported by the commands that use it
    import pandas as pd
    import torch

    from rope_probe.models.hooked import HookedCausalLM
    from rope_probe.retrieval.probe import RetrievalTask
    from rope_probe.runs.results import Run
    from rope_probe.tracing.perturbations import Perturbation
    from rope_probe.windows.packing import Window

BAD_INPUT = 2
_LONGEST_LINE = 560
_QUICK_TASKS = ("passkey", "niah_single_1", "fwe")
"""Tasks in text that end within minutes together; retrieval's default."""
_NEEDS_LESS_MEMORY = {
    "trace": "a shorter --window, --no-control or --dtype bfloat16 needs less",
    "spans": "a shorter --window, or no --states, needs less",
    "retrieval": "a shorter --window or --dtype bfloat16 needs less",
    "drift": "a shorter --window, fewer layers (--layer) or --dtype bfloat16 needs less",
    "distill": "a smaller batch_tokens or window, or a larger accumulate, needs less",
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Probe rotary position embeddings in Hugging Face language models.",
)


class _Side(StrEnum):
    Q = "q"
    K = "k"
    QK = "qk"


class _Dtype(StrEnum):
    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_Kernel = StrEnum("_Kernel", {kernel.upper(): kernel for kernel in KERNELS})  # type: ignore[misc]
_SDPA = _Kernel("sdpa")
_Sweep = StrEnum("_Sweep", {kind.upper(): kind for kind in SWEEPS})  # type: ignore[misc]
_Task = StrEnum("_Task", {task.upper(): task for task in (KEY_VALUE, *TEXT_TASKS)})  # type: ignore[misc]

Out = Annotated[Path, typer.Option(help="Run directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older run of this command at --out.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything drawn at random.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1.")]
Dtype = Annotated[_Dtype | None, typer.Option(help="Dtype to compute in; as the checkpoint was saved by default.")]
Attn = Annotated[_Kernel, typer.Option(help="Attention kernel.")]
WindowTokens = Annotated[
    int | None,
    typer.Option(min=1, max=LONGEST_WINDOW, help="Tokens in the window [default: all of --tokens, or 512]."),
]
DocumentLength = Annotated[int, typer.Option(min=1, help="Tokens of a document of text or random ids.")]
TokensFile = Annotated[Path | None, typer.Option(help="File of documents to pack: token ids, one document a line.")]
Masked = Annotated[bool, typer.Option("--masked/--unmasked", help="Keep attention inside documents.")]
Text = Annotated[
    Path | None,
    typer.Option(help="Text file to cut documents from [default: the embedded text, where there is a tokenizer]."),
]
Packed = Annotated[bool, typer.Option("--packed", help="Different documents of the text, instead of one repeated.")]
Random = Annotated[bool, typer.Option("--random", help="Random token ids instead of text.")]
_MODEL = "Checkpoint folder, .gguf file, hub id, or a name: smollm2-135m, gemma3-270m."
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread the model: auto, or disk to leave its weights there (with --no-control) [default: no]."),
]
Adapter = Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter to merge into the model.")]


def _accept_gemma_terms(accepted: bool) -> bool:
    if accepted:
        from rope_probe.models.pretrained import accept_terms

        accept_terms("gemma3-270m")
    return accepted


AcceptTerms = Annotated[
    bool,
    typer.Option(
        "--accept-gemma-terms", callback=_accept_gemma_terms, help="Accept the terms of use of gemma3-270m, once."
    ),
]


@app.callback()
def _rope_probe() -> None:
    """Probe rotary position embeddings in Hugging Face language models."""


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    out: Out,
    window: WindowTokens = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document: Annotated[
        str | None, typer.Option(help="Token ids, comma separated, repeated across the window.")
    ] = None,
    document_length: DocumentLength = 64,
    tokens: TokensFile = None,
    masked: Masked = False,
    sweep: Annotated[
        list[_Sweep] | None,
        typer.Option(
            help="What to go through, narrowed by --layer and --head [default: dose and layer; with --shift or --pair "
            "none]."
        ),
    ] = None,
    shift: Annotated[
        list[float] | None, typer.Option(help="Tokens to shift by [default: 1/4, 1, 4, ... and the window].")
    ] = None,
    side: Annotated[list[_Side] | None, typer.Option(help="What to shift [default: each of q, k, qk].")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Layers to shift [default: all].")] = None,
    head: Annotated[list[int] | None, typer.Option(help="Heads to shift [default: all].")] = None,
    pair: Annotated[list[int] | None, typer.Option(help="Rotary pairs to shift, 0 fastest [default: all].")] = None,
    control: Annotated[bool, typer.Option(help="Measure in float64 too, to tell rounding from signal.")] = True,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    attn: Attn = _SDPA,
    device_map: DeviceMap = None,
    adapter: Adapter = None,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
) -> None:
    """Shift the positions of queries and keys and trace the change through the layers to the logits."""
    config = _recorded(locals())
    import pandas as pd
    import torch

    from rope_probe.models.hooked import load_model
    from rope_probe.runs.progress import progress
    from rope_probe.runs.results import new_run
    from rope_probe.tracing.propagation import DELTAS, trace_work
    from rope_probe.tracing.propagation import trace as trace_deltas

    source = _Source(text, packed, random, document, document_length, tokens)
    with new_run(out, "trace", config, overwrite=overwrite, inputs=[model, *source.files]) as run:
        hooked = load_model(model, **_how(attn, dtype, device, device_map, adapter))
        _tell_origin(model)
        read = _window(hooked, window, source, seed)
        arms = _perturbations(hooked, len(read), sweep, shift, side, layer, head, pair)
        work = trace_work(hooked, sum(map(len, arms.values())), control=control)
        twin = hooked.double() if control and hooked.dtype != torch.float64 else control
        with progress("layers of perturbed passes", work) as advance:
            traced = [
                trace_deltas(hooked, read, arm, masked=masked, control=twin, progress=advance).assign(arm=name)
                for name, arm in arms.items()
            ]
        frame = pd.concat(traced)
        run.record(DELTAS, frame, model=model, seed=seed)
        _describe(run, hooked, model, adapter)
        run.provenance.add_tokens("window", read, masked=masked)
    _show(out, *_trace_tables(frame))


@app.command()
def spans(
    before: Annotated[str, typer.Argument(help=_MODEL)],
    after: Annotated[
        str, typer.Argument(help="What it became: a checkpoint of the same architecture, or a PEFT adapter for it.")
    ],
    out: Out,
    short: Annotated[
        int | None,
        typer.Option(
            min=1, max=LONGEST_WINDOW, help="Window before, for bands of pairs [default: its config's length]."
        ),
    ] = None,
    long: Annotated[
        int | None, typer.Option(min=1, max=LONGEST_WINDOW, help="Window after [default: its config's length].")
    ] = None,
    states: Annotated[
        bool, typer.Option("--states", help="Run both models too, and compare their queries and keys on a window.")
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(min=1, max=LONGEST_WINDOW, help="Tokens in that window [default: all of --tokens, or 512]."),
    ] = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a document of text or random ids [default: 64].")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="File of documents to pack instead: token ids, one document a line.")
    ] = None,
    masked: Masked = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    attn: Attn = _SDPA,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare the weights of two checkpoints by layer, head and rotary pair, and their queries and keys if asked.

    Weights are read tensor by tensor from safetensors files, so models of any size fit.
    """
    config = _recorded(locals())
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
    if not states and of_states != (None, None, False, False, None, None, False, "cpu", None, _SDPA):
        raise InputError(
            "--window, --text, --packed, --random, --document-length, --tokens, --masked, --device, --dtype and --attn "
            "need --states"
        )
    if tokens is not None and document_length is not None:
        raise InputError("--tokens and --document-length both say what to read; give one of them")
    source = _Source(text, packed, random, None, document_length or 64, tokens)
    with new_run(out, "spans", config, overwrite=overwrite, inputs=[before, after, *source.files]) as run:
        for name in (before, after):
            _tell_origin(name)
        became = resolved(after, before)
        one, other = weights_of(before), weights_of(became)
        if states:
            kind: dict[str, Any] = {"attn": attn.value, "dtype": _torch_dtype(dtype), "device": device}
            adapter = None if became is after else after
            start, end = load_model(before, **kind), load_model(before if adapter else after, **kind, adapter=adapter)
            read = _window(start, window, source, seed)
            run.record(SPAN_STATES, compare_states(start, end, read, masked=masked), model=after, seed=seed)
            run.provenance.add_tokens("window", read, masked=masked)
        with progress("weights compared", one.model.num_parameters()) as advance:
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
    _show(out, *_spans_tables(changed, statistics, geometry))


@app.command()
def heads(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    out: Out,
    window: WindowTokens = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document_length: DocumentLength = 64,
    tokens: TokensFile = None,
    masked: Masked = False,
    layer: Annotated[list[int] | None, typer.Option(help="Layers to look at [default: all].")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="What each rotary pair adds to scores, too.")] = False,
    trials: Annotated[
        int, typer.Option(min=0, help="Passkey trials for the retrieval-head score; 0 leaves it out.")
    ] = 0,
    distance: Annotated[int | None, typer.Option(min=1, help="Their distance [default: half the window].")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    attn: Attn = _SDPA,
    device_map: DeviceMap = None,
    adapter: Adapter = None,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
) -> None:
    """Say what each head attends to: the token before, earlier copies, the start, how far back, and by which pairs."""
    config = _recorded(locals())
    from rope_probe.models.hooked import load_model
    from rope_probe.runs.progress import progress
    from rope_probe.runs.results import new_run
    from rope_probe.tracing.heads import HEAD_PAIRS, HEADS, head_scores, pair_contributions

    if distance is not None and not trials:
        raise InputError("--distance is that of --trials; give both, or neither")
    source = _Source(text, packed, random, None, document_length, tokens)
    with new_run(out, "heads", config, overwrite=overwrite, inputs=[model, *source.files]) as run:
        hooked = load_model(model, **_how(attn, dtype, device, device_map, adapter))
        _tell_origin(model)
        read = _window(hooked, window, source, seed)
        layers = len(layer or hooked.blocks)
        with progress("layers", layers * (1 + pairs)) as advance:
            scores = head_scores(hooked, read, masked=masked, layers=layer, progress=advance)
            run.record(HEADS, scores, model=model, seed=seed)
            if pairs:
                contributions = pair_contributions(hooked, read, masked=masked, layers=layer, progress=advance)
                run.record(HEAD_PAIRS, contributions, model=model, seed=seed)
        if trials:
            scores = _with_retrieval_heads(run, hooked, scores, model, layer, trials, distance, len(read), seed)
        _describe(run, hooked, model, adapter)
        run.provenance.add_tokens("window", read, masked=masked)
    _show(out, *_head_tables(scores))


def _with_retrieval_heads(
    run: "Run",
    model: "HookedCausalLM",
    scores: "pd.DataFrame",
    name: str,
    layers: list[int] | None,
    trials: int,
    distance: int | None,
    window: int,
    seed: int,
) -> "pd.DataFrame":
    """The scores and, recorded too, those of retrieval heads on passkeys."""
    import pandas as pd

    from rope_probe.retrieval.heads import retrieval_head_scores
    from rope_probe.retrieval.tasks import TextTask
    from rope_probe.runs.progress import progress
    from rope_probe.tracing.heads import HEADS

    if model.tokenizer is None:
        raise InputError(f"--trials are in text, but {name!r} has no tokenizer; leave them out")
    task = TextTask("passkey", model.tokenizer, window)
    with progress("trials", trials) as advance:
        copied = retrieval_head_scores(
            model, task, [distance or window // 2], trials=trials, seed=seed, layers=layers, progress=advance
        )
    run.record(HEADS, copied, model=name, seed=seed)
    return pd.concat([scores, copied])


@app.command(name="drift")
def drift_command(
    original: Annotated[str, typer.Argument(help=_MODEL)],
    out: Out,
    extended: Annotated[
        str | None,
        typer.Argument(
            help="What it became: a checkpoint of the same architecture [default: ORIGINAL, with --theta or --adapter]."
        ),
    ] = None,
    theta: Annotated[float | None, typer.Option(help="Run the extended model with this theta, untrained.")] = None,
    window: WindowTokens = None,
    text: Text = None,
    packed: Packed = False,
    random: Random = False,
    document_length: DocumentLength = 64,
    tokens: TokensFile = None,
    masked: Masked = False,
    layer: Annotated[list[int] | None, typer.Option(help="Layers to compare [default: all].")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    attn: Attn = _SDPA,
    device_map: DeviceMap = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a PEFT adapter to merge into the extended model.")
    ] = None,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
) -> None:
    """Say how far an extended model has drifted from the original: hidden states, attention by head, next tokens.

    The text is read by the original's tokenizer.
    """
    config = _recorded(locals())
    from rope_probe.models.hooked import load_model
    from rope_probe.runs.progress import progress
    from rope_probe.runs.results import new_run
    from rope_probe.spans.drift import DRIFT, drift

    if extended is None and theta is None and adapter is None:
        raise InputError("drift needs two models: name the extended one too, or give --theta or --adapter")
    if theta is not None and device_map is not None:
        raise InputError("--theta needs a copy of the model in memory; leave out --device-map")
    became = original if extended is None else extended
    source = _Source(text, packed, random, None, document_length, tokens)
    with new_run(out, "drift", config, overwrite=overwrite, inputs=[original, became, *source.files]) as run:
        before = load_model(original, **_how(attn, dtype, device, device_map, None))
        for name in dict.fromkeys((original, became)):
            _tell_origin(name)
        read = _window(before, window, source, seed)
        same_weights = extended is None and adapter is None
        after = before if same_weights else load_model(became, **_how(attn, dtype, device, device_map, adapter))
        if theta is not None:
            from rope_probe.models.checkpoints import with_rope

            after = load_model(with_rope(after.original_model, theta), attn=attn.value)
        changes = {"theta": None if theta is None else f"{theta:g}", "adapter": adapter}
        changed = [f"{what} {value}" for what, value in changes.items() if value is not None]
        name = ", ".join([became, *changed])
        with progress("layers", len(layer or before.blocks)) as advance:
            frame = drift(before, after, read, masked=masked, layers=layer, progress=advance)
        run.record(DRIFT, frame, model=name, seed=seed)
        _describe(run, before, original, None)
        _describe_as(run, after, name, became, adapter)
        run.provenance.add_tokens("window", read, masked=masked)
    _show(out, *_drift_tables(frame))


@app.command()
def retrieval(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    out: Out,
    task: Annotated[
        list[_Task] | None,
        typer.Option(
            help="Task [default: passkey, niah_single_1 and fwe, or key_value where the checkpoint has no tokenizer]."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=4, max=LONGEST_WINDOW, help="Tokens of a trial.")] = 1024,
    distance: Annotated[
        list[int] | None,
        typer.Option(help="Distances, in tokens [default: three in text, all powers of two for key_value]."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials of each task and distance [default: 8 in text, 128 of key_value].")
    ] = None,
    keys: Annotated[int, typer.Option(min=2, help="Key tokens of key_value's vocabulary, from id 4 on.")] = 256,
    values: Annotated[int, typer.Option(min=1, help="Value tokens of key_value, after the keys.")] = 256,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    attn: Attn = _SDPA,
    device_map: DeviceMap = None,
    adapter: Adapter = None,
    accept_terms: AcceptTerms = False,
    overwrite: Overwrite = False,
) -> None:
    """Probe retrieval by distance: accuracy and log-probability of the answer, with 95% intervals.

    key_value is for toy vocabularies; the others are text, passkey and tasks of RULER, read by the model's tokenizer.
    Trials are kept at OUT.trials.jsonl as they are done, so the same command goes on after it was cut short.
    """
    config = _recorded(locals())
    import pandas as pd

    from rope_probe.models.hooked import load_model
    from rope_probe.retrieval.probe import RETRIEVAL, retrieval_accuracy, trials_hash
    from rope_probe.runs.progress import progress
    from rope_probe.runs.provenance import Read
    from rope_probe.runs.results import new_run

    with new_run(out, "retrieval", config, overwrite=overwrite, inputs=[model]) as run:
        hooked = load_model(model, **_how(attn, dtype, device, device_map, adapter))
        _tell_origin(model)
        tasks = _tasks(model, task, window, keys, values)
        sweeps = [one.default_distances() for one in tasks]
        if distance and all(sweep == [None] for sweep in sweeps):
            raise InputError(f"--distance says nothing to {', '.join(one.name for one in tasks)}; leave it out")
        sweeps = [distance if distance and sweep != [None] else sweep for sweep in sweeps]
        counts = [trials or one.default_trials for one in tasks]
        plan = list(zip(tasks, sweeps, counts, strict=True))
        hashes = {  # before anything is measured, since this is where a distance or a window that does not fit is found
            one.name: {d: trials_hash(one, d, count, seed=seed) for d in sweep} for one, sweep, count in plan
        }
        with (
            _kept_trials(out, run) as kept,
            progress("trials", sum(count * len(sweep) for _, sweep, count in plan)) as advance,
        ):
            frames = []
            for one, sweep, count in plan:
                frame = retrieval_accuracy(
                    hooked, one, sweep, trials=count, seed=seed, progress=advance, trials_file=kept
                )
                frames.append(run.record(RETRIEVAL, frame, model=model))
        _describe(run, hooked, model, adapter)
        for name, by_distance in hashes.items():
            for digest in by_distance.values():
                run.provenance.add_read(name, Read(digest))
    kept.unlink(missing_ok=True)  # only now: had the run failed at its end, its trials would still be there
    shown = pd.concat(frames)[["task", "distance", "metric", "value", "low", "high"]]
    _show(out, shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))


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
            _tell(f"what is done so far is in {str(kept)!r}; the same command goes on from there")
        raise
    shutil.copyfile(kept, run.folder / "trials.jsonl")


@app.command(name="distill")
def distill_command(
    config: Annotated[Path, typer.Argument(help="TOML file; see docs/distillation.md.")],
    out: Annotated[Path | None, typer.Option(help="Run directory to write [default: the config's].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut short.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed [default: the config's].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: the config's, or what is there].")] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="float32, or bfloat16 for autocast.")] = None,
    attn: Annotated[_Kernel | None, typer.Option(help="Attention kernel [default: the config's].")] = None,
) -> None:
    """Train a student through phases of a window and a theta each, by distillation, cross-entropy or a mix.

    Ctrl-C and SIGTERM end it after the step under way, with a snapshot that --resume goes on from; exit code 4.
    """
    from accelerate import PartialState

    from rope_probe.distillation import distill, read_config
    from rope_probe.runs.results import read_manifest

    changes = {"out": out, "seed": seed, "device": device, "dtype": dtype, "attn": attn}
    given = {key: value if key == "seed" else str(value) for key, value in changes.items() if value is not None}
    settings = read_config(config, **given)
    try:
        run = distill(settings, resume=resume)
        missed = read_manifest(run).get("missed_gate")
        if PartialState().is_main_process:
            if missed:
                print(missed, file=sys.stderr)
            _show(run)
    finally:
        if PartialState._shared_state:
            PartialState().destroy_process_group()  # its threads would run into the interpreter's end
    if missed:
        raise typer.Exit(MISSED_GATE)


@app.command(name="report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option(help="Folder for the gallery; an older gallery there is replaced.")],
) -> None:
    """Draw the figures of some runs into an offline HTML gallery."""
    from rope_probe.gallery.report import gallery

    _show(gallery(runs, out))


def _recorded(options: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a command's options: all that decides what is measured."""
    return {name: value for name, value in options.items() if name not in ("out", "overwrite", "accept_terms")}


def _how(
    attn: _Kernel, dtype: _Dtype | None, device: str, device_map: str | None, adapter: Path | None
) -> dict[str, Any]:
    """How a model is loaded, as `load_model` takes it."""
    spread = device_map not in (None, "disk")  # then it is transformers that chooses devices
    if spread and device != "cpu":
        raise InputError(f"--device {device} and --device-map {device_map} both say where the model is to be; give one")
    return {
        "attn": attn.value,
        "dtype": _torch_dtype(dtype),
        "device": None if spread else device,
        "device_map": device_map,
        "adapter": adapter,
    }


def _tell_origin(model: str) -> None:
    """Say on stderr where a model given by name comes from."""
    from rope_probe.models.pretrained import told_origin

    if (origin := told_origin(model)) is not None:
        _tell(origin)


def _describe(run: "Run", model: "HookedCausalLM", name: str, adapter: Path | None) -> None:
    """Put a model and where it comes from into a run's provenance; one that is not in memory by its files."""
    _describe_as(run, model, name, name, adapter)


def _describe_as(run: "Run", model: "HookedCausalLM", name: str, source: str, adapter: Path | None) -> None:
    """As `_describe`, of a model that the run calls otherwise than where it was loaded from."""
    from rope_probe.models.offloaded import is_offloaded
    from rope_probe.models.pretrained import origin_of
    from rope_probe.runs.provenance import describe_model
    from rope_probe.spans.stored import describe_checkpoint

    away = is_offloaded(model.original_model)
    described = describe_checkpoint(source) if away else describe_model(model.original_model)
    run.provenance.models[name] = dataclasses.replace(
        described,
        attention_kernel=model.attn,
        origin=origin_of(source),
        adapter=None if adapter is None else str(adapter),
    )


def _show(path: Path, *texts: str) -> None:
    """Print what was found, and at last where it is. It is on the disk already, so nothing is lost where this fails."""
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join([*texts, str(path)]).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's own flush at its end
        if not isinstance(error, BrokenPipeError):  # who reads through a pipe may have read enough
            raise InputError(f"cannot print to stdout ({error.strerror}); the result is whole, at {path}") from error


_MOST = 10
"""How many parts a table of a sweep shows: those with the largest effect."""


def _trace_tables(frame: "pd.DataFrame") -> list[str]:
    """Logit KL of each sweep: by dose, or of the parts with the largest effect; with a control, what is rounding."""
    from rope_probe.tracing.cone import LOGITS
    from rope_probe.tracing.propagation import is_rounding

    logits = frame[(frame["site"] == LOGITS) & (frame["metric"] == "kl_nats")]
    texts = []
    for arm, rows in logits.groupby("arm", sort=False):
        controlled = rows["value_float64"].notna().all()
        columns = ["value", "value_float64"] if controlled else ["value"]
        table = rows.groupby(["perturbation", "side"], sort=False)[columns].mean().reset_index()
        if controlled:
            rounding = is_rounding(table.assign(metric="kl_nats"))
            table["verdict"] = rounding.map({True: "rounding", False: "signal"})
        title = f"{arm}: KL of the logits, nats, mean over documents"
        if len(table) > 3 * _MOST:
            title += f"; the {_MOST} largest of {len(table)} on each side"
            table = table.sort_values("value", ascending=False).groupby("side", sort=False).head(_MOST)
        named = table.drop(columns="side").rename(columns={"value": "KL", "value_float64": "in float64"})
        texts += [title, _table(named, "{:.3g}", index=False)]
    return texts


def _head_tables(scores: "pd.DataFrame") -> list[str]:
    """The heads with the largest share of each kind of attention."""
    from rope_probe.gallery.figures.heads import PANELS

    texts = []
    for metric, what in PANELS.items():
        rows = scores[(scores["metric"] == metric) & scores["value"].notna()]
        if len(rows):
            most = rows.nlargest(_MOST // 2, "value")[["layer", "head", "value"]].rename(columns={"value": "share"})
            texts += [f"{metric}, share of attention {what}: the largest", _table(most, "{:.3f}", index=False)]
    return texts


_RESTORED = 6
"""How many layers LongReD restores in its published recipe."""


def _drift_tables(frame: "pd.DataFrame") -> list[str]:
    """Drift by layer, what it costs, and the layers that LongReD would restore."""
    from rope_probe.spans.drift import COSINE_DISTANCE, FINAL_NORM, attention_by_layer, ranked_layers
    from rope_probe.tracing.cone import LOGITS

    of_states = frame[frame["metric"] == COSINE_DISTANCE]
    by_layer = of_states[of_states["layer"].notna()].set_index("layer")["value"].rename("1 - cosine").to_frame()
    attention = attention_by_layer(frame).rename(columns={"mean": "attention KL", "max": "largest of a head"})
    table = by_layer.join(attention).reset_index()  # "-" in layers without attention
    final = of_states.loc[of_states["site"] == FINAL_NORM, "value"].item()
    of_logits = frame[frame["site"] == LOGITS].set_index("metric")["value"]
    count = min(_RESTORED, len(attention))
    ranked = ", ".join(map(str, ranked_layers(frame, count)))
    return [
        "Drift by layer: hidden states, and attention KL in nats, mean over heads",
        _table(table, "{:.3g}", index=False),
        f"after the final norm: 1 - cosine {final:.3g}",
        ", ".join(f"{metric} {value:.4g}" for metric, value in of_logits.items()),
        f"layers of largest attention KL, with the last one ({count} of {len(attention)}): {ranked}",
    ]


def _spans_tables(changed: "pd.DataFrame", statistics: "pd.DataFrame", geometry: "pd.DataFrame") -> list[str]:
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
    most = of_pair.nlargest(10, "rel_change").reindex(columns=columns).reset_index()
    return [
        "Relative change of the weights by layer",
        _table(by_layer, "{:.3g}"),
        "\nNorm of the change of the weights by layer",
        _table(norms, "{:.3g}"),
        "\nHow it is spread over heads and pairs",
        _table(spread, "{:.3g}"),
        "\nWhere the windows lie in the rotary spectrum",
        _table(windows, "{:,.6g}"),
        "\nThe query spans that changed most",
        _table(most, "{:.4g}", index=False),
    ]


def _table(frame: "pd.DataFrame", number: str, *, index: bool = True) -> str:
    return frame.rename_axis(columns=None).to_string(index=index, float_format=number.format, na_rep="-")


def _torch_dtype(dtype: _Dtype | None) -> "torch.dtype | None":
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _tasks(model: str, asked: list[_Task] | None, window: int, keys: int, values: int) -> "list[RetrievalTask]":
    from rope_probe.models import checkpoints
    from rope_probe.retrieval.probe import KeyValueTask
    from rope_probe.retrieval.tasks import TextTask
    from rope_probe.windows.corpora import KeyValueStream

    tokenizer = None if asked == [KEY_VALUE] else checkpoints.load_tokenizer(model)
    tasks: list[RetrievalTask] = []
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


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a window is made of: text, random ids, ids given, or a file of documents.

    Raises InputError where two of them are asked for.
    """

    text: Path | None
    packed: bool
    random: bool
    document: str | None
    document_length: int
    tokens: Path | None

    def __post_init__(self) -> None:
        given = {"--text": self.text, "--random": self.random or None, "--document": self.document}
        named = [name for name, value in {**given, "--tokens": self.tokens}.items() if value is not None]
        if len(named) > 1:
            raise InputError(f"{' and '.join(named)} both say what to read; give one of them")
        if self.packed and named and named != ["--text"]:
            raise InputError(f"--packed packs text, but {named[0]} is no text; leave one of them out")

    @property
    def files(self) -> list[Path]:
        """The files that are read for it."""
        return [file for file in (self.text, self.tokens) if file is not None]


def _window(model: "HookedCausalLM", length: int | None, source: _Source, seed: int) -> "Window":
    from rope_probe.windows import natural, packing

    if source.tokens is not None:
        documents = _read_documents(source.tokens)
        if not documents:
            raise InputError(f"--tokens {str(source.tokens)!r} holds no token ids; it takes one document a line")
        return packing.pack(documents, sum(map(len, documents)) if length is None else length)
    length = 512 if length is None else length
    if source.document is not None:
        ids = _token_ids(source.document.replace(",", " "), "--document")
        if not ids:
            raise InputError(f"--document needs at least one token id, but it is {source.document!r}")
        return _repeated(ids, length)
    document_length = source.document_length
    if document_length > length:
        raise InputError(f"--document-length must be at most the window, {length}, but it is {document_length}")
    text = None if source.text is None else natural.read_text(source.text)
    if source.random or (text is None and not source.packed and model.tokenizer is None):
        return _repeated(_random_ids(model, document_length, seed), length)
    if model.tokenizer is None:
        raise InputError("text needs a tokenizer, and this checkpoint has none; --random reads random token ids")
    if length % document_length:
        raise InputError(f"--window must hold whole documents of {document_length} tokens, but it is {length}")
    options: dict[str, Any] = {"document_length": document_length, "packed": source.packed, "seed": seed}
    return natural.text_window(model.tokenizer, length, text=text, **options)


def _random_ids(model: "HookedCausalLM", count: int, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


def _repeated(ids: list[int], length: int) -> "Window":
    from rope_probe.windows.packing import repeated_window

    if length % len(ids):
        raise InputError(f"--window must hold whole documents of {len(ids)} tokens, but it is {length}")
    return repeated_window(ids, length // len(ids))


def _read_documents(file: Path) -> list[list[int]]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --tokens {str(file)!r}: {error}") from error
    return [_token_ids(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _token_ids(text: str, where: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise InputError(f"{where}: token ids are whole numbers, but {str(error).split(': ')[-1]} is not") from error


def _perturbations(
    model: "HookedCausalLM",
    window: int,
    sweeps: list[_Sweep] | None,
    shift: list[float] | None,
    side: list[_Side] | None,
    layer: list[int] | None,
    head: list[int] | None,
    pair: list[int] | None,
) -> "dict[str, Sequence[Perturbation]]":
    """By arm: the sweeps asked for, or one dose-response of the parts that are named."""
    from rope_probe.tracing.perturbations import PositionShift
    from rope_probe.tracing.sweeps import doses
    from rope_probe.tracing.sweeps import sweep as sweep_of

    sides: list[Any] = [one.value for one in side or list(_Side)]
    if sweeps and (shift is not None or pair is not None):
        raise InputError("--sweep goes through sizes and pairs itself; leave out --shift and --pair")
    if sweeps or all(part is None for part in (shift, layer, head, pair)):
        kinds = dict.fromkeys(map(str, sweeps or ("dose", "layer")))
        narrowed: dict[str, Any] = {"sides": sides, "layers": layer, "heads": head}
        swept = {kind: sweep_of(kind, model, window, **narrowed) for kind in kinds}
        if not any(swept.values()):
            raise InputError(f"--sweep {' and '.join(kinds)} moves q or k alone, so it has nothing for --side qk alone")
        return {kind: perturbations for kind, perturbations in swept.items() if perturbations}
    parts = {"layers": layer, "heads": head, "pairs": pair}
    return {"dose": [PositionShift(one, amount, **parts) for one in sides for amount in shift or doses(window)]}


def _refuse(why: str) -> int:
    _tell(f"error: {why}")
    return BAD_INPUT


def _tell(what: str) -> None:
    """One line on stderr, from one of several processes."""
    line = " ".join(what.split())
    if len(line) > _LONGEST_LINE:  # somebody's value of thousands of letters
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _memory(error: BaseException) -> str:
    """What was asked for that memory did not have, and what would be smaller."""
    asked = re.search(r"allocate (\d+ bytes|[\d.]+ \w+)", str(error))
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    remedy = _NEEDS_LESS_MEMORY.get(command, "something smaller is needed")
    return f"out of memory{f' when asked for {asked[1]}' if asked else ''}; {remedy}"


def main() -> None:
    """Entry point: exit code 0, or 2 with one line `error: ...` for what the user can put right.

    3 means that a gate was missed: the run is complete, and says so. 4 means that a run was stopped and can be resumed.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what matters is an error of ours
    try:
        code = app(standalone_mode=False)
    except (InputError, TyperException) as error:
        code = _refuse(error.format_message() if isinstance(error, TyperException) else str(error))
    except Stopped as stopped:
        _tell(str(stopped))
        code = STOPPED
    except OSError as error:
        code = _refuse(f"{error.strerror or error}: {error.filename or 'while reading or writing'}")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        code = _refuse(_memory(error))
    sys.exit(code)
