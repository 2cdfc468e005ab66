"""Stages of experiments: what there is to run, in which order, and running it.

An experiment is a module of this folder with

    QUESTION                 what it asks
    PREDICTIONS              by number, written before the run
    stages(options)          its stages by name
    report(results)          a Section: what it shows and its verdicts, from the tables of all runs, by experiment
    FIGURES                  if it likes, by the number of a prediction: the drawings that show what it is about

A stage is a script in a process of its own. It starts when what it needs is there; two run at a time, on one thread
each. It is reused if its run is complete, its configuration the same, and the sources it was made by unchanged: the
package and its own script. A stage that fails, or a checkpoint that misses its gate, is told at the end, with what
needs it.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.live import Live
from rich.table import Table

import experiments
from rope_probe.errors import InputError
from rope_probe.names import MISSED_GATE
from rope_probe.runs.progress import in_time
from rope_probe.runs.results import is_complete, read_manifest, source_hash

WORKERS = 2
_REUSED_S = 1.0
"""A stage that took less was reused, and says nothing of the machine's pace."""


@dataclass(frozen=True)
class Options:
    """What a plan is to hold: where, how many seeds, and every arm and sweep or the quick ones."""

    out: Path
    seeds: int = 1
    full: bool = False


@dataclass(frozen=True)
class Stage:
    """A script and its arguments, the run directory it makes, the config it makes it with, and the stages it needs.

    The script is a module of this folder by name, or the path of a file elsewhere. `seconds` is about what it takes,
    of which the order and the remaining time are made. What is `urgent` goes first, and is shown before the rest runs.
    """

    command: tuple[str, ...]
    run: Path
    config: Callable[[], dict]
    needs: tuple[str, ...] = ()
    seconds: float = 60.0
    urgent: bool = False

    @property
    def script(self) -> str:
        """The name of the experiment's module."""
        return Path(self.command[0]).stem

    @property
    def file(self) -> Path:
        """The file that is run."""
        given = Path(self.command[0])
        return given if given.suffix == ".py" else Path(experiments.__path__[0]) / f"{given}.py"

    @property
    def arguments(self) -> list[str]:
        """What Python is given to run it."""
        what = [self.command[0]] if self.file == Path(self.command[0]) else ["-m", f"experiments.{self.command[0]}"]
        return [*what, *self.command[1:]]


