import json

import pandas as pd
import pytest
import torch

from rope_probe import InputError, results
from rope_probe.results import is_complete, new_run, read_run, tidy
from tests import zoo

ROWS = [{"site": "logits", "metric": "kl_nats", "value": 0.5}]


def test_frames_get_every_column_in_order():
    frame = tidy(ROWS)
    assert list(frame.columns) == list(results.SCHEMA)
    assert frame["layer"].isna().all()
    with pytest.raises(InputError, match="'colour'"):
        tidy([{"colour": "red"}])


def test_a_run_comes_back_as_it_was_recorded(tmp_path):
    with new_run(tmp_path / "run", "test", {"steps": 3}) as run:
        run.record(tidy(ROWS), model="tiny", seed=4)
        (run.folder / "note.txt").write_text("beside")
        assert not (tmp_path / "run").exists()
    frame, manifest = read_run(tmp_path / "run")
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
    assert read_run(tmp_path / "run")[0].empty


def test_a_run_that_fails_leaves_nothing_and_keeps_the_old_one(tmp_path):
    with new_run(tmp_path / "run", "first", {"kept": True}):
        pass

    def fail_midway():
        with new_run(tmp_path / "run", "first", {}, overwrite=True) as run:
            run.record(tidy(ROWS))
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


def test_metrics_of_another_schema_are_refused(tmp_path):
    with new_run(tmp_path / "run", "test", {}):
        pass
    pd.DataFrame({"colour": ["red"]}).to_parquet(tmp_path / "run" / "metrics.parquet")
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
    told = results.describe_model(model)
    assert told["rope_parameters"]["rope_theta"] == 1e4
    assert told == results.describe_model(zoo.llama())
    model.lm_head.weight.data[0, 0] += 1e-6
    assert told["weights_sha256"] != results.describe_model(model)["weights_sha256"]
    assert results.describe_model(model.to(torch.bfloat16))["dtype"] == "torch.bfloat16"
    assert results.hash_tokens(torch.tensor([1, 2])) == results.hash_tokens(torch.tensor([1, 2], dtype=torch.int32))
    assert results.hash_tokens(torch.tensor([1, 2])) != results.hash_tokens(torch.tensor([2, 1]))


def test_nothing_is_pickled(tmp_path):
    with new_run(tmp_path / "run", "test", {}) as run:
        run.record(tidy(ROWS))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".rope_probe", "metrics.parquet", "manifest.json"}
    assert isinstance(pd.read_parquet(tmp_path / "run" / "metrics.parquet"), pd.DataFrame)
