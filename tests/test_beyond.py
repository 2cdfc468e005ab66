"""What is measured beyond a pretrained window, against whole passes and planted rows; and every arm of its training."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig

from experiments import beyond, beyond_train
from experiments import beyond_verdicts as said
from experiments.reproduce import report_all, runs_of
from experiments.stages import Options, discover
from rope_probe import AttentionTemperature, InputError, head_scores, load_model
from rope_probe.gallery import figures as plots
from rope_probe.models import checkpoints
from rope_probe.retrieval.haystacks import haystack
from rope_probe.retrieval.heads import _copied, needle_of
from rope_probe.retrieval.reading import Reading
from rope_probe.retrieval.tasks import Trial
from rope_probe.runs.intervals import share_interval
from rope_probe.runs.results import new_run, read_run
from rope_probe.windows.embedded_text import documents
from rope_probe.windows.packing import pack
from tests import zoo

OF_BYTES = {**zoo.SIZES, "vocab_size": 384, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def model():
    made = load_model(zoo.model(LlamaConfig(**OF_BYTES)), dtype=torch.float64)
    made.tokenizer = ByT5Tokenizer()
    return made


@pytest.fixture(scope="module")
def stack(model):
    return haystack("passkey", model.tokenizer, 2600, every=500)


# Measurements ---------------------------------------------------------------------------------------------------------


def test_loss_by_block_is_that_of_a_whole_pass_without_the_needles(model, stack):
    reading = Reading(model)
    rows = []
    for at in (stack.cut(1400), stack.cut(2600)):
        first = len(reading)
        rows += beyond.loss_rows(reading, stack, reading.read(stack.tokens[first:at]), first)
    with torch.no_grad():
        logits = model(stack.tokens[:at])[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1].float(), stack.tokens[1:at], reduction="none")
    assert {row["position"] for row in rows} >= {0, 256, 512, 1024}
    for row in rows:
        if row["position"] in (0, 512):  # of one piece
            places = torch.arange(row["position"], row["position"] + 256, 8)
            kept = places[stack.is_text[places + 1]]
            assert row["value"] == pytest.approx(losses[kept].mean().item(), abs=1e-4)


def test_two_heads_look_back_as_head_scores_has_it(model):
    tokens = zoo.tokens(2, 60)[0].repeat(2)
    scores = head_scores(model, pack([tokens.tolist()], len(tokens)))
    reading = Reading(model)
    queries = {}
    reading.read(tokens, [beyond._keep(queries, 1, "q")])
    for head in range(4):
        query, key = queries[1][0][:, head : head + 1], reading.keys(1)[:, head // 2, None]
        found = beyond.looks_back(query, key, model.scoring(1), tokens, 0)
        of_head = scores[(scores["layer"] == 1) & (scores["head"] == head)].set_index("metric")["value"]
        assert found["previous_token"] == pytest.approx(of_head["previous_token"], abs=1e-10)
        assert found["induction"] == pytest.approx(of_head["induction"], abs=1e-10)
        scale = model.scoring(1).scaling
        pattern = (query[:, 0] @ key[:, 0].T * scale).masked_fill(torch.ones(120, 120).triu(1) > 0, -torch.inf)
        late = pattern.softmax(-1)[90:]
        expected = late[torch.arange(30), torch.arange(89, 119)].mean().item()
        assert beyond.looks_back(query, key, model.scoring(1), tokens, 90)["previous_token"] == pytest.approx(expected)


def test_heads_that_copy_are_those_of_a_whole_pass(model, stack):
    reading = Reading(model, [AttentionTemperature(3.0)])
    reading.read(stack.tokens)
    question = stack.questions(stack.cut(2600), 2)[1]
    trial = Trial(
        torch.cat([stack.tokens[: question.at], question.prompt]),
        question.answer,
        (question.needle.value,),
        question.distance,
    )
    needle = needle_of(trial)
    assert needle[question.needle.place]
    window = pack([torch.cat([trial.prompt, trial.answer[:-1]]).tolist()], len(trial.tokens) - 1)
    with model.hooks(fwd_hooks=AttentionTemperature(3.0).hooks(model, window)):
        expected = _copied(model, trial, trial.answer, needle, [0, 1])
    assert torch.equal(beyond.copied_by(reading, question, stack), expected)


def test_log_n_branches_off_where_it_begins_to_act(model, stack):
    trained = 2048  # where a window ends, so that there is something to branch from
    rows = dict(beyond.readings(model, stack, "none_and_log_n", 2600, lambda tokens: None, trained))
    reading = Reading(model, [AttentionTemperature("log_n", reference=trained)])
    reading.read(stack.tokens[: stack.cut(2600)])
    expected = list(beyond.question_rows(reading, stack.questions(stack.cut(2600), 8), stack, 2600))
    found = [row for row in rows["log_n"] if row["metric"] in ("hit", "answer_logprob_nats")]
    assert [row["value"] for row in found] == pytest.approx([row["value"] for row in expected], abs=1e-9)
    plain = [row["value"] for row in rows["none"] if row["metric"] == "answer_logprob_nats"]
    assert plain != pytest.approx([row["value"] for row in found if row["metric"] == "answer_logprob_nats"], abs=1e-6)


def test_yarn_frequencies_come_without_its_temperature_and_the_others_as_named(model):
    for name, rope in beyond.ROTATIONS.items():
        rotary = beyond.rotated(model, rope).rotary[0]
        assert rotary.scaling == 1.0, name
    own, linear = (beyond.rotated(model, beyond.ROTATIONS[name]).rotary[0].inv_freq for name in ("own", "linear_2"))
    assert torch.allclose(own, 2 * linear)
    assert beyond.YARN_TEMPERATURE.factor == pytest.approx((0.1 * np.log(2) + 1) ** 2)


# Stages ---------------------------------------------------------------------------------------------------------------


def test_quick_stages_are_two_short_readings_and_full_ones_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "is_available", lambda name: True)
    quick, full = (beyond.stages(Options(tmp_path, full=full)) for full in (False, True))
    assert len(quick) == 2
    assert all(stage.seconds < 60 for stage in quick.values())
    assert len(full) == len(beyond.QUICK) + len(beyond.FULL)
    assert len({json.dumps(stage.config()) for stage in full.values()}) == len(full)
    monkeypatch.setattr(beyond, "is_available", lambda name: False)
    assert beyond.stages(Options(tmp_path, full=True)) == {}


# Verdicts, on planted rows --------------------------------------------------------------------------------------------


def test_the_full_plan_makes_the_readings_of_the_page_and_every_rotation_by_every_temperature(tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "is_available", lambda name: True)
    full = beyond.stages(Options(tmp_path, full=True))
    shown = ("own-none_and_log_n", "yarn_2-none", "theta_500000-none")
    assert {f"beyond/{name}-passkey-0-16384" for name in shown} <= set(full)
    read = {(arm.rotation, temperature, arm.kind, arm.seed) for arm in beyond.FULL if arm.longest == 16_384
            for temperature in arm.sharpened.split("_and_")}  # fmt: skip
    for rotation in ("own", "theta_200000", "theta_500000", "linear_2", "linear_4", "yarn_2", "yarn_4"):
        for kind in ("passkey", "niah_multikey_2"):
            assert {(rotation, temperature, kind, 0) for temperature in ("none", "log_n", "yarn")} <= read
    for rotation in ("own", "yarn_2"):
        assert {(rotation, "none", kind, seed) for kind in ("passkey", "niah_multikey_2") for seed in (1, 2)} <= read


def planted(losses, hits=(), model=said.MODEL):
    """Rows: losses by (rotation, temperature, position), hits by (rotation, window, distance), with a little noise."""
    rng = np.random.default_rng(0)
    of_text = rng.normal(0, 0.05, 64)  # what a text costs, whoever reads it
    rows = []
    for (rotation, temperature), by_span in losses.items():
        for (first, end), mean in by_span.items():
            for position in range(first, end, 256):
                value = mean + of_text[position // 256] + rng.normal(0, 0.01)
                place = {"rotation": rotation, "temperature": temperature, "task": "passkey", "seed": 0}
                rows.append({**place, "position": position, "metric": "loss_nats", "value": value})
    for rotation, window, distance, found in hits:
        for unit, value in enumerate(found):
            place = {"rotation": rotation, "temperature": "none", "task": "passkey", "seed": 0, "seq_len": window}
            rows.append({**place, "distance": distance, "unit": unit, "metric": "hit", "value": value})
    return said.BEYOND.frame(rows).assign(model=model)


INSIDE, BEYOND = (4096, 8192), (8192, 12_288)


def held(rows):
    frame = said.judged(rows)
    frame = frame[frame["prediction"].notna()]
    return {number: part["held"].tolist() for number, part in frame.groupby("prediction")}


def test_verdicts_follow_the_intervals():
    losses = {
        ("own", "none"): {(0, 2048): 2.0, INSIDE: 2.0, BEYOND: 5.0},
        ("own", "log_n"): {BEYOND: 4.95},
        ("own", "yarn"): {BEYOND: 4.0},
        ("yarn_2", "none"): {(0, 2048): 2.0, BEYOND: 2.0},
        ("yarn_2", "yarn"): {BEYOND: 1.99},
        ("theta_500000", "none"): {BEYOND: 4.0},
        ("linear_2", "none"): {(0, 2048): 2.5},
    }
    hits = [
        ("own", 12_288, 9000, [0] * 30),
        ("yarn_2", 12_288, 9000, [1] * 30),
        ("own", 4096, 1000, [1, 0] * 15),
        ("own", 12_288, 1000, [1, 0] * 15),
    ]
    found = held(planted(losses, hits[:3]))
    assert found[1] == ["held"]
    assert found[2] == ["held"]
    assert found[3] == ["not held"]
    assert found[4] == ["held"]
    assert found[5] == ["held"]
    assert found[7] == ["held", "not held"]  # log n gives 1/60 of it back, YaRN's temperature a third
    assert found[8] == ["held"]
    few = [(rotation, window, distance, values[:3]) for rotation, window, distance, values in hits[:2]]
    assert held(planted(losses, few))[5] == ["undecided"]
    lost = [("own", 4096, 1000, [1] * 30), ("own", 12_288, 1000, [0] * 30)]
    assert held(planted({}, lost))[6] == ["held"]
    assert held(planted({}, hits[2:]))[6] == ["not held"]


def test_the_share_given_back_is_of_the_sums():
    rng = np.random.default_rng(0)
    own = pd.Series(rng.normal(5, 0.5, 40))
    value, low, high = said.given_back(own, own - 1 + rng.normal(0, 0.05, 40), own - 4)
    assert low < 0.25 < high
    assert value == pytest.approx(0.25, abs=0.02)
    assert high - low < 0.05


def test_what_two_readings_measured_alike_counts_once():
    rows = planted({("own", "none"): {INSIDE: 2.0}}, [("own", 4096, 1000, [1, 0])])
    twice = pd.concat([rows, rows], ignore_index=True)
    assert len(said.once(twice)) == len(rows)
    tables = said.tables_of(twice)
    assert tables["answers found of asked, by window and distance"].iloc[0, 0] == "1/2"
    assert "n=2" in tables["answers found, by window"].iloc[0, 0]


def test_two_models_are_two_arms_though_they_rotate_alike():
    losses, hits = {("yarn_2", "none"): {INSIDE: 2.0}}, [("yarn_2", 4096, 1000, [1, 0])]
    one, other = planted(losses, hits, "kd-packed"), planted({("yarn_2", "none"): {INSIDE: 3.0}}, hits, "ce-packed")
    rows = pd.concat([one, other], ignore_index=True)
    assert len(said.once(rows)) == len(rows)
    apart = said.losses(rows, ("ce-packed", "yarn_2", "none"), INSIDE).mean()
    apart -= said.losses(rows, ("kd-packed", "yarn_2", "none"), INSIDE).mean()
    assert apart == pytest.approx(1, abs=0.05)
    tables = said.tables_of(rows, ("kd-packed", "yarn_2", "none"))
    assert tables["answers found, by window"].index.get_level_values("model").tolist() == ["kd-packed", "ce-packed"]
    (gain,) = (row for row in said.gains(rows, ("kd-packed", "yarn_2", "none")) if "nats of text" in row["claim"])
    assert gain["claim"].startswith("ce-packed, yarn_2, temperature none")
    assert gain["measured"] == pytest.approx(-1, abs=0.05)


def test_the_map_says_how_many_were_found_at_each_window_and_distance():
    hits = [("own", 4096, 1000, [1, 1, 0, 1]), ("own", 12_288, 1000, [0, 0]), ("own", 12_288, 9000, [1, 0, 0])]
    frame = planted({}, hits).assign(model="tiny")
    (panel,) = plots.window_by_distance(pd.concat([frame, frame], ignore_index=True)).data
    assert list(panel.y) == ["4,096", "12,288"]
    assert list(panel.x) == ["0 to 2", "2 to 4", "4 to 8", "8 to 12"]
    assert [list(line) for line in panel.text] == [["3/4", "", "", ""], ["0/2", "", "", "1/3"]]
    np.testing.assert_allclose(panel.z, [[0.75, *[np.nan] * 3], [0, np.nan, np.nan, 1 / 3]])
    assert panel.customdata[0][0] == "[{:.2f}, {:.2f}]".format(*share_interval([0.75], 4))


def test_the_loss_of_one_text_is_a_line_by_rotation_and_temperature():
    losses = {("own", "none"): {INSIDE: 2.0, BEYOND: 5.0}, ("yarn_2", "yarn"): {INSIDE: 2.0, BEYOND: 2.5}}
    rows = planted(losses).assign(model="tiny")
    figure = plots.loss_by_position(pd.concat([rows, rows], ignore_index=True))
    for line in figure.data:
        rotation = line.name.split(",")[0]
        mine = rows[rows["rotation"] == rotation]
        expected = mine.groupby(mine["position"] // 1024 * 1024 + 512)["value"].mean()
        np.testing.assert_allclose(line.y, expected)
        np.testing.assert_array_equal(line.x, expected.index)
    assert [line.name for line in figure.data] == ["own", "yarn_2, temperature yarn"]


def test_figures_part_models_that_rotate_alike_and_name_them_where_there_are_several():
    of_kd, of_ce = {("yarn_2", "none"): {INSIDE: 2.0}}, {("yarn_2", "none"): {INSIDE: 3.0}}
    one = planted(of_kd, [("yarn_2", 4096, 1000, [1, 1])], "kd-packed")
    other = planted(of_ce, [("yarn_2", 4096, 1000, [0, 1])], "ce-packed")
    both = pd.concat([one, other], ignore_index=True)
    lines = {line.name: np.mean(line.y) for line in plots.loss_by_position(both).data}
    assert lines == pytest.approx({"kd-packed, yarn_2": 2.0, "ce-packed, yarn_2": 3.0}, abs=0.05)
    panels = plots.window_by_distance(both)
    assert [panel.text[0][0] for panel in panels.data] == ["2/2", "1/2"]
    titles = {note.text.replace("<br>", " ") for note in panels.layout.annotations}
    assert {"kd-packed, yarn_2", "ce-packed, yarn_2"} <= titles
    assert [line.name for line in plots.loss_by_position(one).data] == ["yarn_2"]
    assert "yarn_2" in [note.text for note in plots.window_by_distance(one).layout.annotations]


# Training -------------------------------------------------------------------------------------------------------------


def trained(far, answers, near=None, found=()):
    """Rows of arms: loss at 12,288 to 16,384, and at 0 to 2,048, and answers in 16,384 tokens, nats a token.

    `far` and `answers` are by (arm, temperature), `near` by arm; of an arm in `found` all passkeys are found.
    """
    rng = np.random.default_rng(0)
    parts = []
    for (arm, temperature), loss in far.items():
        spans = {(12_288, 16_384): loss, **({(0, 2048): near[arm]} if near and temperature == "none" else {})}
        parts.append(planted({("yarn_2", temperature): spans}, model=arm))
    for (arm, temperature), mean in answers.items():
        place = {"rotation": "yarn_2", "temperature": temperature, "task": "passkey", "seq_len": 16_384}
        rows = []
        for seed in range(3):
            for unit in range(8):
                at = {**place, "seed": seed, "unit": unit, "distance": 1000 * unit}
                rows.append({**at, "metric": "answer_logprob_nats", "value": mean + rng.normal(0, 0.03)})
                rows.append({**at, "metric": "hit", "value": float(arm in found)})
        parts.append(said.BEYOND.frame(rows).assign(model=arm))
    return pd.concat(parts, ignore_index=True)


TRAINS = [arm for arm in beyond_train.ARMS if arm != "temperature"]
AS_PREDICTED = {"kd-packed": -1.0, "hard-packed": -1.3, "ce-packed": -1.5, "temperature": -1.6}


def verdicts_of_training(**changes):
    """What becomes of each prediction where all come out as predicted, but for these arms."""
    temperatures = {("temperature", sharp): 0.0 for sharp in ("none", "log_n", "yarn")}
    arms = {**dict.fromkeys([(arm, "none") for arm in TRAINS], 0.0), **temperatures}
    far = {arm: 2.5 + changes.get("far", {}).get(arm, 0) for arm in arms}
    answers = {arm: AS_PREDICTED.get(arm[0], -1.6) + changes.get("answers", {}).get(arm, 0) for arm in arms}
    near = {arm: 2.7 + changes.get("near", {}).get(arm, 0) for arm in beyond_train.ARMS}
    frame = beyond_train.judged(trained(far, answers, near, changes.get("found", ())))
    frame = frame[frame["prediction"].notna()]
    return {number: part["held"].tolist() for number, part in frame.groupby("prediction")}


def test_predictions_of_training_follow_the_intervals():
    held = verdicts_of_training()
    assert {number: len(rows) for number, rows in held.items()} == {
        1: 2, 2: 1, 3: 2, 4: 1, 5: 3, 6: 1, 7: 1, 8: 1, 9: 6, 10: 6, 11: 6
    }  # fmt: skip
    assert set(held) == set(beyond_train.PREDICTIONS)
    assert {verdict for rows in held.values() for verdict in rows} == {"held"}
    kd, ce, hard = (("kd-packed", "none"), ("ce-packed", "none"), ("hard-packed", "none"))
    weak = verdicts_of_training(answers={kd: -0.7})
    assert [weak[number] for number in (2, 4, 6, 7)] == [["not held"]] * 4
    assert weak[3] == ["not held"] * 2
    assert verdicts_of_training(answers={("temperature", "yarn"): 0.6})[3] == ["held", "not held"]
    assert verdicts_of_training(answers={("hard-masked", "none"): 0.5})[5] == ["held", "not held", "held"]
    assert verdicts_of_training(answers={ce: 0.5})[8] == ["not held"]
    assert verdicts_of_training(answers={hard: 0.2})[7] == ["undecided"]
    assert verdicts_of_training(far={("temperature", "log_n"): 0.5})[1] == ["not held", "held"]
    assert verdicts_of_training(far={kd: -0.5})[9] == ["not held", *["held"] * 5]
    assert verdicts_of_training(near={"kd-packed": 0.5})[10] == ["not held", *["held"] * 5]
    assert verdicts_of_training(found=("kd-packed",))[11] == ["not held", *["held"] * 5]


def test_arms_that_were_trained_at_full_size_are_reported_and_none_is_planned_else(tmp_path, monkeypatch):
    assert beyond_train in discover()
    assert beyond_train.stages(Options(tmp_path, full=True)) == {}
    monkeypatch.setattr(sys.modules["__main__"], "__file__", beyond_train.__file__, raising=False)
    rows = trained({(arm, "none"): 2.5 for arm in beyond_train.ARMS}, {})
    ways = {"device": "cuda", "dtype": "bfloat16", "attn": "sdpa"}
    for arm in ("kd-packed", "temperature", "ce-packed"):
        config = beyond_train.full_size_config(arm, ways)
        if arm == "ce-packed":
            config["training"]["phases"][0]["steps"] = 2  # a trial
        with new_run(tmp_path / "beyond_train" / arm, "beyond_train", config) as run:
            run.record(said.BEYOND, rows[rows["model"] == arm].drop(columns=["run_id", "experiment"]))
    stages = beyond_train.stages(Options(tmp_path))
    assert list(stages) == ["beyond_train/kd-packed", "beyond_train/temperature"]
    section = report_all([beyond_train], runs_of(stages, {}))["beyond_train"]
    assert section.predictions == beyond_train.PREDICTIONS
    assert section.verdicts["prediction"].dropna().tolist() == [9]
    assert set(section.figures) <= set(section.predictions)
    table = section.tables["loss of natural text, nats a token, by position"]
    assert set(table.index.get_level_values("model")) == {"kd-packed", "temperature"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student, a wider teacher of the same tokenizer, and local text."""
    root = tmp_path_factory.mktemp("beyond")
    for name, width in (("student", 32), ("teacher", 48)):
        config = LlamaConfig(**{**zoo.SIZES, "vocab_size": 259, "max_position_embeddings": 4096, "hidden_size": width})
        checkpoints.save(zoo.model(config, seed=width, scale=0.1), root / name)
        ByT5Tokenizer(extra_ids=0).save_pretrained(root / name)
    text = root / "text.txt"
    text.write_text("\n\n".join(documents()[:3]), encoding="utf-8")
    return root / "student", root / "teacher", text


