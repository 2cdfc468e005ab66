import errno
import json
import os
import subprocess
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from rope_probe import InputError, Window, load_model, pack, repeated_window
from rope_probe.models import checkpoints
from rope_probe.runs import folders as atomic
from rope_probe.runs import provenance, results, tables
from rope_probe.runs.results import is_complete, new_run, open_run, read_run, read_tables
from rope_probe.runs.tables import Column, Metric
from rope_probe.tracing.propagation import DELTAS
from tests import zoo

ROWS = [{"site": "logits", "metric": "kl_nats", "value": 0.5}]


def test_frames_get_every_column_in_order():
    frame = DELTAS.frame(ROWS)
    assert list(frame.columns) == list(DELTAS.columns)
    assert dict(frame.dtypes.astype("string")) == dict(DELTAS.types)
    assert frame["layer"].isna().all()
    with pytest.raises(InputError, match="no column 'colour'"):
        DELTAS.frame([{"colour": "red"}])
    with pytest.raises(InputError, match="no metric 'loudness'"):
        DELTAS.frame([{"metric": "loudness", "value": 1.0}])


def test_a_table_is_declared_once():
    metrics = {"test_metric": Metric("a metric")}
    own = {"colour": Column("string", "a colour")}
    first = tables.declare("test_table", "a table", ("layer", "colour"), metrics, own=own)
    try:
        assert list(first.columns) == ["run_id", "experiment", "model", "seed", "layer", "colour", "metric", "value"]
        assert tables.declare("test_table", "a table", ("layer", "colour"), metrics, own=own) is first
        with pytest.raises(InputError, match="another table 'test_table'"):
            tables.declare("test_table", "another", (), metrics)
        with pytest.raises(InputError, match="'smell'"):
            tables.declare("other_table", "a table", ("smell",), metrics)
        with pytest.raises(InputError, match="a table's name"):
            tables.declare("../table", "a table", (), metrics)
    finally:
        del tables.TABLES["test_table"]


def test_tables_that_are_not_there_are_empty_where_they_are_declared(tmp_path):
    with new_run(tmp_path / "run", "test", {}) as run:
        run.record(DELTAS, ROWS)
    found = read_tables([tmp_path / "run", tmp_path / "run"])
    assert list(found) == ["deltas"]
    assert len(found["deltas"]) == 2
    assert list(found["retrieval"].columns) == list(tables.TABLES["retrieval"].columns)
    assert found["retrieval"].empty
    with pytest.raises(InputError, match="no table 'nothing' here; there are deltas"):
        found["nothing"]
    both = found.joined(["deltas", "retrieval"])
    assert len(both) == 2
    assert {"site", "distance"} <= set(both.columns)


def test_a_table_that_nobody_declares_is_as_stored(tmp_path):
    stranger = tables.declare("test_stranger", "a table", ("layer",), {"test_metric": Metric("a metric")})
    with new_run(tmp_path / "run", "test", {}) as run:
        run.record(stranger, [{"metric": "test_metric", "value": 1.0, "layer": 3}])
    del tables.TABLES["test_stranger"]
    frame = read_run(tmp_path / "run")[0]["test_stranger"]
    assert frame["layer"].tolist() == [3]
    assert frame.dtypes["layer"] == "Int64"


def test_a_run_comes_back_as_it_was_recorded(tmp_path):
    with new_run(tmp_path / "run", "test", {"steps": 3}) as run:
        run.record(DELTAS, ROWS, model="tiny", seed=4)
        (run.folder / "note.txt").write_text("beside")
        assert not (tmp_path / "run").exists()
    found, manifest = read_run(tmp_path / "run")
    frame = found["deltas"]
    assert frame["value"].tolist() == [0.5]
    assert (frame.loc[0, "model"], frame.loc[0, "seed"], frame.loc[0, "experiment"]) == ("tiny", 4, "test")
    assert frame.loc[0, "run_id"] == manifest["run_id"]
    assert (manifest["status"], manifest["config"]) == ("complete", {"steps": 3})
    assert {"argv", "packages", "git", "hardware", "wall_s", "peak_memory_bytes"} <= set(manifest)
    assert manifest["packages"]["torch"].startswith("2.")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_empty_runs_can_be_read(tmp_path):
    with new_run(tmp_path / "run", "test", {}):
        pass
    assert read_run(tmp_path / "run")[0] == {}


