"""One time to the end: what is told of work that is under way."""

import io
import sys

import pytest
from rich.console import Console

from experiments.stages import Stage, _Progress
from rope_probe.runs import progress as progress_module
from rope_probe.runs.progress import in_time, progress


@pytest.mark.parametrize(("seconds", "told"), [
    (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (60 * 89, "89 min"), (3600 * 3 + 60 * 20, "3 h 20 min"),
    (3600 * 2000, "2,000 h 00 min"),
])  # fmt: skip
def test_durations_in_words(seconds, told):
    assert in_time(seconds) == told


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_tell_the_time_to_the_end(clock, capsys):
    with progress("layers", 100) as advance:
        clock[0] = 20.0
        advance(10)
        clock[0] = 21.0
        advance(1)  # too soon for a line
        clock[0] = 200.0
        advance(89, "done")
    first, last = capsys.readouterr().err.splitlines()
    assert first == "layers: 10/100, 0.5/s, about 3 min left"
    assert last == "layers: 100/100, 0.5/s, in 3 min done"


def test_work_of_an_earlier_process_does_not_count_as_speed(clock, capsys):
    with progress("tokens", 1000) as advance:
        advance(900, skipped=True)
        clock[0] = 50.0
        advance(50)
    assert capsys.readouterr().err == "tokens: 950/1000, 1.0/s, about 50 s left\n"


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


def test_a_bar_tells_one_time_to_the_end_when_steps_take_minutes(monkeypatch):
    now = [0.0]
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(
        progress_module, "Console", lambda stderr: Console(file=terminal, width=120, get_time=lambda: now[0])
    )
    with progress("tokens", 1000) as advance:
        advance(400, skipped=True)
        for _ in range(4):
            now[0] += 60.0
            advance(100, "[long], loss 1.0")
            sys.stderr.flush()
    told = terminal.getvalue()
    assert "about 2 min left" in told  # 200 tokens at 100 a minute; without the 400 it would be less
    assert "-:--:--" not in told
    assert "[long], loss 1.0" in told


def test_urgent_stages_tell_the_time_to_the_end_of_all_that_is_planned(tmp_path, capsys):
    planned = {name: Stage((name,), tmp_path / name, dict, seconds=600.0) for name in ("figure", "a", "b", "c")}
    shown = _Progress(planned, Console(file=io.StringIO()))
    shown.started("figure")
    shown.ended("figure", "")
    assert "3 of 4 stages left, about 15 min" in capsys.readouterr().err


def test_the_time_to_the_end_of_stages_follows_the_pace_of_the_machine(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("experiments.stages.time.monotonic", lambda: clock[0])
    planned = {name: Stage((name,), tmp_path / name, dict, seconds=600.0) for name in ("reused", "slow", "a", "b")}
    shown = _Progress(planned, Console(file=io.StringIO()))
    shown.started("reused")
    shown.ended("reused", "")
    assert "3 of 4 stages left, about 15 min" in capsys.readouterr().err  # it says nothing of the pace
    shown.started("slow")
    clock[0] = 1800.0
    shown.ended("slow", "")  # three times its estimate
    assert "2 of 4 stages left, about 30 min" in capsys.readouterr().err
    shown.started("a")
    clock[0] += 3000.0  # five times already
    assert shown._remaining() == 2400  # four times, on the mean: "b" alone is left
