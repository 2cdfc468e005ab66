import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn.utils.rnn import pad_sequence
from transformers import ByT5Tokenizer, GenerationConfig, LlamaForCausalLM

from rope_probe import InputError, KeyValueStream, load_model
from rope_probe.retrieval.probe import KeyValueTask, retrieval_accuracy, retrieval_trials, trials_hash
from rope_probe.retrieval.tasks import TextTask
from rope_probe.runs.intervals import share_interval
from tests import zoo

STREAM = KeyValueStream(32, distinct=(2, 8), keys=30, values=30)
TASK = KeyValueTask(STREAM, window=32)


@pytest.mark.parametrize("distance", [2, 8, 30])
def test_a_trial_binds_its_key_once_at_its_distance(distance):
    for trial in TASK.trials(distance, 20, seed=0).tolist():
        query, answer = trial[-2], trial[-1]
        places = [i for i in range(0, 30, 2) if trial[i] == query]
        assert places == [30 - distance]
        assert trial[30 - distance + 1] == answer
        bound = dict(zip(trial[0::2], trial[1::2], strict=True))
        assert [bound[key] for key in trial[0::2]] == trial[1::2]


def test_trials_are_a_pure_function_of_seed_and_distance():
    assert torch.equal(TASK.trials(8, 5, seed=1), TASK.trials(8, 5, seed=1))
    assert not torch.equal(TASK.trials(8, 5, seed=1), TASK.trials(8, 5, seed=2))


def test_accuracy_and_logprob_are_those_of_plain_forward_passes():
    model = load_model(zoo.llama())
    frame = retrieval_accuracy(model, TASK, [4, 8], trials=40, seed=3)
    tokens = TASK.trials(8, 40, seed=3)
    with torch.no_grad():
        logits = model(tokens)[:, -2]
    expected = (logits.argmax(-1) == tokens[:, -1]).double().mean().item()
    logprob = logits.log_softmax(-1).gather(1, tokens[:, -1:]).mean().item()
    at = frame[frame["distance"] == 8].set_index("metric")["value"]
    assert at["accuracy"] == pytest.approx(expected)
    assert at["answer_logprob_nats"] == pytest.approx(logprob, abs=1e-5)
    assert (frame["low"] <= frame["value"]).all()
    assert (frame["value"] <= frame["high"]).all()


def test_a_model_that_knows_the_answer_scores_one(monkeypatch):
    model = load_model(zoo.llama())

    def look_up(tokens):
        found = [row.tolist()[row.tolist().index(row[-1].item()) + 1] for row in tokens]
        return torch.nn.functional.one_hot(torch.tensor(found), 64).float().unsqueeze(1).expand(-1, tokens.shape[1], -1)

    monkeypatch.setattr(model, "hidden", look_up)
    monkeypatch.setattr(model, "unembed", lambda hidden: 50 * hidden)
    frame = retrieval_accuracy(model, TASK, [2, 16, 30], trials=30)
    assert (frame[frame["metric"] == "accuracy"]["value"] == 1).all()


def test_intervals_have_their_textbook_values():
    model = load_model(zoo.llama())
    frame = retrieval_accuracy(model, TASK, [4], trials=100).set_index("metric").loc["accuracy"]
    hits, z = round(100 * frame["value"]), 1.959964
    middle, half = (hits + z**2 / 2) / (100 + z**2), z * (hits * (100 - hits) / 100 + z**2 / 4) ** 0.5 / (100 + z**2)
    assert (frame["low"], frame["high"]) == pytest.approx((max(0, middle - half), middle + half), abs=1e-6)
    assert frame["trials"] == 100


def test_odd_windows_are_refused():
    with pytest.raises(InputError, match="33"):
        KeyValueTask(STREAM, window=33)


@pytest.mark.parametrize(("distance", "named"), [(3, "3"), (0, "0"), (32, "2..30")])
def test_distances_that_do_not_fit_are_refused(distance, named):
    with pytest.raises(InputError, match=named):
        retrieval_accuracy(load_model(zoo.llama()), TASK, [distance])
    with pytest.raises(InputError, match="trials"):
        retrieval_accuracy(load_model(zoo.llama()), TASK, [4], trials=0)


BYTES = ByT5Tokenizer(extra_ids=0)
PASSKEY, FWE = TextTask("passkey", BYTES, 400), TextTask("fwe", BYTES, 400)


