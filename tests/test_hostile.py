"""The command line under attack: the cases of tests/hostile.py, run in this process and counted as an attacker would.

python -m tests.test_hostile               the cases that the tests run: the table, every bad one, and poor lines
python -m tests.test_hostile --all         every case of the grammar, three times as many
python -m tests.test_hostile --only TEXT   those of the grammar whose family, command or description holds TEXT
python -m tests.test_hostile --save FILE   what came of each case besides, a line of JSON each
"""

import argparse
import functools
import hashlib
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import FileIO, TextIOWrapper
from pathlib import Path
from typing import Any

from tests import conftest  # noqa: F401 (before torch and transformers: no network, one thread)

import pandas as pd  # isort: skip
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from rope_probe import cli
from rope_probe.distillation import Training, distill, read_config
from rope_probe.names import MISSED_GATE
from rope_probe.runs.results import read_run
from tests import hostile, zoo
from tests.hostile import ANY, MUST_REFUSE, SAME, SAME_OR_REFUSE, Case

CHUNKS = 16
SHARE = 0.28  # of the cases of the grammar that the tests run
PATIENCE_S = 10  # that a case may take; what is meant to be quick and is not, hangs
MEMORY = 4 << 30  # more than that, for one case, and the machine would be in danger
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
KINDS = ("one line", "accepted", "traceback", "silently wrong", "lost")
Tree = dict[str, str]


# What the cases find in their folders


def make_kit(kit: Path) -> None:
    """Everything that a case can need, under its name."""
    model = zoo.llama(**TINY)
    model.save_pretrained(kit / "model", max_shard_size="9KB")
    assert len(list((kit / "model").glob("*.safetensors"))) == 3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.config.max_position_embeddings = 256
    model.save_pretrained(kit / "after", max_shard_size="9KB")
    zoo.llama(**TINY, vocab_size=259).save_pretrained(kit / "reader", max_shard_size="9KB")
    ByT5Tokenizer(extra_ids=0).save_pretrained(kit / "reader")
    (kit / "config.toml").write_text(hostile.as_toml(hostile.CONFIG))
    for command, run in (("trace", "traced"), ("spans", "compared"), ("retrieval", "found"), ("heads", "looked")):
        plain = hostile.case(
            command, ANY, "plain", out=run, options={"--shift": ("1", "4")} if command == "trace" else {}
        )
        assert run_command(command, plain.arguments, kit)[0] == 0
    assert run_command("report", ("found", "--out", "gallery"), kit)[0] == 0
    for run, last in (("trained", 99), ("stopped", 4)):
        make_distillation(kit, run, last)
    (kit / "config.toml").write_text(hostile.as_toml(hostile.CONFIG))


def make_distillation(kit: Path, run: str, last: int) -> None:
    """A run of distill that is cut short before its step `last`."""
    plain, steps = Training.advance, iter(range(1, 1000))

    def advance(self: Training, **options: Any) -> Any:
        if next(steps) == last:
            raise KeyboardInterrupt
        return plain(self, **options)

    Training.advance = advance
    try:
        with inside(kit), captured(), suppress(KeyboardInterrupt):
            distill(read_config({**hostile.RESUMABLE, "out": run}))
    finally:
        Training.advance = plain


@functools.cache
def kit() -> Path:
    """The kit, made once a process."""
    folder = new_folder()
    make_kit(folder)
    return folder


def remove_kit() -> None:
    if kit.cache_info().currsize:
        shutil.rmtree(kit())
        kit.cache_clear()