def test_a_run_that_fails_leaves_nothing_and_keeps_the_old_one(tmp_path):
    with new_run(tmp_path / "run", "first", {"kept": True}):
        pass

    def fail_midway():
        with new_run(tmp_path / "run", "first", {}, overwrite=True) as run:
            run.record(DELTAS, ROWS)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert read_run(tmp_path / "run")[1]["config"] == {"kept": True}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_replacement_cut_short_between_its_renames_is_undone(tmp_path):
    with new_run(tmp_path / "run", "test", {"kept": True}):
        pass
    (tmp_path / "run").rename(tmp_path / ".run.old-12345678")
    with pytest.raises(ZeroDivisionError), new_run(tmp_path / "run", "test", {}, overwrite=True):
        raise ZeroDivisionError
    assert read_run(tmp_path / "run")[1]["config"] == {"kept": True}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_replaces_a_run_and_nothing_else(tmp_path):
    for number in (1, 2):
        with new_run(tmp_path / "run", "test", {"number": number}, overwrite=True):
            pass
    assert read_run(tmp_path / "run")[1]["config"] == {"number": 2}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="not replaced"), new_run(tmp_path / "mine", "test", {}):
        pass
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"), new_run(tmp_path / "file" / "run", "test", {}):
        pass


def test_a_failed_run_leaves_no_folders_that_it_made(tmp_path):
    with pytest.raises(InputError), new_run(tmp_path / "a" / "b" / "run", "test", {}):
        raise InputError("no")
    assert not list(tmp_path.iterdir())


def test_an_output_behind_a_link_is_written_where_it_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for link, real in (("link", "real"), ("dangling", "later")):
        with new_run(tmp_path / link, "test", {}):
            pass
        assert (tmp_path / real / "manifest.json").is_file()
        assert (tmp_path / link).is_symlink()


def test_a_name_that_is_too_long_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match="cannot write"), new_run(tmp_path / ("x" * 300), "test", {}):
        raise AssertionError


@pytest.mark.parametrize("manifest", ["[]", "null", '"x"', '{"status": "complete"}', "{", ""])
def test_manifests_that_are_none_are_refused(tmp_path, manifest):
    with new_run(tmp_path / "run", "test", {}):
        pass
    (tmp_path / "run" / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="run"):
        read_run(tmp_path / "run")
    assert not is_complete(tmp_path / "run", {})


def test_tables_of_other_columns_are_refused(tmp_path):
    with new_run(tmp_path / "run", "test", {}) as run:
        run.record(DELTAS, ROWS)
    pd.DataFrame({"colour": ["red"]}).to_parquet(tmp_path / "run" / "tables" / "deltas.parquet")
    with pytest.raises(InputError, match=r"table 'deltas' of .*'colour'"):
        read_run(tmp_path / "run")


def test_runs_of_older_versions_are_refused(tmp_path):
    with new_run(tmp_path / "run", "test", {}):
        pass
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del manifest["tables"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="run it again"):
        read_run(tmp_path / "run")


def test_only_complete_runs_can_be_read(tmp_path):
    with pytest.raises(InputError, match="not a readable run"):
        read_run(tmp_path / "absent")
    with new_run(tmp_path / "run", "test", {}):
        pass
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "running"}))
    with pytest.raises(InputError, match="not complete"):
        read_run(tmp_path / "run")


def test_a_run_is_reused_for_the_same_config_alone(tmp_path):
    config = {"steps": 3, "distances": (8, 16), "theta": 1e4}
    assert not is_complete(tmp_path / "run", config)
    with new_run(tmp_path / "run", "test", config):
        pass
    assert is_complete(tmp_path / "run", config)
    assert not is_complete(tmp_path / "run", {**config, "steps": 4})


def test_models_and_tokens_are_told_apart_by_their_hashes():
    model = zoo.llama()
    described = provenance.describe_model(model)
    assert described.rope_parameters["rope_theta"] == 1e4
    assert described == provenance.describe_model(zoo.llama())
    model.lm_head.weight.data[0, 0] += 1e-6
    assert described.weights_sha256 != provenance.describe_model(model).weights_sha256
    assert provenance.describe_model(model.to(torch.bfloat16)).dtype == "torch.bfloat16"
    hash_tokens = provenance.hash_tokens
    assert hash_tokens(torch.tensor([1, 2])) == hash_tokens(torch.tensor([1, 2], dtype=torch.int32))
    assert hash_tokens(torch.tensor([1, 2])) != hash_tokens(torch.tensor([2, 1]))


