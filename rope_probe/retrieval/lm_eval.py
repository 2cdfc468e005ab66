"""lm-evaluation-harness: the command line that measures a checkpoint on the tasks of RULER it shares with us."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rope_probe.errors import InputError
from rope_probe.models import checkpoints

LM_EVAL_TASKS = {
    "niah_single_1": "niah_single_1",
    "niah_multikey_2": "niah_multikey_2",
    "niah_multikey_3": "niah_multikey_3",
    "vt": "ruler_vt",
    "cwe": "ruler_cwe",
    "fwe": "ruler_fwe",
}
"""What lm-eval calls our tasks of RULER. It has no task called passkey; niah_single_1 is its nearest kin."""
_SPECIAL = ",="
"""What lm-eval takes the list of a model's arguments apart at."""


def lm_eval_command(
    checkpoint: str | os.PathLike[str], windows: Sequence[int], *, dtype: str = "float32", tasks: Sequence[str] = ()
) -> str:
    """`lm_eval --model hf ...`, to paste into a shell, for windows of so many tokens; `tasks` are ours, by default all.

    lm-eval makes its trials with the checkpoint's tokenizer and cuts prompts at `max_length`, so both are needed. Its
    tasks of RULER come with `pip install "lm_eval[hf,ruler]"`.

    Raises InputError for a checkpoint without a tokenizer, one whose path lm-eval would take apart, and a task that it
    does not have.
    """
    path = os.fspath(checkpoint)
    if special := [sign for sign in _SPECIAL if sign in path]:
        raise InputError(f"lm_eval takes model arguments apart at {special[0]!r}, which {path!r} holds; move it")
    if checkpoints.load_tokenizer(str(Path(checkpoint))) is None:
        raise InputError(f"the tasks of lm_eval are text, but {path!r} has no tokenizer")
    if unknown := [task for task in tasks if task not in LM_EVAL_TASKS]:
        raise InputError(f"lm_eval has no task {unknown[0]!r}; it has {', '.join(LM_EVAL_TASKS)}")
    named = ",".join(LM_EVAL_TASKS[task] for task in tasks or LM_EVAL_TASKS)
    arguments = f"pretrained={path},dtype={dtype},max_length={max(windows)}"
    metadata = json.dumps({"max_seq_lengths": list(windows)}, separators=(",", ":"))
    words = ["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", named, f"--metadata={metadata}"]
    return shlex.join(words)
