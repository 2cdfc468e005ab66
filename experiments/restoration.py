"""SmolLM2-135M with a larger theta: does drift foresee what short text loses, and does a short LongReD run restore it?

The text is the language reference that Python carries. A unit of each interval is a window of one document, a passkey
trial or a multiple-choice question (`experiments.cloze`).

- `drift`: the model untrained at one theta. Drift by layer, loss of natural text, passkeys, multiple choice.
- `scaling`: loss of the same windows with scaled queries.
- `train`: theta as in the paper, 40 times the original's or near it, by LongReD-U or by cross-entropy alone on long
  text; and as a control the same cross-entropy at the original's theta, which learns the kind of text and restores
  nothing. Same tokens, optimiser and learning rate.
- `evaluate`: original, swapped and trained models on documents that no training read.
- `beyond`: passkeys in a window longer than the model was pretrained on.

"Long" text has 1,024 tokens in training. That is inside the pretrained window of 8,192, so this tests restoration of
short skill and not extension. The full plan only: it takes most of an hour.

    python -m experiments.restoration drift 5000000 runs/restoration/drift-5000000
"""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import typer

from experiments.cloze import answered, questions
from experiments.restoration_verdicts import ORIGINAL_THETA, RESTORATION, TRAINED_THETA, judged, tables_of
from experiments.stages import Options, Stage
from experiments.training import trained
from rope_probe import AttentionTemperature, HookedCausalLM, TextTask, Window, load_model, pack
from rope_probe.distillation import CrossEntropy, HiddenStates, Phase, Stream
from rope_probe.distillation.log import LOSSES, history_rows
from rope_probe.distillation.sites import sites_by_drift
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.models.pretrained import is_available
from rope_probe.models.tokens import bos_of, plain_ids
from rope_probe.retrieval.probe import forced_answers
from rope_probe.runs.results import new_run, read_tables
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section
from rope_probe.seeds import derive
from rope_probe.spans.drift import ATTENTION_KL, COSINE_DISTANCE, EXTENDED_LOSS, attention_by_layer, drift
from rope_probe.windows import embedded_text
from rope_probe.windows.corpora import TextCorpus

QUESTION = "On a real model, does drift foresee what a larger theta costs short text, and does LongReD restore it?"
PREDICTIONS = {
    1: "Untrained, theta 5,000,000 costs natural text .3 nats a token or more, in windows of 512 tokens.",
    2: "Over thetas, attention KL foresees the loss: Spearman's correlation, within a document, .9 or more.",
    3: "The ratio of the thetas alone foresees it as well: its correlation is not lower than that of attention KL.",
    4: "At one theta, documents of more attention KL lose more: partial rank correlation above .3.",
    5: "The layer whose attention KL foresees best on half of the windows does no better on the others than the mean "
    "over layers: its correlation there is not higher by .1.",
    6: "The best of a few scalings of queries, chosen on half of the windows, restores less than a quarter of what "
    "theta 5,000,000 costs the other half.",
    7: "Multiple choice hardly falls: at theta 5,000,000 accuracy is at most .1 below the original's.",
    8: "LongReD-U restores half or more of the loss that the swap cost windows of 256 tokens.",
    9: "Cross-entropy on long text of the same kind restores more of it than LongReD-U does: it learns the kind of "
    "text.",
    10: "LongReD-U ends nearer to the original than cross-entropy does: a smaller cosine distance of the last state.",
    11: "Multiple choice: LongReD-U answers as well as cross-entropy or better.",
    12: "A passkey in 12,288 tokens is likelier to the swapped model than to the original, by 5 nats or more.",
    13: "The kind of text alone is worth something: cross-entropy at the original's own theta ends .05 nats or more "
    "below the original, in windows of 256 tokens.",
    14: "So not all of the swap's cost is restored: the same cross-entropy ends .02 nats or more higher at the larger "
    "theta than at the original's.",
}
"""Written before the first run, 13 and 14 before the first run of their arm.

That passkeys outlive a smaller theta than the original's, untrained, had been seen; the rest had not."""
FIGURES = {
    2: ("drift_by_layer",),
    3: ("drift_by_layer",),
    4: ("drift_by_layer",),
    10: ("drift_by_layer",),
}
"""The drawings that show what a prediction is about, by its number."""