def discover() -> list[ModuleType]:
    """The experiments of this folder, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))
    modules = [importlib.import_module(f"experiments.{name}") for name in names if name not in ("reproduce", "stages")]
    return [module for module in modules if hasattr(module, "stages")]


def plan(options: Options, modules: Sequence[ModuleType] | None = None) -> dict[str, Stage]:
    """Every stage of every experiment by name; urgent ones come first, then those that the longest wait follows.

    `modules` are the experiments, by default those of this folder.

    Raises InputError for a stage that needs one that nobody plans.
    """
    stages: dict[str, Stage] = {}
    for module in discover() if modules is None else modules:
        stages |= module.stages(options)
    for name, stage in stages.items():
        if absent := [need for need in stage.needs if need not in stages]:
            raise InputError(f"stage {name!r} needs {absent[0]!r}, which no experiment plans")
    behind = _seconds_behind(stages)
    return dict(sorted(stages.items(), key=lambda item: (not item[1].urgent, -behind[item[0]])))


def _seconds_behind(stages: Mapping[str, Stage]) -> dict[str, float]:
    """How long the longest chain is that begins with each stage."""
    order = list(TopologicalSorter({name: stage.needs for name, stage in stages.items()}).static_order())
    behind: dict[str, float] = {}
    for name in reversed(order):
        waiting = [behind[other] for other, stage in stages.items() if name in stage.needs]
        behind[name] = stages[name].seconds + max(waiting, default=0.0)
    return behind


Watch = Callable[[set[str], dict[str, str]], object]
"""Is told, again and again while stages run, which of them are done, and which of these without a result and why."""


def run_all(
    stages: dict[str, Stage],
    *,
    reuse_anyway: bool = False,
    planned: Mapping[str, Stage] | None = None,
    watch: Watch = lambda done, without: None,
) -> dict[str, str]:
    """Run the stages, WORKERS at a time; returns those without a result, and why. What needs one of them is skipped.

    `planned` are all that will run in the end, these among them: the time that is told is the time to the end of all.
    What `watch` does keeps no stage that runs from going on.
    """
    order = TopologicalSorter({name: stage.needs for name, stage in stages.items()})
    order.prepare()
    without: dict[str, str] = {}
    done: set[str] = set()
    pool = ThreadPoolExecutor(WORKERS)
    with _shown(stages if planned is None else planned) as progress:
        try:
            running: dict[Future[str], str] = {}
            ready: list[str] = []
            while order.is_active():
                for name in order.get_ready():
                    if lost := [need for need in stages[name].needs if need in without]:
                        without[name] = f"needs {lost[0]}"
                        progress.ended(name, without[name])
                        done.add(name)
                        order.done(name)
                    else:
                        ready.append(name)
                ready.sort(key=list(stages).index)
                while ready and len(running) < WORKERS:
                    name = ready.pop(0)
                    progress.started(name)
                    running[pool.submit(_run, name, stages[name], reuse_anyway)] = name
                if running:
                    watch(set(done), dict(without))
                for future in wait(running, return_when=FIRST_COMPLETED, timeout=1.0).done if running else ():
                    name = running.pop(future)
                    if why := future.result():
                        without[name] = why
                    progress.ended(name, why)
                    done.add(name)
                    order.done(name)
                progress.refresh()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return without


def _run(name: str, stage: Stage, reuse_anyway: bool) -> str:
    """Run one stage unless its run is there; returns what went wrong, or nothing. What it says goes into a log."""
    try:
        config = stage.config()
    except InputError as error:
        return str(error)
    sources = None if reuse_anyway else source_hash(stage.file)
    if not is_complete(stage.run, config, sources=sources):
        command = [sys.executable, *stage.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = stage.run.parent / "logs" / f"{stage.run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as said:
            code = subprocess.run(command, env=environment, stdout=said, stderr=subprocess.STDOUT).returncode
        if code not in (0, MISSED_GATE):
            last = (log.read_text().splitlines() or ["nothing was said"])[-1]
            return f"exit code {code}: {last} (all of it in {log})"
    return read_manifest(stage.run).get("missed_gate") or ""


class _Progress:
    """The state of every stage, as text; a live table where there is a terminal."""

    def __init__(self, stages: Mapping[str, Stage], console: Console) -> None:
        self.stages, self.console = stages, console
        self.began: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.live: Live | None = None

    def started(self, name: str) -> None:
        """A stage begins."""
        self.began[name] = time.monotonic()
        self._say(f"{name}: started")

    def ended(self, name: str, why: str) -> None:
        """A stage has ended, with a result or without."""
        self.took[name] = time.monotonic() - self.began.get(name, time.monotonic())
        if why:
            self.failed[name] = why
        state = f"without a result: {why}" if why else f"done in {self.took[name]:,.0f} s"
        left = sum(stage not in self.took for stage in self.stages)
        self._say(f"{name}: {state}; {left} of {len(self.stages)} stages left, about {in_time(self._remaining())}")

    def refresh(self) -> None:
        """Draw the table anew."""
        if self.live is not None:
            self.live.update(self.table())

    def table(self) -> Table:
        """Stage, state, elapsed and remaining seconds, and those of all."""
        table = Table("stage", "state", "elapsed, s", "remaining, s", title=f"about {in_time(self._remaining())} to go")
        now = time.monotonic()
        for name in self.stages:
            if name in self.took:
                table.add_row(name, "failed" if name in self.failed else "done", f"{self.took[name]:,.0f}", "")
            elif name in self.began:
                elapsed = now - self.began[name]
                table.add_row(name, "running", f"{elapsed:,.0f}", f"{self._left(name):,.0f}")
            else:
                table.add_row(name, "waiting", "", f"{self._left(name):,.0f}")
        return table

    def _remaining(self) -> float:
        """About how long all of it takes still, by the stages' own estimates and the pace of this machine."""
        left = [self._left(name) for name in self.stages if name not in self.took]
        return max(sum(left) / WORKERS, max(left, default=0.0))

    def _left(self, name: str) -> float:
        """About how many seconds a stage takes still."""
        elapsed = time.monotonic() - self.began[name] if name in self.began else 0.0
        return max(0.0, self._pace() * self.stages[name].seconds - elapsed)

    def _pace(self) -> float:
        """How many times its estimate a stage takes here, by those that ran, and those that run for longer than it."""
        now = time.monotonic()
        took = {name: self.took.get(name, now - began) for name, began in self.began.items()}
        known = [
            name
            for name, seconds in took.items()
            if seconds > (_REUSED_S if name in self.took else self.stages[name].seconds) and name not in self.failed
        ]
        planned = sum(self.stages[name].seconds for name in known)
        return sum(took[name] for name in known) / planned if planned else 1.0

    def _say(self, line: str) -> None:
        if self.live is None:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def _shown(stages: Mapping[str, Stage]) -> Iterator[_Progress]:
    """One live table on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    progress = _Progress(stages, console)
    if not console.is_terminal:
        yield progress
        return
    with Live(progress.table(), console=console, transient=True) as progress.live:
        yield progress