def new_folder() -> Path:
    """A folder for a while, in memory where that is possible: runs are synced to the disk, which takes time."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="hostile-", dir=memory if os.access(memory, os.W_OK) else None))


# Running a case


class TookTooLong(BaseException):
    """A case that does not end."""


@dataclass
class Result:
    """What came of a case: its verdict, one of `one line`, `accepted` and `traceback`, and what is wrong with it."""

    case: Case
    code: Any = None
    stdout: str = ""
    stderr: str = ""
    escaped: str = ""
    verdict: str = ""
    wrong: list[tuple[str, str]] = field(default_factory=list)
    poor: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bad(self) -> list[tuple[str, str]]:
        """What the tests do not forgive."""
        return [one for one in self.wrong if one[0] in KINDS]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def captured() -> Iterator[list[str]]:
    """Everything that is written to stdout and stderr, by whatever language; [out, err] when the block has ended."""
    written: list[str] = []
    streams, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for stream in streams:
            stream.flush()
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = TextIOWrapper(FileIO(1, "w", closefd=False), "utf-8")
        sys.stderr = TextIOWrapper(FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
        handlers = [one for one in logging.getLogger("transformers").handlers if isinstance(one, logging.StreamHandler)]
        before = [handler.setStream(sys.stderr) for handler in handlers]
        try:
            yield written
        finally:
            for handler, stream in zip(handlers, before, strict=True):
                handler.setStream(stream)
            with suppress(UnicodeError):
                sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for descriptor, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            for file in (out, err):
                file.seek(0)
                written.append(file.read().decode(errors="replace"))


@contextmanager
def as_a_user_sees_it() -> Iterator[None]:
    """Warnings as Python shows them by default, and those of transformers, which conftest.py turns off."""
    shown = ("default", "ignore", "ignore", "ignore", "ignore")
    kinds = (Warning, DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    verbosity = transformers.logging.get_verbosity()

    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        print(f"{filename}:{lineno}: {category.__name__}: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, kind in zip(shown, kinds, strict=True):
            warnings.simplefilter(action, kind)  # type: ignore[arg-type]
        warnings.showwarning = show
        transformers.logging.set_verbosity_warning()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)


@contextmanager
def limited() -> Iterator[None]:
    """A block that is ended after a while, and has not all of the memory."""

    def ring(*_: Any) -> None:
        raise TookTooLong(f"more than {PATIENCE_S} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").exists() else None
    handler = signal.signal(signal.SIGALRM, ring)
    try:
        if pages is not None:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def run_command(command: str, arguments: Sequence[str], work: Path) -> tuple[Any, str, str, str]:
    """Exit code, stdout and stderr of the command run in `work`, and the traceback of what escaped it."""
    argv, sys.argv = sys.argv, ["rope-probe", *([command] if command else []), *arguments]
    code, escaped = None, ""
    try:
        with inside(work), captured() as written:
            try:
                with as_a_user_sees_it(), limited():
                    cli.main()
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                escaped = traceback.format_exc()
    finally:
        sys.argv = argv
    return code, *written, escaped


def tree(folder: Path) -> Tree:
    """Every path below a folder, with a hash of a file's content, or what else it is."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            if path.is_symlink():
                what = f"link to {os.readlink(path)}"
            elif path.is_dir():
                what = "folder"
            else:
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = what
    return found


def run(case: Case) -> Result:
    """Run a case in a folder of its own and judge it."""
    started = time.perf_counter()
    root = new_folder()
    try:
        work = root / "outside" / "work"
        work.mkdir(parents=True)
        prepare(case, work)
        before = tree(root)
        arguments = [word.replace("{work}", str(work)) for word in case.arguments]
        result = Result(case, *run_command(case.command, arguments, work))
        judge(result, work, before, tree(root))
    finally:
        shutil.rmtree(root)
    result.seconds = time.perf_counter() - started
    return result


def prepare(case: Case, work: Path) -> None:
    for name in case.needs:
        copy = shutil.copytree if (kit() / name).is_dir() else shutil.copy
        copy(kit() / name, work / name)
    for step in case.prepare:
        step(work)


# Judging it


def judge(result: Result, work: Path, before: Tree, after: Tree) -> None:
    """Fill in the verdict, and what is wrong."""
    lines = result.stderr.splitlines()
    refusal = [line for line in lines if line.startswith("error: ")]
    if result.escaped or "Traceback (most recent call last)" in result.stderr or "panicked at" in result.stderr:
        result.verdict = "traceback"
        result.wrong.append(("traceback", last_line(result.escaped or result.stderr)))
    elif result.code in (0, MISSED_GATE):
        result.verdict = "accepted"
        judge_accepted(result, work)
    elif result.code == 2 and len(lines) == 1 and refusal and not result.stdout:
        result.verdict = "one line"
        judge_refused(result, refusal[0])
    elif result.code == 2 and refusal:
        result.verdict = "traceback"
        noise = next(
            (line for line in [*result.stdout.splitlines(), *lines] if line not in refusal), "no line of its own"
        )
        result.wrong.append(("traceback", f"noise: {noise[:150]}"))
    else:
        result.verdict = "traceback"
        result.wrong.append(("traceback", f"exit code {result.code}, stderr {result.stderr[:100]!r}"))
    result.wrong += [("lost", what) for what in lost(result, work, before, after)]


