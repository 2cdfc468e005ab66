"""A long trace on one accelerator: the shape of Llama 3.2 1B with random weights, 131,072 tokens, bfloat16.

One shift of q in the first layer, read at every layer and at the logits, against two plain forwards of transformers
that read nothing (with their logits, 34 GB each at the default size). Time and peak memory of both are written to
`benchmarks/results/`, with the machine's name; the machine needs one CUDA device of 80 GB or more. Smaller sizes run
anywhere, and are printed only:

    python benchmarks/trace_long.py
    python benchmarks/trace_long.py --positions 1024 --layers 2 --device cpu
"""

import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from rope_probe import PositionShift, load_model, pack, trace
from rope_probe.names import KERNELS

FULL = 131_072
RESULTS = Path(__file__).parent / "results"


def main(
    positions: int = FULL,
    layers: int = 16,
    device: str = "cuda",
    attn: Annotated[str, typer.Option(help=f"One of {', '.join(KERNELS)}.")] = "sdpa",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure, print, and at full size on CUDA record."""
    model, tokens = build(positions, layers, device), torch.randint(128_256, (1, positions))
    held = torch.cuda.memory_allocated() if device.startswith("cuda") else 0

    def floor() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(tokens.to(device), use_cache=False).logits[0, -1, 0].item()

    told = {"two forwards": measure(floor, device, repeats)}
    hooked, window = load_model(model, attn=attn), pack([tokens[0]], positions)
    shift = PositionShift("q", 16.0, layers=0)
    told["trace"] = measure(lambda: trace(hooked, window, shift, by="window"), device, repeats)
    record = {
        "positions": positions,
        "layers": layers,
        "dtype": "bfloat16",
        "attn": attn,
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor(),
        "torch": torch.__version__,
        "model_bytes": held,
        **told,
        "time_ratio": told["trace"]["seconds"] / told["two forwards"]["seconds"],
        "memory_ratio": told["trace"]["peak_bytes"] / told["two forwards"]["peak_bytes"],
    }
    text = json.dumps(record, indent=2)
    print(text)
    if positions == FULL and device.startswith("cuda"):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"trace_long-{record['machine'].replace(' ', '-')}.json").write_text(text + "\n")


def build(positions: int, layers: int, device: str) -> LlamaForCausalLM:
    """The shape of Llama 3.2 1B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(work: Callable[[], object], device: str, repeats: int) -> dict[str, float]:
    """Least seconds, and peak bytes: of the device where there is one, of the process elsewhere."""
    cuda, seconds = device.startswith("cuda"), []
    work()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(seconds), "peak_bytes": peak}


if __name__ == "__main__":
    typer.run(main)
