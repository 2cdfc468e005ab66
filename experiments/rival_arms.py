"""The arms of `rivals`, and what they are measured by."""

from dataclasses import dataclass

import pandas as pd

from experiments.rival_lessons import AgreeingStream, Disturbance, PartialDivergence
from experiments.toy_checkpoints import CE, SHORT, SHORT_DOCUMENTS
from rope_probe import KeyValueStream
from rope_probe.distillation import Divergence, HardLabels, Term
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.tables import Column, declare

FAR = (128, 256, 512, 1000)
DISTANCES = (64, *FAR)
SHORT_DISTANCES = (8, 32, 60)
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)
LOG_N = "log_n"
UNSCALED = "1"
TEMPERATURES = (*(f"{factor:g}" for factor in FACTORS), LOG_N)
ALWAYS_JUDGED = (UNSCALED, "2", "3")
SELECTION, JUDGING = "selection", "judging"
UNTRAINED = "theta_swapped"
TOGETHER = (UNTRAINED, "kd_phase_wise", "ce_phase_wise")
"""What the stage `temperature` measures."""
MEASURED_TOO = ("kd_teacher_masked", "kd_disjoint_keys", "ce_long_documents")
"""Arms of phase_scaling that are measured at every temperature, in full."""
KNOWN = (*TOGETHER, *MEASURED_TOO)
"""Models that other experiments make; the command takes each of them alone too."""

TEMPERED = declare(
    "tempered_retrieval",
    "Retrieval by distance with the queries of every layer multiplied after rotation.",
    ("control", "temperature", "purpose", "task", "seq_len", "distance", "trials", "low", "high"),
    {name: RETRIEVAL.metrics[name] for name in ("accuracy", "answer_logprob_nats")},
    own={
        "control": Column("string", "which rival explanation the model is a control for"),
        "temperature": Column("string", 'what queries are multiplied by: a number, or "log_n" by position'),
        "purpose": Column("string", '"selection" of the best temperature, or "judging" on other trials'),
        "task": RETRIEVAL.columns["task"],
        "trials": RETRIEVAL.columns["trials"],
    },
)
AGREEING = AgreeingStream(SHORT, SHORT_DOCUMENTS.distinct)
KD: tuple[Term, ...] = (Divergence(),)


@dataclass(frozen=True)
class Arm:
    """How the base is extended, and which rival explanation that is a control for."""

    control: str
    terms: tuple[Term, ...] = KD
    data: KeyValueStream = SHORT_DOCUMENTS
    masked: bool = False
    teacher_masked: bool = False
    rate: float = 1.0
    teacher: str = "teacher"
    disturbance: Disturbance | None = None


ARMS = {
    "argmax_labels": Arm("labels", (HardLabels(),)),
    "sampled_labels": Arm("labels", (HardLabels(sampled=True),)),
    "student_masked": Arm("masks", masked=True),
    "both_masked": Arm("masks", masked=True, teacher_masked=True),
    "shifted_teacher": Arm("disturbance", disturbance="shift"),
    "noisy_teacher": Arm("disturbance", disturbance="noise"),
    "flat_teacher": Arm("disturbance", disturbance="flat"),
    "value_positions": Arm("positions", (PartialDivergence(),)),
    "other_positions": Arm("positions", (PartialDivergence(others=True),)),
    "ce_agreeing": Arm("stream", CE, AGREEING),
    "kd_agreeing": Arm("stream", KD, AGREEING),
    "ce_rate_0.1": Arm("rate", CE, rate=0.1),
    "ce_rate_0.3": Arm("rate", CE, rate=0.3),
    "ce_rate_3": Arm("rate", CE, rate=3.0),
    "wide_teacher": Arm("width", teacher="wide_teacher"),
}
CONTROL_OF = {
    UNTRAINED: "temperature",
    "kd_phase_wise": "temperature",
    "ce_phase_wise": "temperature",
    "kd_teacher_masked": "masks",
    "kd_disjoint_keys": "stream",
    "ce_long_documents": "stream",
    **{name: arm.control for name, arm in ARMS.items()},
}


def best_temperature(frame: pd.DataFrame) -> str:
    """The temperature of the highest accuracy far away on the trials to choose by; of equal ones the more certain."""
    rows = frame[(frame["purpose"] == SELECTION) & frame["distance"].isin(FAR)]
    means = rows.pivot_table(index="temperature", columns="metric", values="value")
    return str(means.sort_values(["accuracy", "answer_logprob_nats"]).index[-1])
