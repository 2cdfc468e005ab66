import re
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rope_probe import InputError
from rope_probe.names import TEXT_TASKS
from rope_probe.retrieval.tasks import TextTask, vocabulary
from rope_probe.windows.embedded_text import documents

NEEDLES = ("passkey", "niah_single_1", "niah_multikey_2", "niah_multikey_3")
TOKENIZERS = ("bytes", "bpe", "bpe with BOS")
WINDOW = 1700
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@cache
def tokenizer(kind):
    """Bytes with EOS behind and no BOS, or byte-level BPE trained on the embedded text, with or without BOS.

    "large" is one whose words take as few tokens as those of a model's tokenizer.
    """
    if kind == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4000 if "large" in kind else 800, show_progress=False,
                                  special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator(documents()[:10], trainer)
    if "BOS" in kind:
        core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def task(name, kind="bytes", window=WINDOW):
    return TextTask(name, tokenizer(kind), window)


def drawn(one, count=1, seed=0):
    return one.draw(one.distances()[-1], count, seed=seed)


def decoded(one, tokens):
    return one.tokenizer.decode(tokens, skip_special_tokens=True)


# An oracle that knows the rules and reads nothing but the prompt ------------------------------------------------------


def solve(name, prompt):
    """Every answer that the prompt's own text allows, by counting and by following assignments."""
    if name == "passkey":
        return re.findall(r"The pass key is (\d+)\.", prompt)
    if name.startswith("niah"):
        key = re.search(r"gives for (\S+) is$", prompt)[1]
        return re.findall(rf"that of {re.escape(key)}, is: ([\w-]+)\.", prompt)
    if name == "vt":
        value = re.search(r"variables hold the value (\d+), they are:$", prompt)[1]
        held = {}
        for variable, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt):
            assert variable not in held
            held[variable] = held.get(source, source)
        return [variable for variable in held if held[variable] == value]
    if name == "cwe":
        counts = Counter(re.findall(r"\d+\. ([a-z-]+)", prompt.split("\n")[-2]))
    else:
        counts = Counter(word for word in prompt.split("\n")[-2].split() if word != "...")
    asked = 10 if name == "cwe" else 3
    ranked = counts.most_common()
    assert ranked[asked - 1][1] > ranked[asked][1], "the answer is not unique"
    return [word for word, _ in ranked[:asked]]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_the_answer_follows_from_the_prompt_alone(name, kind):
    one = task(name, kind)
    for trial in drawn(one, 3):
        found = solve(name, decoded(one, trial.prompt))
        assert sorted(found) == sorted(trial.references)
        assert len(found) == one.answers
        written = decoded(one, trial.answer)
        assert all(reference in written for reference in trial.references)
        assert decoded(one, trial.tokens) == decoded(one, trial.prompt) + written


@pytest.mark.parametrize("name", ["vt", "cwe"])
def test_the_solved_example_is_right_and_shares_no_answer(name):
    one = task(name)
    trial = drawn(one)[0]
    lines = decoded(one, trial.prompt).split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("Question"))
    question, answer = re.match(r"(.*:)( .*)", lines[at]).groups()
    shown = re.findall(r"[A-Z]{3}|[a-z-]{4,}", answer)
    assert sorted(solve(name, "\n".join([*lines[:at], question]))) == sorted(shown)
    assert not set(shown) & set(trial.references)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(TEXT_TASKS), st.sampled_from(TOKENIZERS), st.integers(1550, 2600), st.integers(0, 2**32))
def test_prompt_and_answer_fill_the_window_and_no_more(name, kind, window, seed):
    one = task(name, kind, window)
    trial = drawn(one, seed=seed)[0]
    used = len(trial.tokens)
    assert used <= window
    text = decoded(one, trial.prompt)
    lines = text.split("\n")
    if name in NEEDLES or name == "vt":
        unit = lines[-3] if name == "niah_multikey_3" else max(lines[3:-1], key=len)
    elif name == "cwe":
        unit = " 999. synonyms" * 3
    else:
        unit = " ... abcdef" * 4  # one word more of the nominal length can be one more of several words
    assert window - used < len(one.tokenizer(f"\n{unit}\n", add_special_tokens=False).input_ids) + 6


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(NEEDLES), st.sampled_from(TOKENIZERS), st.floats(0, 1), st.integers(0, 2**32))
def test_the_needle_stands_where_it_is_asked_to(name, kind, share, seed):
    one = task(name, kind)
    near, far = one.distances()[0], one.distances()[-1]
    distance = round(near + share * (far - near))
    trial = one.draw(distance, 1, seed=seed)[0]
    text = decoded(one, trial.prompt)
    unit = max(len(one.tokenizer(line + "\n", add_special_tokens=False).input_ids) for line in text.split("\n")[1:-1])
    value = text.index(trial.references[0])
    tail = len(one.tokenizer(text[value - 1 :], add_special_tokens=False).input_ids)
    assert abs(trial.distance - tail) <= 1
    assert abs(trial.distance - distance) <= unit // 2 + 1


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_trial_is_a_function_of_task_window_distance_seed_and_number(name):
    one = task(name)
    distance = one.distances()[0]
    first, again = one.draw(distance, 3, seed=5), one.draw(distance, 2, seed=5)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=False))
    others = [*first[1:], *one.draw(distance, 1, seed=6), *task(name, window=WINDOW + 1).draw(distance, 1, seed=5)]
    assert all(other.references != first[0].references for other in others)