def last_line(escaped: str) -> str:
    """The error, and the last place in the package that it came through."""
    places = re.findall(r'File ".*?/(rope_probe/[\w/]+\.py)", line \d+, in (\w+)', escaped)
    place = f" <- {places[-1][0]}, {places[-1][1]}" if places else ""
    errors = re.findall(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|TooLong|Invalid)\b.*", escaped, re.MULTILINE)
    return [*escaped.strip().splitlines(), *errors][-1][:200] + place


def judge_refused(result: Result, line: str) -> None:
    if result.case.expectation is SAME:
        result.wrong.append(("silently wrong", f"harmless, but refused: {line[:150]}"))
    if len(line) > 600:
        result.poor.append(f"{len(line)} characters")
    if re.search(r"\b\w+(Error|Exception|Interrupt)\(", line):
        result.poor.append("a bare repr of an exception")
    if re.search(r"<class '|<\w+ object| at 0x[0-9a-f]{6,}|Traceback", line):
        result.poor.append("an object of Python's")
    if re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", line):
        result.poor.append("control characters, which a terminal obeys")
    if len(line) < 20 or line.rstrip().endswith(":"):
        result.poor.append("says next to nothing")
    if result.case.says not in line:
        result.poor.append(f"does not say {result.case.says!r}")


def judge_accepted(result: Result, work: Path) -> None:
    case = result.case
    if case.expectation is MUST_REFUSE:
        result.wrong.append(("silently wrong", "must be refused, but is accepted"))
    if strange := [line for line in result.stderr.splitlines() if "Warning" in line]:
        result.poor.append(f"accepted with a warning: {strange[0][-150:]}")
    if case.command == "report":
        pages = list((work / case.out).glob("*.html"))
        if not (work / case.out / "index.html").is_file() or len(pages) < 2:
            result.wrong.append(("silently wrong", f"{len(pages)} pages, which are no gallery"))
        return
    try:
        frame = measured_in(work / case.out)
    except Exception as error:
        result.wrong.append(("silently wrong", f"accepted, but the run cannot be read: {error}"[:200]))
        return
    if frame.empty:
        result.wrong.append(("silently wrong", "accepted, but its frame is empty"))
    finite = frame["value"].map(lambda value: isinstance(value, float) and math.isfinite(value))
    odd = frame[~finite & (frame["queries"] != 0).fillna(True)]  # a mean over no queries is none
    if len(odd):
        result.wrong.append(("silently wrong", f"{len(odd)} values are not finite, the first {odd['metric'].iloc[0]}"))
    for file in (work / case.out).glob("checkpoints/*/*.safetensors"):
        if unreal := [name for name, tensor in load_file(file).items() if not tensor.isfinite().all()]:
            result.wrong.append(("silently wrong", f"trained weights are not finite: {unreal[0]}"))
    if case.expectation not in (SAME, SAME_OR_REFUSE):
        return
    if apart := difference(numbers(frame), reference(case.like), 1e-6 if case.rounding else 0.0):
        result.wrong.append(("silently wrong", f"other numbers than {case.like!r}: {apart}"))