@pytest.fixture(scope="module")
def speaker():
    """A model that knows by heart what to say to some trials of seed 0: right, in part, in capitals, late, or wrong."""
    passkeys, coded = PASSKEY.draw(128, 2, seed=0), FWE.draw(None, 5, seed=0)
    (one, two, three), capitals, (a, _, c), (lone, *_) = (trial.references for trial in coded[:4])
    said = [f" {passkeys[0].references[0]}", " 0", f" {one} {two} {three}", f" {' '.join(capitals).upper()}",
            f" {a} {c} {c}", f" {lone}", " none"]  # fmt: skip
    prompts = [trial.prompt for trial in passkeys + coded]
    rows = [torch.tensor(BYTES(text).input_ids) for text in said]  # EOS at the end
    tokens = pad_sequence([torch.cat(pair) for pair in zip(prompts, rows, strict=True)], batch_first=True)
    labels = pad_sequence(
        [torch.cat([torch.full_like(prompt, -100), row]) for prompt, row in zip(prompts, rows, strict=True)],
        batch_first=True, padding_value=-100,
    )  # fmt: skip
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = LlamaForCausalLM(zoo.llama(**sizes).config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("task", "distance", "scores"), [
    (PASSKEY, 128, [1, 0]), (FWE, None, [1, 1, 2 / 3, 1 / 3, 0]),
])  # fmt: skip
def test_accuracy_is_the_string_match_of_what_the_plain_model_generates(speaker, task, distance, scores):
    trials = task.draw(distance, len(scores), seed=0)
    by_hand, logprobs = [], []
    for trial in trials:
        config = GenerationConfig(
            max_new_tokens=max(400 - len(trial.prompt), 2 * len(trial.answer) + 16),
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )
        written = speaker.generate(trial.prompt.unsqueeze(0), generation_config=config)[0, len(trial.prompt) :]
        text = BYTES.decode(written, skip_special_tokens=True).lower()
        by_hand.append(np.mean([reference.lower() in text for reference in trial.references]))
        with torch.no_grad():
            told = speaker(trial.tokens.unsqueeze(0)).logits[0, len(trial.prompt) - 1 : -1].log_softmax(-1)
        logprobs.append(told[range(len(trial.answer)), trial.answer].sum().item())
    assert by_hand == pytest.approx(scores)
    try:
        hooked, done = load_model(speaker), []
        frame = retrieval_accuracy(hooked, task, [distance], trials=len(scores), progress=done.append)
    finally:
        hooked.release()
    rows = frame.set_index("metric")
    assert rows["value"].to_dict() == pytest.approx(
        {"accuracy": np.mean(scores), "answer_logprob_nats": np.mean(logprobs)}, rel=1e-4
    )
    assert rows["distance"].isna().all() == (distance is None)
    assert sum(done) == len(scores)


def test_intervals_of_several_answers_have_the_dispersion_between_trials_and_of_one_answer_are_wilsons(speaker):
    try:
        hooked = load_model(speaker)
        several = retrieval_accuracy(hooked, FWE, [None], trials=5).set_index("metric").loc["accuracy"]
        single = retrieval_accuracy(hooked, PASSKEY, [128], trials=2).set_index("metric").loc["accuracy"]
        one = retrieval_accuracy(hooked, FWE, [None], trials=1).set_index("metric").loc["accuracy"]
    finally:
        hooked.release()
    assert (several["low"], several["high"]) == share_interval([1, 1, 2 / 3, 1 / 3, 0], 3)
    as_if_apart = stats.binomtest(9, 15).proportion_ci(method="wilson")
    assert several["low"] < as_if_apart.low
    assert several["high"] > as_if_apart.high
    assert (single["low"], single["high"]) == pytest.approx((0.094531, 0.905469), abs=1e-6)
    low = 3 / (3 + 1.959964**2)
    assert (one["low"], one["high"]) == pytest.approx((low, 1), abs=1e-6)


def test_transcripts_say_what_was_written_of_every_trial(speaker):
    try:
        table = retrieval_trials(load_model(speaker), FWE, trials=5)
    finally:
        load_model(speaker).release()
    assert table["accuracy"].tolist() == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    trials = FWE.draw(None, 5, seed=0)
    assert table["references"].tolist() == [list(trial.references) for trial in trials]
    (one, two, three), capitals = (trial.references for trial in trials[:2])
    assert table["written"].tolist()[:2] == [f" {one} {two} {three}", f" {' '.join(capitals).upper()}"]
    assert table["written"].tolist()[4] == " none"
    assert table["distance"].isna().all()
    written = retrieval_trials(load_model(zoo.llama()), TASK, [4], trials=20)
    right = [text == references[0] for text, references in zip(written["written"], written["references"], strict=True)]
    assert written["accuracy"].tolist() == right


def test_an_answer_in_other_words_is_not_cut():
    """What is written had the room of the answer and no more, so that a right one with a comma in it was cut."""
    one = TextTask("fwe", BYTES, 420)
    trial = one.draw(None, 1, seed=0)[0]
    said = " the words " + ", ".join(trial.references)
    spoken, rooms = torch.tensor(BYTES(said, add_special_tokens=False).input_ids), []

    class Talker:
        exact_length = None

        def greedy(self, prompt, count, **how):
            rooms.append(count)
            return spoken[:count]

    written = one.text_of(one.written(Talker(), trial, trial.answer + 1))
    assert one.share_found(trial, written) == 1
    assert rooms == [2 * len(trial.answer) + 16] > [len(trial.answer)]
    Talker.exact_length = 425
    one.written(Talker(), trial, trial.answer + 1)
    assert rooms[1] == 425 - len(trial.prompt)


