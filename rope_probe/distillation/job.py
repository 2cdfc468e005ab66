"""A distillation run from its configuration to its run directory, and on from where it was cut short.

RUN/log.jsonl              every measured step, a line each
RUN/snapshots/PHASE-STEP   the last few, to resume from
RUN/checkpoints/PHASE      the student at the end of each phase
RUN/metrics.parquet, manifest.json
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rope_probe import checkpoints
from rope_probe.atomic import whole_folder
from rope_probe.corpora import TextCorpus
from rope_probe.distillation import snapshots
from rope_probe.distillation.config import DistillConfig, read_config
from rope_probe.distillation.log import Log
from rope_probe.distillation.loop import Training
from rope_probe.distillation.phase import Phase
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM, load_model
from rope_probe.packing import Batch
from rope_probe.progress import progress
from rope_probe.results import Run, describe_model, hash_tokens, is_complete, open_run
from rope_probe.seeds import derive

LOG, SNAPSHOTS, CHECKPOINTS = "log.jsonl", "snapshots", "checkpoints"


def distill(config: DistillConfig | str | os.PathLike[str] | Mapping[str, Any], *, resume: bool = False) -> Path:
    """Run a distillation, or go on with one that was cut short; returns the run directory.

    `config` is a DistillConfig, or a TOML file or mapping that `read_config` takes. With `resume`, a run that is
    complete is left as it is, and one that was cut short ends with the weights it would have had. A phase that misses
    its gate is the last one, and the manifest says so under `missed_gate`. Under `accelerate launch`, every process
    calls this.

    Raises InputError, before anything is written, for a configuration or models that do not fit together.
    """
    config = config if isinstance(config, DistillConfig) else read_config(config)
    out = Path(config.out)
    if resume and is_complete(out, asdict(config)):
        return out
    job = _Job(config)
    main = job.accelerator.is_main_process
    with open_run(out, "distill", asdict(config), resume=resume) if main else nullcontext() as run:
        job.accelerator.wait_for_everyone()
        job.train(run)
        if run is not None:
            job.describe(run)
    job.accelerator.wait_for_everyone()
    return out


class _Job:
    """The models of a run, checked against each other and its data, and its training."""

    def __init__(self, config: DistillConfig) -> None:
        self.config, self.out = config, Path(config.out)
        self.accelerator = Accelerator(cpu=config.device == "cpu" or not torch.accelerator.is_available())
        by_process = config.device in (None, "cpu", "cuda")
        self._device = self.accelerator.device if by_process else torch.device(str(config.device))
        self._names = [phase.name for phase in config.phases]
        self._start = self._student()
        self._teacher = self._load_teacher()
        self._tokenizer = self._shared_tokenizer()
        for phase in config.phases:
            self._check(phase)

    def train(self, run: Run | None) -> None:
        """Every phase that is not finished yet, each from the one before or from the last snapshot."""
        log = None if run is None else Log(self.out / LOG)
        total = sum(phase.steps * phase.batch_tokens for phase in self.config.phases)
        with progress("tokens", total) if run is not None else nullcontext(_ignore) as advance:
            for phase in self.config.phases:
                if not self._checkpoint(phase).exists():
                    self._train_phase(phase, log, advance)
                missed = Log(self.out / LOG).missed_gate
                if missed is not None:
                    if run is not None:
                        run.manifest["missed_gate"] = missed
                    break

    def describe(self, run: Run) -> None:
        """The log as metrics, and what was trained on what, into the run."""
        run.record(Log(self.out / LOG).frame(), model="student", seed=self.config.seed)
        done = [phase for phase in self.config.phases if self._checkpoint(phase).exists()]
        models = {phase.name: describe_model(checkpoints.load(self._checkpoint(phase))) for phase in done}
        if self._teacher is not None:
            models["teacher"] = describe_model(self._teacher.original_model)
        run.manifest |= {
            "models": models,
            "tokens_sha256": {phase.name: hash_tokens(self._first_batch(phase).tokens) for phase in done},
            "attention_kernel": self.config.attn,
            "mask": {
                phase.name: {"student": phase.masked, "teacher": phase.teacher_masked} for phase in self.config.phases
            },
            "positions": {phase.name: phase.positions for phase in self.config.phases},
            "processes": self.accelerator.num_processes,
        }

    def _train_phase(self, phase: Phase, log: Log | None, advance: Callable[..., Any]) -> None:
        config, rank = self.config, self.accelerator.process_index
        taken = [one for one in snapshots.found(self.out / SNAPSHOTS, self._names) if one.phase == phase.name]
        self.accelerator.wait_for_everyone()
        model = checkpoints.load(taken[-1].folder, dtype=torch.float32) if taken else self._before(phase)
        training = Training(
            load_model(model, attn=config.attn, device=self._device),
            phase,
            seed=derive(config.seed, phase.name),
            teacher=self._teacher,
            autocast=config.dtype == "bfloat16",
            accelerator=self.accelerator,
        )
        torch.manual_seed(derive(config.seed, phase.name, "dropout", str(rank)))
        if taken:
            taken[-1].resume(training, rank)
        if log is not None:
            log.rewind(phase.name, training.step)
            snapshots.prune(self.out / SNAPSHOTS, self._names, config.keep)
        advance(training.step * phase.batch_tokens)
        tokens, seconds = 0, 0.0
        while training.step < phase.steps and not training.passed:
            number = training.step + 1
            measured = number % config.log_every == 0 or number in (1, phase.steps)
            started = time.perf_counter()
            record = training.advance(measure=measured)
            tokens, seconds = tokens + phase.batch_tokens, seconds + time.perf_counter() - started
            advance(phase.batch_tokens, f"{phase.name}, loss {record['loss']:.3f}")
            if log is not None and measured:
                log.write({"phase": phase.name, **record, "tokens_per_s": tokens / seconds, "time": time.time()})
                tokens, seconds = 0, 0.0
            training.try_gate()
            if log is not None and not training.gate.empty and phase.gate and number % phase.gate.every == 0:
                measurement = training.gate[["distance", "value", "low", "high"]].to_dict("records")
                log.write({"phase": phase.name, "step": number, "tokens": record["tokens"], "gate": measurement})
            if number % config.save_every == 0 and number < phase.steps and not training.passed:
                folder = self.out / SNAPSHOTS / f"{phase.name}-{number:06d}"
                snapshots.take(training, self.accelerator, folder, self._tokenizer)
                if log is not None:
                    snapshots.prune(self.out / SNAPSHOTS, self._names, config.keep)
        if log is not None and phase.gate and not training.passed:
            place = {"phase": phase.name, "step": training.step, "tokens": training.step * phase.batch_tokens}
            log.write({**place, "missed_gate": training.missed})
        self._finish(phase, training)

    def _finish(self, phase: Phase, training: Training) -> None:
        weights = training.weights()
        if self.accelerator.is_main_process:
            with whole_folder(self._checkpoint(phase), kind="checkpoint") as folder:
                checkpoints.write(training.model.release(), folder, weights=weights, tokenizer=self._tokenizer)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()

    def _checkpoint(self, phase: Phase) -> Path:
        return self.out / CHECKPOINTS / phase.name

    def _before(self, phase: Phase) -> PreTrainedModel:
        """The student as a phase begins with it."""
        index = self._names.index(phase.name)
        if index == 0:
            model = self._start
        else:
            model = checkpoints.load(self._checkpoint(self.config.phases[index - 1]), dtype=torch.float32)
        return model if phase.rope is None else checkpoints.with_rope(model, phase.rope)

    def _student(self) -> PreTrainedModel:
        student = self.config.student
        if isinstance(student, str):
            return checkpoints.load(student, dtype=torch.float32)
        return checkpoints.build(checkpoints.config_of(student), seed=derive(self.config.seed, "weights"))

    def _load_teacher(self) -> HookedCausalLM | None:
        if self.config.teacher is None:
            return None
        dtype = getattr(torch, self.config.dtype)
        teacher = load_model(self.config.teacher, attn=self.config.attn, dtype=dtype, device=self._device)
        teacher.original_model.requires_grad_(False)
        return teacher

    def _shared_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The one tokenizer of student, teacher and text; None where none has one."""
        named: list[tuple[str, PreTrainedTokenizerBase]] = []
        for role, source in (("student", self.config.student), ("teacher", self.config.teacher)):
            tokenizer = checkpoints.load_tokenizer(source) if isinstance(source, str) else None
            if tokenizer is not None:
                named.append((f"{role} {source!r}", tokenizer))
        for phase in self.config.phases:
            if isinstance(phase.data, TextCorpus):
                named.append((f"the text of phase {phase.name!r}", phase.data.loaded_tokenizer))
        for who, tokenizer in named[1:]:
            _require_same(*named[0], who, tokenizer)
        return named[0][1] if named else None

    def _check(self, phase: Phase) -> None:
        if phase.rope is not None:
            checkpoints.rotary_embedding(self._start, phase.rope)
        models = {"student": self._start.config}
        if self._teacher is not None:
            models["teacher"] = self._teacher.config
        for role, model in models.items():
            if phase.data.vocab_size > model.vocab_size:
                raise InputError(
                    f"the data of phase {phase.name!r} has {phase.data.vocab_size} token ids, but the {role}'s "
                    f"vocabulary has {model.vocab_size}"
                )
        phase.windows_of_a_part(self.accelerator.num_processes)
        self._first_batch(phase)

    def _first_batch(self, phase: Phase) -> Batch:
        return phase.batch(derive(self.config.seed, phase.name), 0)


def _require_same(who: str, ours: PreTrainedTokenizerBase, other: str, theirs: PreTrainedTokenizerBase) -> None:
    a, b = ours.get_vocab(), theirs.get_vocab()
    for token in sorted(a.keys() | b.keys(), key=lambda token: (a.get(token, len(a)), token)):
        if a.get(token) != b.get(token):
            raise InputError(
                f"{other} has another tokenizer than {who}: {token!r} is {b.get(token, 'no token')} there and "
                f"{a.get(token, 'no token')} here"
            )


def _ignore(count: int, note: str = "") -> None:
    """Progress of a process that tells none."""