def measured_in(run: Path) -> pd.DataFrame:
    """Everything that a run measured, its tables one under the other."""
    tables = read_run(run)[0]
    columns = ["arm", "task", "site", "layer", "head", "pair", "distance", "queries", "phase", "metric", "value"]
    frames = [frame.reindex(columns=columns).astype({"value": "float64"}) for frame in tables.values() if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def numbers(frame: pd.DataFrame) -> list[tuple[str, float]]:
    """What was measured, but for time: the values by name, whatever the order of the rows."""
    rows = frame[frame["metric"] != "tokens_per_s"]
    names = (
        rows[["arm", "task", "site", "layer", "head", "pair", "distance", "phase", "metric"]]
        .astype("string")
        .fillna("-")
        .agg(" ".join, axis=1)
    )
    return sorted(zip(names, rows["value"], strict=True))


def difference(ours: list[tuple[str, float]], theirs: list[tuple[str, float]], tolerance: float) -> str:
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return f"{len(ours)} rows for {len(theirs)}, or rows of other things"
    both = [
        (name, a, b) for (name, a), (_, b) in zip(ours, theirs, strict=True) if not (math.isnan(a) and math.isnan(b))
    ]
    apart = [(name, a, b) for name, a, b in both if not math.isclose(a, b, rel_tol=tolerance, abs_tol=0.1 * tolerance)]
    return f"{len(apart)} of {len(ours)} values, the first {apart[0]}" if apart else ""


@functools.cache
def reference(name: str) -> list[tuple[str, float]]:
    """The numbers of a case in which nothing is odd."""
    work = new_folder()
    case = references()[name]
    prepare(case, work)
    code, _, stderr, escaped = run_command(case.command, case.arguments, work)
    assert code == 0, (name, stderr, escaped)
    found = numbers(measured_in(work / case.out))
    shutil.rmtree(work)
    return found


def references() -> dict[str, Case]:
    roles = {role: hostile.with_model(role, SAME, "plain", []) for role in hostile.ROLES}
    tokens = {"--tokens": "docs.txt", "--document-length": None, "--window": None}
    states = {**hostile.STATES_ON, **tokens}
    read = {
        "options": {**hostile.TEXT, "--keys": None, "--values": None},
        "positional": ["reader"],
        "needs": ["reader"],
    }
    return {
        **roles,
        "spans": hostile.case("spans", SAME, "plain"),
        "heads": hostile.case("heads", SAME, "plain"),
        "distill": hostile.case("distill", SAME, "plain"),
        "resume": hostile.resume(SAME, "plain"),
        "trained": hostile.resume(SAME, "plain", run="trained"),
        "trace tokens": hostile.case("trace", SAME, "plain", hostile.DOCS, options=tokens),
        "spans tokens": hostile.case("spans", SAME, "plain", hostile.DOCS, options=states),
        "passkey": hostile.case("retrieval", SAME, "plain", **read),
    }


def lost(result: Result, work: Path, before: Tree, after: Tree) -> list[str]:
    """What was there and is not, or is another; and what is left behind where nothing may be."""
    case, accepted = result.case, result.verdict == "accepted"
    root = work.parent.parent.resolve()
    here = f"{work.resolve().relative_to(root)}/"

    def lies_in(path: str, place: str) -> bool:
        return f"{path}/".startswith(f"{place}/")

    changed = [path for path, what in before.items() if after.get(path) != what]
    if accepted and case.replaces:
        changed = [path for path in changed if not lies_in(path, here + case.replaces)]
    if case.resumes:
        changed = [path for path in changed if not may_change(path.removeprefix(f"{here}{case.resumes}/"))]
    new = [path for path in after if path not in before and not re.search(r"(^|/)\.[^/]*lock[^/]*$", path)]
    begun = case.command == "distill" and case.expectation is ANY  # training may have begun, and been stopped
    if accepted or begun or case.resumes:
        place = os.path.relpath(os.path.realpath(work / case.out), root)
        new = [path for path in new if not lies_in(path, place) and not lies_in(place, path)]
    problems = [f"{'changed' if path in after else 'gone'}: {path.removeprefix(here)}" for path in changed]
    return [*problems, *(f"left behind: {path.removeprefix(here)}" for path in new)][:3]


def may_change(path: str) -> bool:
    """Whether a resumption may write this path of its run: no finished checkpoints and no files of the user's."""
    made = r"manifest\.json|log\.jsonl|tables(/\w+\.parquet)?|\.writer"
    made += r"|snapshots/(short|long)-\d{6}(/[\w.]+)?|checkpoints/long(/.*)?"
    return re.fullmatch(made, path) is not None


# The table


def counted(results: Sequence[Result]) -> dict[str, Counter[str]]:
    """By command: how many were tried, each verdict, and how many are wrong in which way."""
    rows: dict[str, Counter[str]] = {}
    for result in results:
        name = result.case.command if result.case.command in hostile.PLAIN else "(none)"
        row = rows.setdefault(name, Counter())
        row["tried"] += 1
        row[result.verdict] += 1
        for kind in {kind for kind, _ in result.wrong} - {"traceback"}:
            row[kind] += 1
    return rows


def table(rows: dict[str, Counter[str]]) -> str:
    """The counts as text, a row for each command and one for all."""
    columns = ("tried", *KINDS)
    order = [*(name for name in hostile.PLAIN if name in rows), *(name for name in rows if name not in hostile.PLAIN)]
    total = sum(rows.values(), Counter())
    lines = [" | ".join(["command".ljust(10), *columns])]
    for name, row in [*((name, rows[name]) for name in order), ("all", total)]:
        lines.append(" | ".join([name.ljust(10), *(str(row[column]).rjust(len(column)) for column in columns)]))
    return "\n".join(lines)


def as_typed(case: Case) -> str:
    words = " ".join(word if re.fullmatch(r"[\w./=+,-]+", word) else ascii(word[:80]) for word in case.arguments)
    return f"rope-probe {case.command} {words}"


def described(result: Result) -> str:
    case = result.case
    lines = [f"{case.family}: {case.description}", f"    {ascii(as_typed(case))[1:-1]}"]
    lines += [f"    {kind}: {ascii(what)[1:-1]}" for kind, what in result.wrong]
    if result.stderr and result.verdict == "one line":
        lines.append(f"    it said {result.stderr.strip()[:300]!r}")
    return "\n".join(lines)


# The tests


@pytest.fixture(scope="module", autouse=True)
def _kit_for_a_while():
    yield
    remove_kit()


def chosen() -> list[Case]:
    """The cases that the tests run: a share of each family by chance, but of those that must be the same nearly all."""
    kept = []
    for case in hostile.all_cases():
        told = f"{hostile.SEED} {case.family} {case.command} {case.description}".encode("utf-8", "surrogatepass")
        chance = int.from_bytes(hashlib.sha256(told).digest()[:4]) / 2**32
        if chance < (0.9 if case.expectation is SAME else SHARE):
            kept.append(case)
    return kept


def test_there_are_cases_enough_of_every_command_and_they_are_the_same_each_time():
    cases = chosen()
    assert len(cases) >= 500
    assert {case.command for case in cases} >= set(hostile.PLAIN)
    assert [(case.arguments, case.description) for case in cases] == [
        (case.arguments, case.description) for case in chosen()
    ]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_nothing_hostile_ends_in_a_traceback_wrong_numbers_or_a_loss(chunk, tmp_path_factory):
    results = [run(case) for case in chosen()[chunk::CHUNKS]]
    tell(chunk, results, tmp_path_factory.getbasetemp())
    bad = [described(result) for result in results if result.bad]
    assert not bad, "\n".join([table(counted(results)), *bad])


def tell(chunk: int, results: Sequence[Result], base: Path) -> None:
    """Write a chunk's counts; the last chunk to end prints those of all, and leaves them in hostile.txt."""
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hostile"
    shared.mkdir(exist_ok=True)
    (shared / f"{chunk}.json").write_text(json.dumps(counted(results)))
    written = list(shared.glob("*.json"))
    if len(written) == CHUNKS:
        rows: dict[str, Counter[str]] = {}
        for file in written:
            for name, row in json.loads(file.read_text()).items():
                rows[name] = rows.get(name, Counter()) + Counter(row)
        (shared / "hostile.txt").write_text(table(rows) + "\n")
        print(table(rows))


def main() -> None:
    """Run cases and print the table, what is bad, and what is poorly said."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    cases = hostile.all_cases() if given.all or given.only else chosen()
    cases = [case for case in cases if given.only in f"{case.family} {case.command} {case.description}"]
    started = time.perf_counter()
    results = []
    for case in cases:
        results.append(run(case))
        if given.save:
            with given.save.open("a") as file:
                told = replace(results[-1].case, prepare=())
                file.write(json.dumps({**vars(results[-1]), "case": vars(told)}, default=str) + "\n")
    for result in results:
        if result.bad:
            print(described(result), "\n")
    for result in results:
        for what in result.poor:
            print(f"poor line ({what}): {result.case.family}: {result.case.description}")
            print(f"    {result.stderr.strip()[:300]!r}")
    print(table(counted(results)))
    print(f"{len(results)} cases in {time.perf_counter() - started:.0f} s")
    remove_kit()


if __name__ == "__main__":
    main()
