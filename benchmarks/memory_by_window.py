"""Peak memory against the window, of what is linear in it: drift, and LinearARD's relations.

Float32, random weights, one thread. Every window runs in a process of its own; memory is that process's high-water mark
less what it held before.

- drift of two models of Llama's shape, with the attention KL of every layer and head. Beside it stands what one layer's
  two patterns alone would take, [H, T, T] each, and what drift says it holds: the original's rotated queries and keys
  and residual streams.
- relations of the queries of four heads of width 64, forward and backward. Beside it stands one dense matrix of them.

    python benchmarks/memory_by_window.py
    python benchmarks/memory_by_window.py --windows 1024 --windows 32768 --layers 4
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
from rope_probe.distillation.terms.relations import relation_kl
from rope_probe.models.checkpoints import with_rope

WIDTH, HEADS, KEY_HEADS, VOCABULARY = 256, 4, 2, 512
HEAD_WIDTH = WIDTH // HEADS
MEGABYTE = 2**20


def main(
    windows: Annotated[list[int] | None, typer.Option(help="Tokens [default: 1024, 4096 and 16384].")] = None,
    layers: int = 2,
    alone: Annotated[int | None, typer.Option(hidden=True)] = None,
    relations: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure each window in its own process and print a line for it."""
    if alone is not None:
        print(json.dumps(of_relations(alone) if relations else of_drift(alone, layers)))
        return
    windows = windows or [1024, 4096, 16384]

    def measured(window: int, *options: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--alone", str(window), "--layers", str(layers), *options]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    print(f"drift: {layers} layers, width {WIDTH}, {HEADS} heads, {KEY_HEADS} of keys; MB")
    for window in windows:
        told = measured(window)
        patterns = 2 * HEADS * window**2 * 4 / MEGABYTE
        width = WIDTH // HEADS
        held = 4 * window * (layers * ((HEADS + KEY_HEADS) * width + WIDTH) + WIDTH) / MEGABYTE
        print(
            f"{window:6d} tokens: peak {told['peak']:7.1f}, of it held from the original {held:6.1f}; "
            f"two patterns of one layer {patterns:8.1f}; {told['seconds']:.1f} s",
            flush=True,
        )
    print(f"relations: {HEADS} heads of width {HEAD_WIDTH}, forward and backward; MB")
    for window in windows:
        told = measured(window, "--relations")
        dense = HEADS * window**2 * 4 / MEGABYTE
        print(
            f"{window:6d} tokens: peak {told['peak']:7.1f}; a dense matrix {dense:8.1f}; {told['seconds']:.1f} s",
            flush=True,
        )


def of_relations(window: int) -> dict[str, float]:
    """Peak megabytes, and seconds, of the loss on one layer's queries and its gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = (torch.randn(1, window, HEADS, HEAD_WIDTH) for _ in range(2))
    short = student[:, :64].clone().requires_grad_()
    relation_kl(short, teacher[:, :64]).sum().backward()  # what is loaded when it is first used
    student.requires_grad_()
    before, started = high_water(), time.perf_counter()
    relation_kl(student, teacher).sum().backward()
    return {"peak": high_water() - before, "seconds": time.perf_counter() - started}


def of_drift(window: int, layers: int) -> dict[str, float]:
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
