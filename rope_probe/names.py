"""Names that a user chooses from, apart from what they stand for, so that `--help` need not load it."""

KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention kernels; see `attention`."""

SWEEPS = ("dose", "layer", "head", "pair", "pair-tokens", "jitter", "theta", "temperature")
"""Sweeps of perturbations; see `sweeps`."""

KEY_VALUE = "key_value"
"""The retrieval task of the key-value streams; see `retrieval`."""

TEXT_TASKS = ("passkey", "niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
"""Retrieval tasks in text: first those with a distance, then those of several answers; see `tasks`."""

PRETRAINED = ("smollm2-135m", "gemma3-270m")
"""Models that have a name; see `models.pretrained`."""

MIRRORS = ("tensorboard", "wandb")
"""Where a training log can be mirrored to; see `distillation.mirrors`."""

LONGEST_WINDOW = 2**24
"""Most tokens of a window; a longer one is a slip of the keyboard."""

MISSED_GATE, STOPPED, INTERRUPTED = 3, 4, 130
"""Exit codes beside 0 and 2: a run whose gate was missed, one that was stopped and can be resumed, and Ctrl-C."""
