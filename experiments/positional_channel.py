"""Is it position in the teacher's logits that distils? Students of teachers whose channel of position is cut.

The base (theta 300, window 64) is extended as the arm `kd_phase_wise` of `phase_scaling` is, from teachers that differ:

    scrubbed       logits averaged over random orders of the documents, each at a random offset: where a document stands
                   says nothing any more (what stands in later documents leaks in, which the student cannot follow)
    fast_pairs     rotary pairs frozen at position 0 on both sides but those that turn within a document (64 tokens)
    middle_pairs   ... but those of wavelengths up to the window (1,024)
    slow_pairs     ... but those slower than the window
    nope           a teacher of the kind the study used, in small: a layer with RoPE, then one without it whose queries
                   are scaled by position as Llama 4 scales them, log(1 + floor((p + 1) / 64)) / 10 + 1
    nope_masked    the same with documents masked from each other: unlike a RoPE teacher's, its logits still depend on
                   where a document stands, but on nothing in the others

Beside them stand the arms `kd_phase_wise` (the teacher as it is), `kd_teacher_masked` and `kd_disjoint_keys`.

    python -m experiments.positional_channel teacher 0 runs/nope_teacher-0
    python -m experiments.positional_channel scrubbed 0 runs/positional_channel/scrubbed-0 --checkpoints runs
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor
from transformers import SmolLM3Config

from experiments import phase_scaling, toy_checkpoints
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import LARGE_THETA, LONG, SHORT, CheckpointsIn, by_distance
from experiments.training import trained
from rope_probe import HookedCausalLM, PairFreeze, copy_deltas, load_model, repeated_window, rope
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.names import MISSED_GATE
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section, beside, decided, in_words, verdict, verdicts
from rope_probe.seeds import derive
from rope_probe.tracing.propagation import DELTAS
from rope_probe.windows.packing import Batch

QUESTION = "Is it position in the teacher's logits that distils?"
PREDICTIONS = {
    1: "The scrubbed teacher still transfers retrieval, .90 or more: what transfers is that keys match across "
    "documents, not where they stand.",
    2: "Masked, the NoPE teacher transfers nothing, .10 or less, though position does reach its logits: the "
    "channel alone does not carry the skill. Unmasked it transfers it, .90 or more.",
    3: "A teacher that keeps the fast pairs alone loses its own retrieval (.50 or less), as the head that finds "
    "the token after a match needs them but so does the slow match; one that keeps the slow pairs alone loses "
    "it too, for want of a neighbour to find. None of the three bands transfers more than the teacher itself "
    "still has, within .10.",
    4: "In short: retrieval transfers where, and only where, the teacher's logits at a position depend on what "
    "other documents hold; whether they depend on position does not matter.",
}
"""Written before the first run, for accuracy at 512 tokens, 8 times the document length."""
FIGURES = {
    1: ("retrieval_by_distance",),
    2: ("retrieval_by_distance",),
    3: ("retrieval_by_distance",),
    4: ("retrieval_by_distance",),
}
"""The drawings that show what a prediction is about, by its number."""

ORDERS = 4
TEMPERATURE = 0.1
BANDS = {"fast_pairs": (0, SHORT), "middle_pairs": (SHORT, LONG), "slow_pairs": (LONG, float("inf"))}
NOPE = ("nope", "nope_masked")
CHANNELS = ("scrubbed", *BANDS, *NOPE)
BESIDE = ("kd_phase_wise", "kd_teacher_masked", "kd_disjoint_keys")
FAR = phase_scaling.FAR

Hook = tuple[str, Callable[..., Any]]


def run(
    what: str,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
) -> None:
    """Train the NoPE teacher ("teacher"), or a student of one channel, into the run directory `out`."""
    torch.set_num_threads(1)
    if what == "teacher":
        _train_teacher(seed, out)
    elif what in CHANNELS:
        _distil(what, seed, out, checkpoints_in)
    else:
        raise InputError(f"channel {what!r} is unknown; known are {', '.join(('teacher', *CHANNELS))}")


class Scrubbed(HookedCausalLM):
    """A teacher that says, of each position, the mean of its logits over random orders and offsets of the documents.

    The head is linear, so the mean is taken of final hidden states.
    """

    def hidden(self, tokens: Any, *, masked: bool = False, rows: int = 1) -> Float[Tensor, "B T M"]:
        """As `HookedCausalLM.hidden`, for batches of documents of one length."""
        if not isinstance(tokens, Batch):
            return super().hidden(tokens, masked=masked, rows=rows)
        windows = tokens.tokens.view(len(tokens.tokens), -1, SHORT)
        generator = torch.Generator().manual_seed(int(windows.sum()))
        total = torch.zeros(())
        for _ in range(ORDERS):
            order = torch.rand(windows.shape[:2], generator=generator).argsort(1)
            shuffled = windows.gather(1, order.unsqueeze(-1).expand_as(windows)).flatten(1)
            offset = int(torch.randint(LONG, (1,), generator=generator))
            batch = Batch(shuffled, tokens.cu_seqlens, tokens.position_ids + offset)
            states = super().hidden(batch, masked=masked).unflatten(1, windows.shape[1:])
            back = order.argsort(1)[..., None, None].expand_as(states)
            total = total.to(states) + states.gather(1, back).flatten(1, 2)
        return total / ORDERS


def kept_pairs(band: str, inv_freq: Float[Tensor, " P"]) -> list[int]:
    """The rotary pairs of a band, by wavelength."""
    low, high = BANDS[band]
    return [pair for pair, length in enumerate(rope.wavelengths(inv_freq).tolist()) if low < length <= high]


def teacher_of(channel: str, seed: int, checkpoints_in: Path) -> HookedCausalLM:
    """The teacher of a channel, with the hooks that make it so."""
    folder = checkpoints_in / f"{_source(channel)}-{seed}" / "checkpoint"
    if channel == "scrubbed":
        return Scrubbed(checkpoints.load(folder))
    teacher = load_model(folder)
    if channel in BANDS:
        inv_freq = teacher.rotary[0].inv_freq  # type: ignore[union-attr]
        frozen = set(range(len(inv_freq))) - set(kept_pairs(channel, inv_freq))
        hooks: list[Hook] = PairFreeze("qk", sorted(frozen)).hooks(teacher)
    else:
        hooks = temperature_hooks(teacher)
    for name, hook in hooks:
        teacher.add_hook(name, hook)
    return teacher


def temperature_hooks(model: HookedCausalLM, temperature: float = TEMPERATURE) -> list[Hook]:
    """Queries of the layers without RoPE scaled by position, as Llama 4 scales them, with 64 for its 8,192."""

    def scale(q: Float[Tensor, "B T H D"], hook: Any) -> Float[Tensor, "B T H D"]:
        position = torch.arange(q.shape[1]) % LONG  # masked windows come end to end
        factor = 1 + temperature * ((position + 1) / SHORT).floor().log1p()
        return q * factor[:, None, None].to(q)

    return [(f"blocks.{i}.attn.hook_rot_q", scale) for i, rotary in enumerate(model.rotary) if rotary is None]


def _train_teacher(seed: int, out: Path) -> None:
    missed = None
    with new_run(out, "positional_channel", teacher_config(seed), overwrite=True) as made:
        phases = toy_checkpoints.PHASES["teacher"]
        plain = checkpoints.build(_nope_architecture(), seed=derive(seed, "nope_teacher", "weights"))
        model = load_model(plain)
        for name, hook in temperature_hooks(model):
            model.add_hook(name, hook)
        for phase in phases:
            if missed := toy_checkpoints.train_and_record(made, model, phase, "nope_teacher", seed):
                break
        made.record(DELTAS, _place_in_logits(model, seed), model="nope_teacher", seed=seed)
        made.provenance.add_model("nope_teacher", model)
        checkpoints.save(model.release(), made.folder / "checkpoint")
        made.manifest["missed_gate"] = missed
    if missed:
        raise typer.Exit(MISSED_GATE)


def _place_in_logits(model: HookedCausalLM, seed: int) -> pd.DataFrame:
    """How far the logits of masked copies of one document lie apart: what the teacher's own place does to them."""
    document = toy_checkpoints.SHORT_DOCUMENTS.documents(1, seed=seed)[0]
    frame = copy_deltas(model, repeated_window(document, LONG // SHORT), masked=True, control=False)
    return frame[frame["site"] == "logits"].assign(arm="repeated document")


def _nope_architecture() -> SmolLM3Config:
    return architecture("teacher", [True, False])


def architecture(role: str, rotates: Sequence[bool], **more: Any) -> SmolLM3Config:
    """The toy Llama of a role as a SmolLM3, whose layers rotate or do not; `more` are other fields of its config."""
    theta = toy_checkpoints.PHASES[role][0].theta
    llama = toy_checkpoints.architecture({"rope_type": "default", "rope_theta": theta})
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rope_parameters",
              "bos_token_id", "eos_token_id")  # fmt: skip
    same = {name: getattr(llama, name) for name in shared}
    no_rope_layers = [int(rotated) for rotated in rotates]  # transformers' 1 is a layer with RoPE
    return SmolLM3Config(**same, no_rope_layers=no_rope_layers, pad_token_id=None, use_cache=False, **more)


def _distil(channel: str, seed: int, out: Path, checkpoints_in: Path) -> None:
    with new_run(out, "positional_channel", config_of(channel, seed, checkpoints_in), overwrite=True) as made:
        teacher = teacher_of(channel, seed, checkpoints_in)
        if channel != "scrubbed":
            made.record(RETRIEVAL, phase_scaling.measure(teacher, seed), model=channel, role="teacher", seed=seed)
        base = checkpoints.load(checkpoints_in / f"base-{seed}" / "checkpoint")
        student = load_model(checkpoints.with_rope(base, LARGE_THETA))
        phase = phase_of(channel)
        trained(f"{channel} {seed}", student, phase, seed=derive(seed, "extension"), teacher=teacher)
        measured = phase_scaling.measure(student, seed)
        made.record(RETRIEVAL, measured, model=channel, role="student", seed=seed, phase="extension")
        made.provenance.add_model(channel, student)
        first = phase.batch(derive(seed, "extension"), 0)
        made.provenance.add_tokens("extension", first, teacher_masked=phase.teacher_masked)
        checkpoints.save(student.release(), made.folder / "checkpoint")
    accuracy = measured[(measured["metric"] == "accuracy") & (measured["seq_len"] == LONG)]
    print(channel, seed, dict(zip(accuracy["distance"], accuracy["value"].round(2), strict=True)), file=sys.stderr)


def phase_of(channel: str) -> Any:
    """The extension of a channel: that of the arm `kd_phase_wise`, its data, order and budget."""
    arm = phase_scaling.ARMS["kd_phase_wise"]
    return phase_scaling.phase_of(dataclasses.replace(arm, teacher_masked=channel == "nope_masked"))


def needs(channel: str) -> tuple[str, ...]:
    """The checkpoints a channel starts from: base and teacher."""
    return ("base", _source(channel))


def _source(channel: str) -> str:
    return "nope_teacher" if channel in NOPE else "teacher"


def teacher_config(seed: int) -> dict:
    """The whole configuration of the NoPE teacher."""
    phases = toy_checkpoints.PHASES["teacher"]
    return {
        "role": "nope_teacher",
        "seed": seed,
        "architecture": _nope_architecture().to_diff_dict(),
        "temperature": TEMPERATURE,
        "phases": [dataclasses.asdict(phase) for phase in phases],
    }


def config_of(channel: str, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration of a channel, as its manifest holds it: the checkpoints by their weights."""
    sources = [checkpoints_in / f"{role}-{seed}" for role in needs(channel)]
    weights = [model["weights_sha256"] for run in sources for model in read_manifest(run)["models"].values()]
    return {
        "channel": channel,
        "seed": seed,
        "phase": dataclasses.asdict(phase_of(channel)),
        "orders": ORDERS,
        "bands": {band: [str(edge) for edge in edges] for band, edges in BANDS.items()},
        "temperature": TEMPERATURE,
        "weights_sha256": weights,
        "probe": {"trials": phase_scaling.TRIALS, "distances": phase_scaling.DISTANCES},
    }


def stages(options: Options) -> dict[str, Stage]:
    """A student of every channel and the NoPE teacher, in full; `injection` asks the question in the quick plan."""
    planned: dict[str, Stage] = {}
    if not options.full:
        return planned
    for seed in range(options.seeds):
        run = options.out / f"nope_teacher-{seed}"
        train = ("positional_channel", "teacher", str(seed), str(run))
        planned[run.name] = Stage(train, run, partial(teacher_config, seed), seconds=200.0)
        for channel in CHANNELS:
            run = options.out / "positional_channel" / f"{channel}-{seed}"
            command = ("positional_channel", channel, str(seed), str(run), "--checkpoints", str(options.out))
            sources = tuple(f"{role}-{seed}" for role in needs(channel))
            config = partial(config_of, channel, seed, options.out)
            planned[f"positional_channel/{run.name}"] = Stage(command, run, config, sources, seconds=200.0)
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Retrieval by students of teachers whose channel is cut, beside arms of phase_scaling, and the predictions."""
    frame = results["positional_channel"]["retrieval"]
    accuracy = frame[(frame["metric"] == "accuracy") & (frame["seq_len"] == LONG)]
    table = by_distance(accuracy, ["model", "role", "seed"])
    beside_it = results["phase_scaling"]["retrieval"] if "phase_scaling" in results else frame.iloc[:0]
    return Section(judged(pd.concat([frame, beside_it])), {"retrieval, accuracy by distance": table})


def judged(frame: pd.DataFrame) -> pd.DataFrame:
    """The predictions for the channels that were run: mean accuracy at 512 tokens over seeds, and whether it held.

    Intervals carry seeds and trials (`share_interval`); with one seed, trials alone. A claim that its interval crosses
    is undecided.
    """
    far = frame[(frame["metric"] == "accuracy") & (frame["seq_len"] == LONG) & (frame["distance"] == FAR)]
    teachers, students = far[far["role"] == "teacher"], far[(far["role"] != "teacher").fillna(True)]
    measured, of_teacher = dict(list(students.groupby("model"))), dict(list(teachers.groupby("model")))
    rows = []

    def judge(
        prediction: int,
        what: str,
        part: pd.DataFrame | None,
        *,
        least: float = -math.inf,
        most: float = math.inf,
    ) -> None:
        if part is not None:
            mean, low, high = phase_scaling.mean_and_interval(part)
            held, claim = decided(low, high, least, most), f"{what}: accuracy {in_words(least, most)}"
            rows.append(verdict(prediction, claim, mean, held, n=len(part), low=low, high=high))

    def tell(what: str, part: pd.DataFrame | None) -> None:
        if part is not None:
            mean, low, high = phase_scaling.mean_and_interval(part)
            rows.append(beside(what, mean, n=len(part), low=low, high=high))

    for arm in BESIDE:
        tell(f"student of {arm}", measured.get(arm))
    judge(1, "student of scrubbed", measured.get("scrubbed"), least=0.9)
    judge(2, "student of nope_masked", measured.get("nope_masked"), most=0.1)
    judge(2, "student of nope", measured.get("nope"), least=0.9)
    for band in filter(measured.__contains__, BANDS):
        own = of_teacher[band]
        if band == "middle_pairs":
            tell(f"teacher with {band} alone", own)
        else:
            judge(3, f"teacher with {band} alone", own, most=0.5)
        judge(3, f"student of {band}", measured[band], most=own["value"].mean() + 0.1)
    return verdicts(rows)


if __name__ == "__main__":
    try:
        typer.run(run)
    except InputError as error:
        sys.exit(f"error: {error}")
