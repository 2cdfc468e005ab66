"""A training step against its bare minimum: tokens a second of `Training.advance` and of a loop without anything else.

The bare loop does the teacher's forward, the student's forward, the KL of their logits and the backward pass, by
transformers' own modules; no optimizer, no clipping, no log, no fresh data. Ours does all of these, every tenth step
measured in full. The two take turns, step by step in blocks of ten, in one process on the same threads, so that a busy
machine slows both; medians over the blocks.

    python benchmarks/training_loop.py --threads 1
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, PreTrainedModel

from rope_probe import KeyValueStream, load_model
from rope_probe.distillation import Phase, Training
from rope_probe.models import checkpoints

BLOCK = 10


def bare_step(student: PreTrainedModel, teacher: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Both forward passes and the backward one."""
    with torch.no_grad():
        taught = teacher(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    told = student(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    F.kl_div(told.flatten(0, 1), taught.flatten(0, 1), log_target=True, reduction="batchmean").backward()
    student.zero_grad()


def main() -> None:
    """Take turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--adamw", action="store_true", help="AdamW alone instead of Muon on the matrices")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = KeyValueStream(64, distinct=(4, 16))
    sizes = {
        "hidden_size": options.width,
        "intermediate_size": 5 * options.width // 2,
        "num_hidden_layers": options.layers,
    }
    heads = {"num_attention_heads": options.width // 32, "num_key_value_heads": options.width // 32}
    config = LlamaConfig(vocab_size=data.vocab_size, **sizes, **heads, tie_word_embeddings=False)
    student, teacher, twin, taught_by = (checkpoints.build(config, seed=seed) for seed in (0, 1, 0, 1))
    matrix_lr = None if options.adamw else 0.01
    phase = Phase("extension", data, 1024, 10**6, 8192, lr=3e-3, matrix_lr=matrix_lr)
    training = Training(load_model(twin), phase, seed=0, teachers={"teacher": load_model(taught_by)})
    tokens = phase.batch(0, 0).tokens
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for block in range(options.blocks + 1):
        for name in ("bare", "ours"):
            started = time.perf_counter()
            for step in range(BLOCK):
                if name == "bare":
                    bare_step(student, teacher, tokens)
                else:
                    training.advance(measure=step == 0)
            if block > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    rates = {name: BLOCK * phase.batch_tokens / statistics.median(times) for name, times in seconds.items()}
    pairs = [bare / ours for bare, ours in zip(seconds["bare"], seconds["ours"], strict=True)]
    print(f"width {options.width}, {options.layers} layers, {options.threads} threads, blocks of {BLOCK} steps")
    for name, rate in rates.items():
        print(f"{name:5} {rate:9,.0f} tokens/s")
    low, middle, high = min(pairs), statistics.median(pairs), max(pairs)
    print(f"ours has {middle:.3f} of the bare loop's tokens/s (by block {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