@pytest.mark.parametrize("arm", beyond_train.ARMS)
def test_every_arm_trains_two_steps_and_is_measured(arm, folders, tmp_path):
    student, teacher, text = folders
    beyond_train.train_and_measure(
        arm,
        tmp_path / arm,
        str(student),
        str(teacher),
        data={"kind": "text", "files": [str(text)]},
        rotation="yarn_2",
        window=1024,
        tokens=4096,
        batch_tokens=2048,
        lr=1e-3,
        seed=0,
        ways={"device": "cpu"},
        longest=1500,
        trained=800,
        seeds=[0],
    )
    tables, manifest = read_run(tmp_path / arm)
    rows = tables["beyond"]
    assert set(rows["temperature"]) == {"none", "log_n", "yarn"}
    assert set(rows["model"]) == {arm}
    assert {"hit", "answer_logprob_nats", "loss_nats"} <= set(rows["metric"])
    assert np.isfinite(rows["value"]).all()
    before = load_model(student).original_model.state_dict()
    if arm == "temperature":
        assert "losses" not in tables or tables["losses"].empty
        return
    folder = tmp_path / arm / "training" / "checkpoints" / "extension"
    after = load_model(folder)
    assert after.original_model.config.rope_parameters["rope_type"] == "yarn"
    assert any(not torch.equal(before[name], weight) for name, weight in after.original_model.state_dict().items())
    metric = {"kd": "kd_nats", "hard": "hard_label_nats", "ce": "ce_nats"}[beyond_train.ARMS[arm].learns_by]
    assert metric in set(tables["losses"]["metric"])
    phase = manifest["config"]["training"]["phases"][0]
    assert phase["steps"] == 2
    assert phase["masked"] == phase["teacher_masked"] == beyond_train.ARMS[arm].masked
    assert phase["data"]["longest"] == 512


def test_what_cannot_be_trained_is_refused():
    shape = {"window": 1024, "batch_tokens": 2048, "lr": 1e-3, "seed": 0, "ways": {}}
    given = {"data": {"kind": "text"}, "rope": beyond.ROTATIONS["own"], **shape}
    with pytest.raises(InputError, match="arm must be one of kd-packed"):
        beyond_train.training_config("sgd", "a", "b", tokens=4096, **given)
    with pytest.raises(InputError, match="2048 or more"):
        beyond_train.training_config("kd-packed", "a", "b", tokens=100, **given)
    config = beyond_train.training_config("kd-packed", "a", "b", tokens=10_000, **given)
    assert config.teachers == {"teacher": "b"}
    assert beyond_train.training_config("ce-masked", "a", "b", tokens=10_000, **given).teachers == {}
    assert beyond_train.training_config("temperature", "a", "b", tokens=10_000, **given) is None