def test_a_trial_is_read_once(speaker, monkeypatch):
    """What missed token by token was read anew, to be written on from."""
    hooked, lengths = load_model(speaker), []
    forward = type(speaker).forward

    def counted(self, *args, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(
        hooked, "hidden", lambda tokens: lengths.append(tokens.shape[1]) or type(hooked).hidden(hooked, tokens)
    )
    with monkeypatch.context() as patched, hooked.measuring():
        trial = FWE.draw(None, 5, seed=0)[4]
        again = hooked.greedy(trial.prompt, 20)
        with hooked.keeping_keys() as read:
            hooked.hidden(trial.tokens[None, :-1])
        patched.setattr(type(speaker), "forward", counted)
        assert torch.equal(hooked.greedy(trial.prompt, 20, read=read), again)
    hooked.release()
    assert lengths == [len(trial.tokens) - 1] + [1] * 20


@pytest.mark.parametrize("name", sorted(zoo.CONFIGS))
def test_going_on_from_kept_keys_writes_what_reading_anew_does(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    rows = zoo.tokens(2, 30)
    with model.keeping_keys() as read:
        model.hidden(rows)
    for row, length in ((0, 30), (1, 17), (1, 1)):
        prompt = rows[row, :length]
        assert torch.equal(model.greedy(prompt, 12, read=read, row=row), model.greedy(prompt, 12))


def test_trials_are_saved_as_they_end_and_not_run_again(speaker, tmp_path, monkeypatch):
    hooked, file = load_model(speaker), tmp_path / "trials.jsonl"
    asked = {"trials": 5, "trials_file": file}
    try:
        whole = retrieval_trials(hooked, FWE, trials=5)
        monkeypatch.setattr("rope_probe.retrieval.probe._TOKENS_PER_BATCH", 800)  # two trials at a time

        def cut_short(done):
            if cut_short.done + done > 2:
                raise KeyboardInterrupt
            cut_short.done += done

        cut_short.done = 0
        with pytest.raises(KeyboardInterrupt):
            retrieval_trials(hooked, FWE, progress=cut_short, **asked)
        lines = file.read_text().splitlines()
        assert 2 <= len(lines) < 5
        assert [json.loads(line)["written"] for line in lines] == whole["written"].tolist()[: len(lines)]
        with file.open("a") as torn:
            torn.write(lines[-1][:40])
        read, told = [], []
        hidden = hooked.hidden
        monkeypatch.setattr(hooked, "hidden", lambda tokens: read.append(len(tokens)) or hidden(tokens))
        resumed = retrieval_trials(hooked, FWE, progress=told.append, **asked)
        assert sum(read) == 5 - len(lines)
        assert sum(told) == 5
        numbers = ["accuracy", "answer_logprob_nats"]
        pd.testing.assert_frame_equal(resumed[numbers], whole[numbers], rtol=1e-5)
        pd.testing.assert_frame_equal(resumed.drop(columns=numbers), whole.drop(columns=numbers))
        assert len(file.read_text().splitlines()) == 5
        read.clear()
        retrieval_trials(hooked, PASSKEY, [128], trials=2, trials_file=file)  # another task in the same file
        again = retrieval_accuracy(hooked, FWE, [None], **asked)
        assert read == [2]
        assert again.equals(retrieval_accuracy(hooked, FWE, [None], **asked))
    finally:
        hooked.release()
    with pytest.raises(InputError, match="another model"):
        retrieval_trials(load_model(zoo.llama(vocab_size=259)), FWE, **asked)
    file.write_text("no trial\n")
    with pytest.raises(InputError, match="line 1 is no trial"):
        retrieval_trials(load_model(zoo.llama(vocab_size=259)), FWE, **asked)


def test_by_default_a_few_distances_and_trials_are_measured():
    passkey = TextTask("passkey", BYTES, 1600)
    near, middle, far = passkey.default_distances()
    assert (near, far) == (passkey.distances()[0], passkey.distances()[-1])
    assert middle in passkey.distances()
    assert FWE.default_distances() == [None]
    assert TASK.default_distances() == TASK.distances() == [8, 16]
    frame = retrieval_accuracy(load_model(zoo.llama()), TASK, trials=4)
    assert sorted(frame["distance"].unique()) == [8, 16]


def test_text_tasks_need_a_vocabulary_and_a_distance_of_their_own():
    with pytest.raises(InputError, match="vocabulary"):
        retrieval_accuracy(load_model(zoo.llama()), PASSKEY, [128], trials=1)
    with pytest.raises(InputError, match="takes None"):
        retrieval_accuracy(load_model(zoo.llama()), FWE, [128], trials=1)
    with pytest.raises(InputError, match="needs a distance"):
        retrieval_accuracy(load_model(zoo.llama()), TASK, [None], trials=1)


def test_the_hash_of_trials_tells_them_apart():
    hashes = {trials_hash(PASSKEY, 128, 2, seed=seed) for seed in range(3)}
    assert len(hashes) == 3
    assert trials_hash(PASSKEY, 128, 2, seed=0) in hashes