def test_what_a_run_was_made_from_is_in_its_manifest(tmp_path):
    model = load_model(zoo.llama(), attn="eager")
    repeated = repeated_window([5, 6, 7], 2)
    with new_run(tmp_path / "run", "test", {}) as run:
        run.provenance.add_model("tiny", model)
        run.provenance.add_tokens("window", repeated)
        run.provenance.add_tokens("window", repeated, masked=True)
        run.provenance.add_tokens("window", repeated, masked=True)
        run.provenance.add_tokens("reset", pack([[5, 6], [7, 8]], 4, positions="reset"), teacher_masked=True)
    manifest = read_run(tmp_path / "run")[1]
    assert manifest["models"]["tiny"]["attention_kernel"] == "eager"
    assert manifest["models"]["tiny"]["weights_sha256"] == provenance.describe_model(zoo.llama()).weights_sha256
    assert [entry["masked"] for entry in manifest["read"]["window"]] == [False, True]
    assert manifest["read"]["window"][0]["tokens_sha256"] == provenance.hash_tokens(repeated.tokens)
    (reset,) = manifest["read"]["reset"]
    assert (reset["positions"], reset["teacher_masked"]) == ("reset", True)
    skipped = Window(repeated.tokens, repeated.cu_seqlens, repeated.position_ids * 2)
    assert provenance.positions_of(skipped) == "skipped"
    assert provenance.positions_of(repeated) == "continuous"


def test_nothing_is_pickled(tmp_path):
    with new_run(tmp_path / "run", "test", {}) as run:
        run.record(DELTAS, ROWS)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".rope_probe", "tables", "manifest.json"}
    assert isinstance(pd.read_parquet(tmp_path / "run" / "tables" / "deltas.parquet"), pd.DataFrame)


def make_run(out, experiment="test", **options):
    with new_run(out, experiment, {}, **options) as run:
        run.record(DELTAS, ROWS)


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_older_run_is_replaced_only_when_asked(tmp_path):
    make_run(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="--overwrite replaces it"):
        make_run(tmp_path / "run")
    assert tree(tmp_path) == before
    make_run(tmp_path / "run", overwrite=True)
    assert tree(tmp_path) != before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_not_made_for_the_very_purpose_is_never_replaced(tmp_path):
    def refused(out, match, **options):
        before = tree(tmp_path)
        with pytest.raises(InputError, match=match):
            make_run(out, overwrite=True, **options)
        assert tree(tmp_path) == before

    make_run(tmp_path / "run")
    refused(tmp_path / "run", "is a test run, not a trace run", experiment="trace")
    checkpoints.save(zoo.llama(), tmp_path / "model")
    refused(tmp_path / "model", "is a checkpoint, not a test run")
    refused(tmp_path, "made by someone else")
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / "model.safetensors").write_text("weeks of work")
    refused(tmp_path / "run", "holds 'checkpoint/model.safetensors', which was not written with it")
    make_run(tmp_path / "noted")
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    refused(tmp_path / "noted", r"holds 'notes\.txt'")
    with open_run(tmp_path / "running", "test", {}, inputs={}):
        refused(tmp_path / "running", r"holds '\.writer'")


def test_an_input_inside_the_output_is_refused(tmp_path):
    make_run(tmp_path / "run")
    model = checkpoints.save(zoo.llama(), tmp_path / "run" / "checkpoint")
    (tmp_path / "link").symlink_to(model)
    before = tree(tmp_path)
    for read in (model, tmp_path / "link", tmp_path / "run"):
        with pytest.raises(InputError, match="is read for this and lies inside"):
            make_run(tmp_path / "run", overwrite=True, inputs=[read])
    assert tree(tmp_path) == before


def test_a_folder_that_appears_meanwhile_is_left_alone_and_the_work_is_kept(tmp_path):
    out = tmp_path / "run"

    def someone_else_writes(**options):
        with new_run(out, "test", {}, **options) as run:
            run.record(DELTAS, ROWS)
            out.mkdir(exist_ok=True)
            (out / "thesis.txt").write_text("years")

    with pytest.raises(InputError, match=r"made by someone else.* What was computed is kept at") as refusal:
        someone_else_writes()
    assert (out / "thesis.txt").read_text() == "years"
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert str(kept) in str(refusal.value)
    assert read_run(kept)[0]["deltas"]["value"].tolist() == [0.5]
    make_run(tmp_path / "second")
    out = tmp_path / "second"
    with pytest.raises(InputError, match=r"holds 'thesis\.txt'.* is kept at"):
        someone_else_writes(overwrite=True)
    assert (out / "thesis.txt").read_text() == "years"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_place_that_cannot_be_renamed_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    rename = os.rename

    def busy(source, target):
        if Path(source).name == "mounted":
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(InputError, match="as a mount point cannot"), new_run(tmp_path / "mounted", "test", {}):
        raise AssertionError