@pytest.mark.parametrize(("kind", "opens"), [("bytes", False), ("bpe", False), ("bpe with BOS", True)])
def test_prompts_open_with_bos_where_the_tokenizer_adds_one_and_never_hold_eos(kind, opens):
    one = task("niah_single_1", kind)
    trial = drawn(one)[0]
    assert (int(trial.prompt[0]) == one.tokenizer.bos_token_id) == opens
    assert one.tokenizer.eos_token_id not in trial.tokens
    assert torch.equal(trial.tokens[int(opens) :], torch.tensor(
        one.tokenizer(decoded(one, trial.tokens), add_special_tokens=False).input_ids
    ))  # fmt: skip


def test_each_task_is_built_as_published():
    texts = {name: decoded(task(name), drawn(task(name))[0].prompt) for name in TEXT_TASKS}
    assert len(set(texts["niah_single_1"].split("\n"))) == len(set(texts["passkey"].split("\n"))) == 4
    assert re.search(r"The pass key is \d{5}\. Remember it", texts["passkey"])
    keys = re.findall(r"that of ([a-z]+-[a-z]+), is: [1-9]\d{6}\.", texts["niah_multikey_2"])
    assert len(keys) == len(set(keys)) == texts["niah_multikey_2"].count("\n") - 1 > 10
    pairs = re.findall(rf"that of ({UUID}), is: ({UUID})\.", texts["niah_multikey_3"])
    assert len(pairs) == texts["niah_multikey_3"].count("\n") - 1 > 8
    assert len({one for pair in pairs for one in pair}) == 2 * len(pairs)
    chain = re.findall(r"VAR ([A-Z]{5}) = (\S+)(?: ([A-Z]{5}))?\n", texts["vt"])
    assert [source for _, _, source in chain] == ["", *(name for name, _, _ in chain[:4])]
    assert re.fullmatch(r"[1-9]\d{4}", chain[0][1])


@pytest.mark.parametrize(
    ("kind", "window", "repeats"),
    [
        ("bytes", 1550, [3, 1]),
        ("bytes", 2400, [6, 1]),
        ("bytes", 4200, [6, 1]),
        ("bpe", 4096, [6, 1]),
        ("large bpe", 4095, [6, 1]),
        ("large bpe", 4096, [30, 3]),
    ],
)
def test_common_words_are_repeated_as_the_window_allows(kind, window, repeats):
    one = task("cwe", kind, window)
    entries = re.findall(r"(\d+)\. ([a-z-]+)", decoded(one, drawn(one)[0].prompt).split("\n")[-2])
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    seen = Counter(Counter(word for _, word in entries).values())
    assert sorted(seen, reverse=True) == repeats
    assert seen[repeats[0]] == 10
    assert seen[repeats[1]] >= 10


@pytest.mark.parametrize(
    ("window", "words", "repeats"), [(4095, 20, [3] * 10 + [1] * 10), (4096, 40, [10] * 10 + [3] * 30)]
)
def test_the_solved_example_of_common_words_is_as_large_as_rulers(window, words, repeats):
    """From 4,096 tokens on it was the example of smaller windows."""
    one = task("cwe", "large bpe", window)
    for trial in drawn(one, 2):
        lines = decoded(one, trial.prompt).split("\n")
        shown = Counter(re.findall(r"\d+\. ([a-z-]+)", lines[1]))
        assert len(shown) == words
        assert sorted(shown.values(), reverse=True) == repeats
        answer = set(re.findall(r"\d+\. ([a-z-]+)", lines[2]))
        assert answer == {word for word, count in shown.items() if count == repeats[0]}
        assert not set(shown) & set(re.findall(r"\d+\. ([a-z-]+)", lines[-2]))


def test_coded_words_come_as_often_as_zeta_says():
    one = task("fwe", window=6000)
    counts = Counter(decoded(one, drawn(one)[0].prompt).split("\n")[-2].split())
    length = counts["..."] * torch.pi**2 / 6
    told = [count for _, count in counts.most_common(6)]
    assert told == pytest.approx([length / k**2 * 6 / torch.pi**2 for k in range(1, 7)], abs=1)


def test_words_are_plain_ones_of_the_embedded_text():
    text = "\n".join(documents())
    assert len(vocabulary()) > 1000
    assert all(re.fullmatch("[a-z]{4,8}", word) and word in text for word in vocabulary())


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_window_too_short_is_refused_with_the_length_it_needs(name):
    distance = 100 if name in NEEDLES else None
    with pytest.raises(InputError, match=f"{name} needs a window of \\d+ tokens or more, but it is 90") as told:
        task(name, window=90).draw(distance, 1, seed=0)
    enough = task(name, window=int(re.search(r"of (\d+)", str(told.value))[1]) + 100)
    assert drawn(enough)


@pytest.mark.parametrize(("name", "distance", "named"), [
    ("passkey", WINDOW, "1700"), ("niah_multikey_3", 1, "but it is 1"), ("niah_single_1", -500, "-500"),
    ("passkey", None, "needs a distance"), ("vt", 64, "takes None"), ("cwe", 64, "64"),
])  # fmt: skip
def test_distances_that_do_not_fit_are_refused(name, distance, named):
    with pytest.raises(InputError, match=named):
        task(name).draw(distance, 1, seed=0)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", NEEDLES)
def test_default_distances_fit_every_trial(name, kind):
    one = task(name, kind, 1024)
    for distance in one.distances():
        assert len(one.draw(distance, 2, seed=3)) == 2
    assert one.distances() == [2**k for k in range(3, 11) if 2**k in one.distances()] != []


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match=r"niah_9.*passkey"):
        task("niah_9")
