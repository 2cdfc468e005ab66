"""Multiple choice made of a text, with no download: which words end this sentence?

A question gives the text before a sentence and the sentence's beginning. The choices are the last words of that
sentence and of three others of the same document. The model's choice is the one of the highest mean log-probability
a token, so that a choice's length counts for little. Chance is 1 / 4.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rope_probe import HookedCausalLM
from rope_probe.errors import InputError
from rope_probe.models.tokens import plain_ids, prompt_ids
from rope_probe.seeds import derive

CHOICES = 4
_ENDING_WORDS, _FEWEST_WORDS, _MOST_WORDS = 6, 14, 60
_CONTEXT_CHARACTERS = 300
_SENTENCE = re.compile(r"(?<=[.:]\s)\s*([A-Z][^.:;>=_]{40,400}\.)(?=\s)")
"""What stands between full stops, and holds no sign that only code has."""


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of the `choices` does; `places` are where these begin in the document.

    `document` is the document's number among those that were given.
    """

    context: str
    choices: tuple[str, ...]
    truth: int
    document: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class _Sentence:
    """Where a sentence stands in its document, from `start` to `end`, and where its last words begin."""

    start: int
    ending: int
    end: int


def questions(documents: Sequence[str], count: int, *, seed: int = 0) -> list[Question]:
    """`count` questions about sentences of these documents, none of them asked for twice.

    They are a pure function of the arguments.
    Distractors stand neither in the context nor in the sentence, and are not the same words as the truth.
    Raises InputError where the documents have not sentences enough.
    """
    rng = np.random.default_rng(derive(seed, "questions"))
    asked = [question for number, text in enumerate(documents) for question in _of_document(text, number, rng)]
    if not 1 <= count <= len(asked):
        raise InputError(f"count must be 1 to {len(asked)}, the sentences that can be asked for, but it is {count}")
    return [asked[place] for place in sorted(rng.permutation(len(asked))[:count])]


def _of_document(text: str, number: int, rng: np.random.Generator) -> Iterator[Question]:
    sentences = list(_sentences(text))
    for sentence in sentences:
        far = max(0, sentence.start - _CONTEXT_CHARACTERS)
        begin = far and text.find(" ", far, sentence.start) + 1  # at a whole word
        truth = _words(text, sentence)
        others = {
            ending: other
            for other in sentences
            if (other.end <= begin or other.start >= sentence.end) and (ending := _words(text, other)) != truth
        }
        elsewhere = list(others.values())
        if len(elsewhere) < CHOICES - 1:
            continue
        drawn = [elsewhere[place] for place in rng.permutation(len(elsewhere))[: CHOICES - 1]]
        where = int(rng.integers(CHOICES))
        chosen = [*drawn[:where], sentence, *drawn[where:]]
        yield Question(
            " ".join(text[begin : sentence.ending].split()),
            tuple(_words(text, one) for one in chosen),
            where,
            number,
            tuple(one.ending for one in chosen),
        )


def _sentences(text: str) -> Iterator[_Sentence]:
    for match in _SENTENCE.finditer(text):
        words = list(re.finditer(r"\S+", match[1]))
        if _FEWEST_WORDS <= len(words) <= _MOST_WORDS:
            start = match.start(1)
            yield _Sentence(start, start + words[-_ENDING_WORDS].start(), match.end(1))


def _words(text: str, sentence: _Sentence) -> str:
    return " ".join(text[sentence.ending : sentence.end].split())


def answered(model: HookedCausalLM, asked: Sequence[Question]) -> pd.DataFrame:
    """A row for each question: `question`, its number, and `correct`, 1 if the truth has the highest score, else 0."""
    with model.measuring():
        correct = [float(int(_scores(model, question).argmax()) == question.truth) for question in asked]
    return pd.DataFrame({"question": range(len(asked)), "correct": correct})


@torch.no_grad()
def _scores(model: HookedCausalLM, question: Question) -> Float[Tensor, " choices"]:
    """Mean log-probability of each choice's tokens, in nats a token."""
    assert model.tokenizer is not None
    context = prompt_ids(model.tokenizer, question.context)
    endings = [torch.tensor(plain_ids(model.tokenizer, f" {choice}")) for choice in question.choices]
    rows = [torch.cat([torch.tensor(context), ending[:-1]]) for ending in endings]
    hidden = model.hidden(pad_sequence(rows, batch_first=True))  # shorter ones are filled up behind, unseen
    scores = []
    for row, ending in enumerate(endings):
        read = hidden[row : row + 1, len(context) - 1 :][:, : len(ending)]
        logits = model.unembed(read)[0].float().cpu()  # [m, V]
        model.require_finite(logits, "logits")
        scores.append(logits.log_softmax(-1).gather(1, ending.unsqueeze(1)).double().mean())
    return torch.stack(scores)
