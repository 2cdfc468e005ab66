"""Peak memory of drift against the window: two models of Llama's shape, attention KL of every layer and head.

Float32, random weights, one thread. Every window runs in a process of its own; memory is that process's high-water mark
less what it held once the models were made. Beside it stands what one layer's two patterns alone would take, [H, T, T]
each, and what drift says it holds: the original's rotated queries and keys and residual streams, linear in the window.

    python benchmarks/drift_memory.py
    python benchmarks/drift_memory.py --windows 1024 --windows 32768 --layers 4
"""

import json
import resource
import subprocess
import sys
import time
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from rope_probe import drift, load_model, pack
from rope_probe.models.checkpoints import with_rope

WIDTH, HEADS, KEY_HEADS, VOCABULARY = 256, 4, 2, 512
MEGABYTE = 2**20


def main(
    windows: Annotated[list[int] | None, typer.Option(help="Tokens [default: 1024, 4096 and 16384].")] = None,
    layers: int = 2,
    alone: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure each window in its own process and print a line for it."""
    if alone is not None:
        print(json.dumps(measure(alone, layers)))
        return
    print(f"{layers} layers, width {WIDTH}, {HEADS} heads, {KEY_HEADS} of keys; MB")
    for window in windows or (1024, 4096, 16384):
        command = [sys.executable, __file__, "--alone", str(window), "--layers", str(layers)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        patterns = 2 * HEADS * window**2 * 4 / MEGABYTE
        width = WIDTH // HEADS
        held = 4 * window * (layers * ((HEADS + KEY_HEADS) * width + WIDTH) + WIDTH) / MEGABYTE
        print(
            f"{window:6d} tokens: peak {told['peak']:7.1f}, of it held from the original {held:6.1f}; "
            f"two patterns of one layer {patterns:8.1f}; {told['seconds']:.1f} s",
            flush=True,
        )


def measure(window: int, layers: int) -> dict[str, float]:
    """Peak megabytes above the models, and seconds, of one drift."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=window,
    )
    plain = LlamaForCausalLM(config).eval()
    models = load_model(plain), load_model(with_rope(plain, 5e5))
    drift(*models, pack([torch.randint(VOCABULARY, (64,))], 64))  # what is loaded when it is first used
    read = pack([torch.randint(VOCABULARY, (window,))], window)
    before, started = high_water(), time.perf_counter()
    drift(*models, read)
    return {"peak": high_water() - before, "seconds": time.perf_counter() - started}


def high_water() -> float:
    """The most megabytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


if __name__ == "__main__":
    typer.run(main)