MODEL = "smollm2-135m"
THETAS = (ORIGINAL_THETA, 200_000.0, 500_000.0, 1e6, 2e6, TRAINED_THETA, 1e7)
"""LongReD trains at 40 times its original's theta, 2e7 for 500,000; of these, 5,000,000 is nearest to that ratio."""
SCALINGS = (1.1, 1.2, 1.3)
WINDOW, WINDOWS = 512, 8
SHORT, SHORT_WINDOWS, LONG, LONG_WINDOWS = 256, 16, 2048, 3
DRIFT_WINDOWS = 4
QUESTIONS = 40
PASSKEY_WINDOW, PASSKEY_DISTANCE, PASSKEY_TRIALS = 1024, 700, 4
BEYOND_WINDOW, BEYOND_DISTANCE, BEYOND_TRIALS = 12_288, 10_000, 3
RESTORED_SITES = 5
TRAIN_WINDOW, STEP_TOKENS, STEPS = 1024, 2048, 6
Part = Literal["drift", "scaling", "train", "evaluate", "beyond"]
THETA_OF = {"long_ce": TRAINED_THETA, "longred_u": TRAINED_THETA, "ce_own_theta": ORIGINAL_THETA}
"""The theta that each arm is trained at."""
ARMS = tuple(THETA_OF)
MODELS = ("original", "swapped", *ARMS)


