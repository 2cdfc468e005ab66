"""A distillation run from its configuration to its run directory, and on from where it was cut short.

RUN/log.jsonl              every measured step, a line each
RUN/snapshots/PHASE-STEP   the last few, to resume from
RUN/checkpoints/PHASE      the student at the end of each phase
RUN/tables/, manifest.json
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rope_probe.distillation import snapshots
from rope_probe.distillation.config import DistillConfig, read_config, recorded
from rope_probe.distillation.log import LOSSES, Log
from rope_probe.distillation.loop import ORIGINAL, Training
from rope_probe.distillation.mirrors import Mirror, open_mirror, require_mirror
from rope_probe.distillation.phase import Phase
from rope_probe.distillation.stopping import StopRequest, stop_requests
from rope_probe.distillation.streams import Stream
from rope_probe.errors import InputError, Stopped
from rope_probe.models import attention, checkpoints
from rope_probe.models.hooked import HookedCausalLM, load_model
from rope_probe.retrieval.probe import RETRIEVAL, KeyValueTask
from rope_probe.runs.folders import clean_up_inside, kind_of, whole_folder
from rope_probe.runs.progress import progress
from rope_probe.runs.provenance import Model, Read, describe_model, hash_tokens
from rope_probe.runs.results import Run, is_complete, open_run, read_run
from rope_probe.seeds import derive
from rope_probe.windows.corpora import TextCorpus

LOG, SNAPSHOTS, CHECKPOINTS = "log.jsonl", "snapshots", "checkpoints"


def distill(config: DistillConfig | str | os.PathLike[str] | Mapping[str, Any], *, resume: bool = False) -> Path:
    """Run a distillation, or go on with one that was cut short; returns the run directory.

    `config` is a DistillConfig, or a TOML file or mapping that `read_config` takes. With `resume`, a run that is
    complete is left as it is, and one that was cut short ends with the weights it would have had. A phase that misses
    its gate is the last one, and the manifest says so under `missed_gate`. Under `accelerate launch`, every process
    calls this.

    Raises InputError, before anything is written, for a configuration or models that do not fit together, for a mirror
    that is not installed, and for a resumption with other models or data. Raises Stopped when Ctrl-C or SIGTERM asks
    the run to stop: it then takes a snapshot first.
    """
    config = config if isinstance(config, DistillConfig) else read_config(config)
    out = Path(config.out)
    if resume and is_complete(out, recorded(config)) and LOSSES.name in read_run(out)[0]:
        return out
    require_mirror(config.mirror)
    job = _Job(config)
    with ExitStack() as stack:
        run, mirror, refusal = None, None, None
        if job.accelerator.is_main_process:
            try:
                opened = open_run(out, "distill", recorded(config), inputs=job.inputs(), resume=resume)
                run = stack.enter_context(opened)
                if config.mirror is not None:
                    mirror = stack.enter_context(closing(open_mirror(config.mirror, out, recorded(config))))
            except InputError as error:
                refusal = str(error)
        if refusal := broadcast_object_list([refusal])[0]:  # every process ends, not the first one alone
            raise InputError(refusal)
        job.train(run, stack.enter_context(stop_requests()), mirror)
        if run is not None:
            job.describe(run)
    job.accelerator.wait_for_everyone()
    return out


class _Job:
    """The models of a run, checked against each other and its data, and its training."""

    def __init__(self, config: DistillConfig) -> None:
        self.config, self.out = config, Path(config.out)
        if config.device is not None:
            checkpoints.require_device(config.device, torch.float32)
        cpu = config.device == "cpu" or not torch.accelerator.is_available()
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # autocast is the run's own affair
        by_process = config.device in (None, "cpu", "cuda")
        self._device = self.accelerator.device if by_process else torch.device(str(config.device))
        self._names = [phase.name for phase in config.phases]
        self._start = self._student()
        self._teachers = {name: self._load_teacher(place) for name, place in config.teachers.items()}
        _require_finite("student", self._start)
        for name, teacher in self._teachers.items():
            _require_finite(f"teacher {name!r}", teacher.original_model)
        if config.original == "run" and any(map(_reads_original, config.phases)):
            self._teachers[ORIGINAL] = self._copy_of_start()
        self._tokenizer = self._shared_tokenizer()
        for phase in config.phases:
            self._check(phase)
        self._last_save = 0.0

    def inputs(self) -> dict[str, Any]:
        """Hashes of the models and data that the run begins with."""
        hashes: dict[str, Any] = {"student": describe_model(self._start).weights_sha256}
        hashes["teachers"] = {name: model.weights_sha256 for name, model in self._described_teachers.items()}
        for phase in self.config.phases:
            for (name, stream), first in zip(_named(phase), self._first_tokens(phase).values(), strict=True):
                hashes[f"data of {name}"] = {"first_batch": first, "source": stream.data.source_hash()}
        return hashes

    def train(self, run: Run | None, stop: StopRequest, mirror: Mirror | None = None) -> None:
        """Every phase that is not finished yet, each from the one before or from the last snapshot.

        `mirror` is shown what is logged.
        `stop` is looked at between steps. Raises Stopped, once a snapshot is there, when it asks to.
        """
        log = None if run is None else Log(self.out / LOG, mirror)
        total = sum(phase.steps * phase.step_tokens for phase in self.config.phases)
        with progress("tokens", total) if run is not None else nullcontext(_ignore) as advance:
            for phase in self.config.phases:
                if self._is_finished(phase):
                    advance(phase.steps * phase.step_tokens, skipped=True)
                else:
                    self._train_phase(phase, run, log, advance, stop)
                missed = Log(self.out / LOG).missed_gate
                if missed is not None:
                    if run is not None:
                        run.manifest["missed_gate"] = missed
                    break

    def describe(self, run: Run) -> None:
        """The log as metrics, and what was trained on what, into the run."""
        log = Log(self.out / LOG)
        run.record(LOSSES, log.losses(), model="student", seed=self.config.seed)
        run.record(RETRIEVAL, log.gates(), model="student", seed=self.config.seed)
        run.provenance.teachers |= self._described_teachers
        for phase in self.config.phases:
            if self._is_finished(phase):
                self._describe_phase(run, phase)
        run.manifest["processes"] = self.accelerator.num_processes

    def _describe_phase(self, run: Run, phase: Phase) -> None:
        """The checkpoint of a finished phase, and how its streams were read."""
        student = checkpoints.load(self._checkpoint(phase))
        run.provenance.add_model(phase.name, student, kernel=self.config.attn)
        first_tokens = self._first_tokens(phase)
        for name, stream in _named(phase):
            read = Read(
                first_tokens[name],
                masked=stream.masked,
                positions=stream.positions,
                teacher_masked=stream.teacher_masked,
                teacher_positions=stream.teacher_positions or stream.positions,
            )
            run.provenance.add_read(name, read)

    def _train_phase(
        self, phase: Phase, run: Run | None, log: Log | None, advance: Callable[..., Any], stop: StopRequest
    ) -> None:
        training = self._begin(phase, log)
        advance(training.step * phase.step_tokens, skipped=True)
        self._last_save = time.monotonic()
        tokens, seconds = 0, 0.0
        while training.step < phase.steps and not training.passed:
            number = training.step + 1
            measured = number % self.config.log_every == 0 or number in (1, phase.steps)
            started = time.perf_counter()
            record = training.advance(measure=measured)
            tokens, seconds = tokens + phase.step_tokens, seconds + time.perf_counter() - started
            advance(phase.step_tokens, f"{phase.name}, loss {record['loss']:.3f}")
            if log is not None and measured:
                log.write({"phase": phase.name, **record, "tokens_per_s": tokens / seconds, "time": time.time()})
                tokens, seconds = 0, 0.0
            training.try_gate()
            if log is not None and phase.gate and number % phase.gate.every == 0:
                measurement = training.gate[["distance", "value", "low", "high"]].to_dict("records")
                log.write({"phase": phase.name, "step": number, "tokens": record["tokens"], "gate": measurement})
            if run is not None:
                run.keep_time()
            if number < phase.steps and not training.passed:
                self._save_or_stop(training, log, stop)
        if log is not None and phase.gate and not training.passed:
            place = {"phase": phase.name, "step": training.step, "tokens": training.step * phase.step_tokens}
            log.write({**place, "missed_gate": training.missed})
        advance((phase.steps - training.step) * phase.step_tokens, skipped=True)  # where a gate was passed before
        self._finish(phase, training)

    def _begin(self, phase: Phase, log: Log | None) -> Training:
        """The training of a phase, from its first step or from its last snapshot."""
        config, rank = self.config, self.accelerator.process_index
        taken = [one for one in snapshots.found(self.out / SNAPSHOTS, config.phases) if one.phase == phase.name]
        self.accelerator.wait_for_everyone()
        model = checkpoints.load(taken[-1].folder, dtype=torch.float32) if taken else self._before(phase)
        if model.config.rope_parameters.get("rope_type") in ("default", "linear"):  # others may read this number
            longest = max(stream.reach(stream.positions) for stream in phase.mix)
            model.config.max_position_embeddings = max(longest, model.config.max_position_embeddings)
        training = Training(
            load_model(model, attn=config.attn, device=self._device),
            phase,
            seed=derive(config.seed, phase.name),
            teachers=self._teachers_of(phase),
            autocast=config.dtype == "bfloat16",
            accelerator=self.accelerator,
        )
        torch.manual_seed(derive(config.seed, phase.name, "dropout", str(rank)))
        if taken:
            taken[-1].resume(training, rank)
        if log is not None:
            log.rewind(phase.name, training.step)
            self._tidy_up()
        training.gate = Log(self.out / LOG).last_gate(phase.name)
        return training

    def _save_or_stop(self, training: Training, log: Log | None, stop: StopRequest) -> None:
        """Take a snapshot where one is due, or where the run is to stop; then stop."""
        by_step = training.step % self.config.save_every == 0
        by_time = time.monotonic() - self._last_save >= 60 * self.config.save_minutes
        stopping, due = self._any_process(stop.received is not None, by_step or by_time)
        if not (stopping or due):
            return
        folder = self.out / SNAPSHOTS / snapshots.name_of(training.phase.name, training.step)
        snapshots.take(training, self.accelerator, folder, self._tokenizer)
        self._last_save = time.monotonic()
        if log is not None:
            self._tidy_up()
        if stopping:
            by = "another process" if stop.received is None else stop.received.name
            raise Stopped(
                f"stopped by {by} after step {training.step} of phase {training.phase.name!r}; a snapshot is in "
                f"{str(self.out)!r}; the same command with --resume goes on from there"
            )

    def _any_process(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any process."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        counts = self.accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=self._device), "sum")
        return [count > 0 for count in counts.tolist()]

    def _tidy_up(self) -> None:
        """Keep the last snapshots, and nothing of snapshots and checkpoints that were cut short."""
        snapshots.prune(self.out / SNAPSHOTS, self.config.phases, self.config.keep)
        for folder in (self.out / SNAPSHOTS, self.out / CHECKPOINTS):
            clean_up_inside(folder)

    def _finish(self, phase: Phase, training: Training) -> None:
        weights = training.weights()
        if self.accelerator.is_main_process:
            with whole_folder(self._checkpoint(phase), kind="checkpoint") as folder:
                checkpoints.write(training.model.release(), folder, weights=weights, tokenizer=self._tokenizer)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()

    def _checkpoint(self, phase: Phase) -> Path:
        return self.out / CHECKPOINTS / phase.name

    def _is_finished(self, phase: Phase) -> bool:
        return kind_of(self._checkpoint(phase)) == "checkpoint"

    def _before(self, phase: Phase, model: PreTrainedModel | None = None) -> PreTrainedModel:
        """The student as a phase begins with it: the phase before's, or `model`, with this one's theta."""
        index = self._names.index(phase.name)
        if model is None and index > 0:
            model = checkpoints.load(self._checkpoint(self.config.phases[index - 1]), dtype=torch.float32)
        model = self._start if model is None else model
        return model if phase.rope is None else checkpoints.with_rope(model, phase.rope)

    def _student(self) -> PreTrainedModel:
        student = self.config.student
        if isinstance(student, str):
            return checkpoints.load(student, dtype=torch.float32)
        return checkpoints.build(checkpoints.config_of(student), seed=derive(self.config.seed, "weights"))

    def _load_teacher(self, source: str | os.PathLike[str] | PreTrainedModel) -> HookedCausalLM:
        dtype = getattr(torch, self.config.dtype)
        teacher = load_model(source, attn=self.config.attn, dtype=dtype, device=self._device)
        teacher.original_model.requires_grad_(False)
        return teacher

    def _copy_of_start(self) -> HookedCausalLM:
        return self._load_teacher(attention.plain_copy(self._start))

    def _teachers_of(self, phase: Phase) -> dict[str, HookedCausalLM]:
        """Every teacher of the run, and the original where it is the phase's own."""
        if self.config.original == "run" or not _reads_original(phase):
            return self._teachers
        index = self._names.index(phase.name)
        if index == 0:
            return {**self._teachers, ORIGINAL: self._copy_of_start()}
        return {**self._teachers, ORIGINAL: self._load_teacher(self._checkpoint(self.config.phases[index - 1]))}

    @cached_property
    def _described_teachers(self) -> dict[str, Model]:
        return {
            name: describe_model(self._teachers[name].original_model, kernel=self.config.attn)
            for name in self.config.teachers
        }

    def _shared_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The one tokenizer of student, teachers and text; None where none has one."""
        named: list[tuple[str, PreTrainedTokenizerBase]] = []
        teachers = [("teacher", place) for place in self.config.teachers.values()]
        for role, source in (("student", self.config.student), *teachers):
            tokenizer = checkpoints.load_tokenizer(source) if isinstance(source, str) else None
            if tokenizer is not None:
                named.append((f"{role} {source!r}", tokenizer))
        for name, stream in (pair for phase in self.config.phases for pair in _named(phase)):
            if isinstance(stream.data, TextCorpus):
                named.append((f"the text of phase {name!r}", stream.data.loaded_tokenizer))
        for who, tokenizer in named[1:]:
            _require_same(*named[0], who, tokenizer)
        return named[0][1] if named else None

    def _check(self, phase: Phase) -> None:
        student = load_model(self._before(phase, self._start), attn=self.config.attn)
        for name, stream in _named(phase):
            _check_model("student", student, name, stream, stream.reach(stream.positions))
            for role, teacher in self._teachers.items():
                _check_model(f"teacher {role!r}", teacher, name, stream, stream.reach(stream.teacher_positions))
            for term in stream.terms:
                term.check(student, None if term.teacher is None else self._teachers.get(term.teacher))
        student.release()
        if phase.gate is not None and phase.probed is not None:
            for distance in phase.gate.distances:
                KeyValueTask(phase.probed, phase.gate.window).trials(distance, 1, seed=0)
        phase.windows_of_a_part(self.accelerator.num_processes)
        for stream, batch in zip(phase.mix, phase.batches(derive(self.config.seed, phase.name), 0), strict=True):
            stream.as_teachers_read(batch, seed=0, step=0)

    def _first_tokens(self, phase: Phase) -> dict[str, str]:
        """A hash of what each stream reads in its first step."""
        batches = phase.batches(derive(self.config.seed, phase.name), 0)
        return {name: hash_tokens(batch.tokens) for (name, _), batch in zip(_named(phase), batches, strict=True)}


def _named(phase: Phase) -> list[tuple[str, Stream]]:
    """The streams of a phase by name: PHASE, or PHASE/STREAM where there are several."""
    several = len(phase.mix) > 1
    return [(f"{phase.name}/{stream.name}" if several else phase.name, stream) for stream in phase.mix]


def _reads_original(phase: Phase) -> bool:
    return any(ORIGINAL in stream.teachers for stream in phase.mix)


def _check_model(role: str, model: HookedCausalLM, name: str, stream: Stream, reach: int) -> None:
    """That a model can read what a stream gives it. Raises InputError where it cannot."""
    if stream.data.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the data of phase {name!r} has {stream.data.vocab_size} token ids, but the {role}'s vocabulary has "
            f"{model.config.vocab_size}"
        )
    if model.exact_length is not None and reach > model.exact_length:
        raise InputError(
            f"phase {name!r} has positions up to {reach - 1}, but the {role}'s rope type changes its frequencies with "
            f"the input from {model.exact_length} on"
        )


def _require_finite(role: str, model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"weight {name} of the {role} is not finite; copy its checkpoint again")


def _require_same(who: str, ours: PreTrainedTokenizerBase, other: str, theirs: PreTrainedTokenizerBase) -> None:
    a, b = ours.get_vocab(), theirs.get_vocab()
    for token in sorted(a.keys() | b.keys(), key=lambda token: (a.get(token, len(a)), token)):
        if a.get(token) != b.get(token):
            raise InputError(
                f"{other} has another tokenizer than {who}: {token!r} is {b.get(token, 'no token')} there and "
                f"{a.get(token, 'no token')} here"
            )


def _ignore(count: int, note: str = "", *, skipped: bool = False) -> None:
    """Progress of a process that tells none."""