def test_what_killed_runs_left_is_cleaned_and_nothing_else(tmp_path):
    left = tmp_path / ".run.partial-0123abcd"
    left.mkdir()
    (left / atomic.LOCK).touch()
    others = [
        ".git/HEAD",
        ".DS_Store",
        ".run.partial-mine/a",
        ".run.partial-0123abce/no-lock",
        ".other.partial-0123abcd/a",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with new_run(tmp_path / "run", "test", {}):
        assert not left.exists()
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_two_that_write_to_one_place_lose_neither(tmp_path):
    def one_in_the_other():
        with new_run(tmp_path / "run", "test", {}) as first:
            make_run(tmp_path / "run")
            first.record(DELTAS, ROWS + ROWS)

    with pytest.raises(InputError, match=r"already; .* is kept at"):
        one_in_the_other()
    found = sorted(len(read_run(path)[0]["deltas"]) for path in tmp_path.iterdir())
    assert found == [1, 2]


def test_one_process_at_a_time_writes_to_a_run_that_trains(tmp_path):
    opened = partial(open_run, tmp_path / "run", "test", {}, inputs={"teacher": "abc"})
    with opened() as run, pytest.raises(InputError, match=f"written by process {os.getpid()} on "), opened(resume=True):
        raise AssertionError
    assert run.manifest["status"] == "complete"
    assert not (tmp_path / "run" / ".writer").exists()


def cut_short(out, inputs=None):
    """A run that was ended after it had done something."""

    def fail_midway():
        with open_run(out, "test", {}, inputs=inputs or {}) as run:
            (run.folder / "log.jsonl").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()


def test_a_run_in_which_nothing_was_done_is_not_left_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run", "test", {}, inputs={}):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_refusal_leaves_nothing_in_what_is_there(tmp_path):
    make_run(tmp_path / "run")
    before = tree(tmp_path)
    for resume in (False, True):
        with pytest.raises(InputError), open_run(tmp_path / "run", "distill", {}, inputs={}, resume=resume):
            raise AssertionError
    assert tree(tmp_path) == before


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path):
    cut_short(tmp_path / "run")
    (tmp_path / "run" / ".writer").write_text('{"process": 1, "host": "elsewhere"}')
    with open_run(tmp_path / "run", "test", {}, inputs={}, resume=True):
        pass
    assert read_run(tmp_path / "run")[1]["status"] == "complete"


def test_a_run_is_gone_on_with_only_from_the_same_inputs(tmp_path):
    cut_short(tmp_path / "run", inputs={"teacher": "abc"})
    other = open_run(tmp_path / "run", "test", {}, inputs={"teacher": "xyz"}, resume=True)
    with pytest.raises(InputError, match="other inputs: teacher was 'abc' and is 'xyz'"), other:
        raise AssertionError


def test_the_wall_time_of_every_session_counts(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    manifest, seen = tmp_path / "run" / "manifest.json", []

    def fail_midway():
        with open_run(tmp_path / "run", "test", {}, inputs={}) as run:
            (run.folder / "log.jsonl").write_text("{}")
            run.keep_time()
            seen.append(json.loads(manifest.read_text())["wall_s"])  # what a SIGKILL leaves
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    first = json.loads(manifest.read_text())["wall_s"]
    assert 0 < seen[0] < first
    with open_run(tmp_path / "run", "test", {}, inputs={}, resume=True):
        pass
    assert read_run(tmp_path / "run")[1]["wall_s"] > first


def test_the_commit_is_the_projects_own_or_none(tmp_path, monkeypatch):
    inside = tmp_path / "site-packages" / "rope_probe" / "runs" / "results.py"
    inside.parent.mkdir(parents=True)
    inside.touch()
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(results, "__file__", str(inside))
    assert results._git() is None


@pytest.mark.parametrize("columns", [{"value": ["a"]}, {"value": [[1.0]]}, {"seed": ["x"]}, {"seed": [1.5]}])
def test_columns_of_other_types_are_refused(tmp_path, columns):
    make_run(tmp_path / "run")
    frame = pd.read_parquet(tmp_path / "run" / "tables" / "deltas.parquet").assign(**columns)
    frame.to_parquet(tmp_path / "run" / "tables" / "deltas.parquet")
    with pytest.raises(InputError, match="columns of other types"):
        read_run(tmp_path / "run")
