"""Tables and verdicts of experiments/beyond.py: plain arithmetic on its rows."""

import pandas as pd

from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.runs.verdicts import verdicts

BEYOND = declare(
    "beyond",
    "A pretrained model inside and beyond its window, untrained, with other rotations and temperatures. A row is of one "
    "question, block of text, or head.",
    ("rotation", "temperature", "task", "seq_len", "distance", "keys", "unit", "position", "layer", "head"),
    {
        "hit": Metric("1 where the model would write just the answer by greedy decoding, else 0"),
        "answer_logprob_nats": Metric("log-probability of the answer, mean over its tokens", "nats"),
        "loss_nats": Metric("loss of natural text, mean over every eighth position from `position` to the next", "nats"),
        "previous_token": Metric("a head's attention to the token before, of queries from `position` on"),
        "induction": Metric("its attention to what followed earlier copies of the query's token, of the same queries"),
        "retrieval_head": Metric("share of an answer that a head copies from the needle, mean over questions"),
    },
    own={
        "rotation": Column("string", "what the model's rotary frequencies are"),
        "temperature": Column("string", "what attention is sharpened by: none, log_n beyond the window, or yarn"),
        "task": Column("string", "passkey or niah_multikey_2"),
        "keys": Column("Int64", "needles before the question"),
        "unit": Column("Int64", "which question, the farthest needle 0"),
    },
)


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    return verdicts([])


def tables_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {}