def measure(
    part: Part,
    name: Annotated[str, typer.Argument(help="A theta for `drift` and `scaling`, an arm or model for the others.")],
    out: Path,
    trained: Annotated[Path | None, typer.Option(help="Run of `train`, for `evaluate` and `beyond`.")] = None,
    drifted: Annotated[Path | None, typer.Option(help="Run of `drift`, from which `train` takes its sites.")] = None,
) -> None:
    """Do one part into the run directory `out`."""
    torch.set_num_threads(1)
    with new_run(out, "restoration", config_of(part, name), overwrite=True) as run:
        original = load_model(MODEL)
        run.provenance.add_model("original", original)
        if part == "train":
            sites = None if drifted is None else sites_from(drifted)
            corpus = TextCorpus(tuple(written_texts(run.folder / "texts")), tokenizer=MODEL, shortest=SHORT // 4)
            train(run, original, name, phase_of(name, corpus, sites))
            return
        if part == "drift":
            model = swapped(original, float(name))
            rows = [
                *drift_rows(original, model, windows(original, all_texts(), WINDOW, WINDOWS)),
                *passkey_rows(model, PASSKEY_WINDOW, PASSKEY_DISTANCE, PASSKEY_TRIALS),
                *choice_rows(model, all_texts()),
            ]
            run.record(RESTORATION, rows, model=MODEL, theta=float(name))
            return
        if part == "scaling":
            rows = scaling_rows(swapped(original, float(name)), windows(original, all_texts(), WINDOW, WINDOWS))
            run.record(RESTORATION, rows, model=MODEL, theta=float(name))
            return
        model, theta = model_of(name, original, trained)
        if part == "evaluate":
            short, long = (
                windows(original, held_out_texts(), *shape) for shape in ((SHORT, SHORT_WINDOWS), (LONG, LONG_WINDOWS))
            )
            rows = [
                *drift_rows(original, model, windows(original, held_out_texts(), WINDOW, DRIFT_WINDOWS)),
                *loss_rows(model, short),
                *loss_rows(model, long),
                *passkey_rows(model, PASSKEY_WINDOW, PASSKEY_DISTANCE, PASSKEY_TRIALS),
                *choice_rows(model, held_out_texts()),
            ]
        else:
            rows = passkey_rows(model, BEYOND_WINDOW, BEYOND_DISTANCE, BEYOND_TRIALS)
        run.record(RESTORATION, rows, model=name, theta=theta)


# Models and text ------------------------------------------------------------------------------------------------------


def swapped(original: HookedCausalLM, theta: float) -> HookedCausalLM:
    """The original's weights, untrained, that rotate by another theta."""
    model = load_model(checkpoints.with_rope(original.original_model, theta))
    model.tokenizer = original.tokenizer
    return model


def model_of(name: str, original: HookedCausalLM, trained: Path | None) -> tuple[HookedCausalLM, float]:
    """One of MODELS, and its theta. Raises InputError for a trained one without its run."""
    if name == "original":
        return original, ORIGINAL_THETA
    if name == "swapped":
        return swapped(original, TRAINED_THETA), TRAINED_THETA
    if trained is None:
        raise InputError(f"{name} is a trained model, so its run is needed; give --trained RUN")
    model = load_model(trained / "checkpoint")
    model.tokenizer = original.tokenizer
    return model, THETA_OF[name]


def all_texts() -> list[str]:
    """The documents, longest first, but none that has a paragraph in common with a longer one.

    Some topics are chapters of others, or the same text under two names.
    """
    kept: list[str] = []
    said: set[str] = set()
    for text in sorted(embedded_text.documents(), key=lambda text: (-len(text), text)):
        paragraphs = long_paragraphs(text)
        if not paragraphs & said:
            kept.append(text)
        said |= paragraphs
    return kept


def long_paragraphs(text: str) -> set[str]:
    """Paragraphs of 60 characters or more, whatever their line breaks."""
    return {spoken for paragraph in text.split("\n\n") if len(spoken := " ".join(paragraph.split())) >= 60}


def held_out_texts() -> list[str]:
    """Every second document by length, so that long ones stand on both sides; training reads the others."""
    return all_texts()[1::2]


def written_texts(folder: Path) -> list[str]:
    """The documents that training reads, as files."""
    folder.mkdir()
    files = []
    for number, text in enumerate(all_texts()[::2]):
        file = folder / f"{number:02}.txt"
        file.write_text(text, encoding="utf-8")
        files.append(str(file))
    return files


def windows(model: HookedCausalLM, texts: list[str], length: int, count: int) -> list[Window]:
    """`count` windows of `length` tokens, each of another document, from its middle.

    Raises InputError where fewer documents are so long.
    """
    assert model.tokenizer is not None
    start = bos_of(model.tokenizer)
    inner, cut = length - len(start), []
    for text in texts:
        tokens = plain_ids(model.tokenizer, text)
        if len(tokens) >= inner:
            first = (len(tokens) - inner) // 2
            cut.append(pack([[*start, *tokens[first : first + inner]]], length))
    if len(cut) < count:
        raise InputError(f"{count} windows of {length} tokens need as many documents so long, but there are {len(cut)}")
    return cut[:count]


# Training -------------------------------------------------------------------------------------------------------------


def sites_from(drifted: Path) -> tuple[str, ...]:
    """The last state, and those of the layers whose attention drifted most, by a run of the part `drift`."""
    rows = read_tables([drifted])[RESTORATION.name]
    by_layer = rows[rows["metric"] == ATTENTION_KL].groupby("layer")["value"].mean().sort_index()
    return sites_by_drift(by_layer.tolist(), RESTORED_SITES)


def phase_of(arm: str, corpus: TextCorpus, sites: tuple[str, ...] | None) -> Phase:
    """How an arm is trained. Raises InputError for an unknown arm, and for LongReD-U without sites."""
    if arm not in ARMS:
        raise InputError(f"arm {arm!r} is unknown; known are {', '.join(ARMS)}")
    ways: dict[str, Any] = {"lr": 1e-4, "schedule": "constant", "warmup": 3, "theta": THETA_OF[arm]}
    long: dict[str, Any] = {"data": corpus, "window": TRAIN_WINDOW, "terms": (CrossEntropy(),)}
    if arm != "longred_u":
        return Phase(arm, steps=STEPS, batch_tokens=STEP_TOKENS, **long, **ways)
    if sites is None:
        raise InputError("longred_u needs the sites of most drift; give --drifted RUN")
    restored = HiddenStates(teacher="original", sites=sites, weight=5.0)
    last = HiddenStates(teacher="original", weight=10.0)
    skipped: dict[str, Any] = {
        "positions": "longred_uniform",
        "target_window": TRAIN_WINDOW,
        "teacher_positions": "continuous",
    }
    streams = (
        Stream(name="long", share=8, **long),
        Stream(name="short", share=6, data=corpus, window=SHORT, terms=(restored,)),
        Stream(name="short_to_long", share=2, data=corpus, window=SHORT, terms=(last,), **skipped),
    )
    return Phase(arm, steps=STEPS, batch_tokens=STEP_TOKENS, streams=streams, **ways)


def train(run: Any, original: HookedCausalLM, arm: str, phase: Phase) -> None:
    """Train a copy at the phase's theta; losses and the checkpoint go into the run."""
    student = swapped(original, THETA_OF[arm])
    teachers = {"original": original} if arm == "longred_u" else {}
    original.original_model.requires_grad_(False)
    history = trained(arm, student, phase, seed=derive(0, "restoration"), teachers=teachers)
    run.record(LOSSES, history_rows(history), model=arm, phase=phase.name, seq_len=TRAIN_WINDOW)
    for name, batch in zip((stream.name for stream in phase.mix), phase.batches(0, 0), strict=True):
        run.provenance.add_tokens(str(name), batch)
    checkpoints.save(student.release(), run.folder / "checkpoint")
    run.manifest["sites"] = [list(getattr(term, "sites", ())) for stream in phase.mix for term in stream.terms]


# Measurements, as rows of RESTORATION ---------------------------------------------------------------------------------


def drift_rows(original: HookedCausalLM, model: HookedCausalLM, read: list[Window]) -> list[dict]:
    """Drift by layer and loss of each window; a layer's attention KL is the mean over its heads."""
    rows: list[dict] = []
    for unit, window in enumerate(read):
        frame = drift(original, model, window)
        place = {"unit": unit, "seq_len": len(window), "query_scale": 1.0}
        by_layer = attention_by_layer(frame)["mean"]
        rows += [{**place, "layer": layer, "metric": ATTENTION_KL, "value": kl} for layer, kl in by_layer.items()]
        hidden = frame[frame["metric"] == COSINE_DISTANCE]
        last = len(original.blocks)
        rows += [
            {
                **place,
                "layer": row.layer if pd.notna(row.layer) else last,
                "metric": COSINE_DISTANCE,
                "value": row.value,
            }
            for row in hidden.itertuples()
        ]
        loss = frame.loc[frame["metric"] == EXTENDED_LOSS, "value"].item()
        rows.append({**place, "metric": "loss_nats", "value": loss})
    return rows


def scaling_rows(model: HookedCausalLM, read: list[Window]) -> list[dict]:
    """Loss of each window with queries scaled after rotation."""
    rows = []
    for scale in SCALINGS:
        with model.hooks(fwd_hooks=AttentionTemperature(scale).hooks(model)):
            rows += [{**row, "query_scale": scale} for row in loss_rows(model, read)]
    return rows


@torch.no_grad()
def loss_rows(model: HookedCausalLM, read: list[Window]) -> list[dict]:
    """Loss of natural text of each window, nats a token; logits are made 512 positions at a time."""
    rows = []
    for unit, window in enumerate(read):
        with model.measuring():
            hidden, targets = model.hidden(window), window.tokens[0, 1:]
            losses = [
                torch.nn.functional.cross_entropy(
                    model.unembed(hidden[:, first : first + WINDOW][:, : len(targets) - first])[0].float(),
                    targets[first : first + WINDOW],
                    reduction="none",
                )
                for first in range(0, len(targets), WINDOW)
            ]
        value = torch.cat(losses).double().mean().item()
        rows.append({"unit": unit, "seq_len": len(window), "query_scale": 1.0, "metric": "loss_nats", "value": value})
    return rows


def passkey_rows(model: HookedCausalLM, window: int, distance: int, trials: int) -> list[dict]:
    """Hit and log-probability of each trial."""
    assert model.tokenizer is not None
    task = TextTask("passkey", model.tokenizer, window)
    frame = forced_answers(model, task, distance, trials=trials, seed=0)
    place = {"seq_len": window, "distance": distance}
    rows: list[dict] = []
    for trial in frame.itertuples():
        rows.append({**place, "unit": trial.trial, "metric": "passkey_hit", "value": trial.hit})
        logprob = trial.answer_logprob_nats
        rows.append({**place, "unit": trial.trial, "metric": "passkey_logprob_nats", "value": logprob})
    return rows


def choice_rows(model: HookedCausalLM, texts: list[str]) -> list[dict]:
    """Whether each multiple-choice question is answered rightly."""
    frame = answered(model, questions(texts, QUESTIONS))
    return [{"unit": row.question, "metric": "choice_correct", "value": row.correct} for row in frame.itertuples()]


# The contract of experiments ------------------------------------------------------------------------------------------


def config_of(part: str, name: str) -> dict:
    """The whole configuration of a part, as its manifest holds it."""
    return {
        "part": part,
        "name": name,
        "model": MODEL,
        "thetas": [ORIGINAL_THETA, TRAINED_THETA],
        "scalings": SCALINGS,
        "windows": [WINDOW, WINDOWS, DRIFT_WINDOWS],
        "held_out": [SHORT, SHORT_WINDOWS, LONG, LONG_WINDOWS],
        "questions": QUESTIONS,
        "passkey": [PASSKEY_WINDOW, PASSKEY_DISTANCE, PASSKEY_TRIALS],
        "beyond": [BEYOND_WINDOW, BEYOND_DISTANCE, BEYOND_TRIALS],
        "phase": _phase_config(name) if part == "train" else None,
    }


def _phase_config(arm: str) -> dict:
    """An arm's phase, with sites and text left open: they are of other runs and of Python."""
    return dataclasses.asdict(phase_of(arm, TextCorpus(tokenizer=MODEL), ("ln_final.hook_out",)))


def stages(options: Options) -> dict[str, Stage]:
    """Every part, in full; nothing in the quick plan or where the model is not installed."""
    if not options.full or not is_available(MODEL):
        return {}
    sites = f"drift-{TRAINED_THETA:.0f}"
    planned = [_stage("drift", f"{theta:.0f}", options, 150.0) for theta in THETAS]
    planned += [_stage("scaling", f"{theta:.0f}", options, 60.0) for theta in THETAS]
    planned += [_stage("train", arm, options, 400.0, drifted=sites if arm == "longred_u" else None) for arm in ARMS]
    for part, seconds in (("evaluate", 200.0), ("beyond", 300.0)):
        for name in MODELS:
            trained = f"train-{name}" if name in ARMS else None
            planned.append(_stage(part, name, options, seconds, trained=trained))
    return {f"restoration/{stage.run.name}": stage for stage in planned}


def _stage(part: str, name: str, options: Options, seconds: float, **reads: str | None) -> Stage:
    folder = options.out / "restoration"
    run = folder / f"{part}-{name}"
    command: tuple[str, ...] = ("restoration", part, name, str(run))
    needs: tuple[str, ...] = ()
    for option, other in reads.items():
        if other is not None:
            command, needs = (*command, f"--{option}", str(folder / other)), (*needs, f"restoration/{other}")
    return Stage(command, run, partial(config_of, part, name), needs, seconds=seconds)


def report(results: Mapping[str, Tables]) -> Section:
    """Loss, skill and drift by theta and by arm, and the predictions."""
    rows = results["restoration"][RESTORATION.name]
    return Section(judged(rows), tables_of(rows))


if __name__ == "__main__":
    try:
        typer.run(measure)
    except InputError as error:
        sys.exit(f"error: {error}")
