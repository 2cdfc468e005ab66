"""A trace of a model that stays on disk: time against reading its files once and the arithmetic, and peak memory.

A checkpoint of Llama 3.1 8B's shape with random bfloat16 weights is written in shards of 5 GB into `--folder`, 16 GB of
them, and removed at the end. Traced is a sweep: q shifted in all layers by `--perturbations` amounts, read at every
layer and the logits. Every measurement is a process of its own, after the files were dropped from the page cache:

    read      reads the bytes of all files in order into one buffer of 16 MiB, and does nothing else
    forwards  the arithmetic: plain transformers, one forward of one row and one of a row per perturbation, with logits,
              by a model whose layers share one layer's weights, so that it fits into memory
    trace     the sweep, with `load_model(folder, device_map="disk")`, loading included
    hooked    the same with a hook of the user's own on a layer

`--dtype float32` computes in float32, for CPUs whose bfloat16 products are slow; the files stay bfloat16. Ratios are of
medians over rounds, to read + forwards; memory is the process's high-water mark, mapped files included, as Linux tells
it.

    python benchmarks/trace_offloaded.py --folder /tmp/offloaded
    python benchmarks/trace_offloaded.py --folder /tmp/small --layers 8 --width 2048 --intermediate 5632 --tokens 16
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from rope_probe import PositionShift, load_model, pack, trace
from rope_probe.models.checkpoints import skeleton

SHARD = 5 * 10**9
BUFFER = 2**24
POOL = 2**26
WHAT = ("read", "forwards", "trace", "hooked")


def write(folder: Path, config: LlamaConfig) -> None:
    """A checkpoint with random weights, shard by shard."""
    shapes = {name: parameter.shape for name, parameter in skeleton(config).named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += 2 * shape.numel()
        if size > SHARD:
            shards.append([])
            size = 2 * shape.numel()
        shards[-1].append(name)
    config.save_pretrained(folder)
    where = {}
    normal = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: weight(name, shapes[name], normal) for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(map(torch.Size.numel, shapes.values()))}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weight(name: str, shape: torch.Size, normal: torch.Tensor) -> torch.Tensor:
    """One tensor, from normal values read on from a place that its name gives; the gains of norms are one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    start = int.from_bytes(name.encode(), "little") % (len(normal) // 2)
    made = normal[start : start + len(normal) // 2]
    count = shape.numel()
    return made.repeat(-(-count // len(made)))[:count].view(shape)


def drop_from_cache(folder: Path) -> None:
    """So that every measurement reads from the disk."""
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Every byte, once."""
    buffer = bytearray(BUFFER)
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def with_shared_layers(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model that does the arithmetic of the checkpoint's, with one layer's weights for all layers."""
    config = AutoConfig.from_pretrained(folder)
    depth, config.num_hidden_layers = config.num_hidden_layers, 1
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.model.layers = torch.nn.ModuleList(list(model.model.layers) * depth)
    model.config.num_hidden_layers = depth
    return model


@torch.no_grad()
def forwards(model: LlamaForCausalLM, tokens: torch.Tensor, rows: int) -> None:
    """Plain forwards of a row and of `rows` rows; logits row by row, since those of all would take too much memory."""
    for count in (1, rows):
        states = model.model(tokens.expand(count, -1), use_cache=False).last_hidden_state
        for state in states:
            model.lm_head(state)


def sweep(folder: Path, tokens: torch.Tensor, rows: int, dtype: torch.dtype, own_hook: bool) -> None:
    """What is measured."""
    model = load_model(folder, device_map="disk", dtype=dtype)
    if own_hook:
        model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: 1.01 * x)
    shifts = [PositionShift("q", float(1 + amount)) for amount in range(rows)]
    frame = trace(model, pack([tokens[0].tolist()], tokens.shape[1]), shifts, by="window")
    largest = frame.loc[frame["site"] == "logits", "value"].max()
    print(f"{len(frame):,} rows, largest logit delta {largest:.3g}", file=sys.stderr)


def one(what: str, folder: Path, length: int, rows: int, dtype: torch.dtype) -> None:
    """Measure one of them in this process."""
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    model = with_shared_layers(folder, dtype) if what == "forwards" else None
    started = time.perf_counter()
    if what == "read":
        read(folder)
    elif model is not None:
        forwards(model, tokens, rows)
    else:
        sweep(folder, tokens, rows, dtype, own_hook=what == "hooked")
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "gib": peak / 2**20}))


def measured(what: str, folder: Path, length: int, rows: int, dtype: str) -> dict[str, float]:
    """Seconds and gigabytes of one of them, in a process of its own."""
    drop_from_cache(folder)
    options = ["--folder", str(folder), "--tokens", str(length), "--perturbations", str(rows), "--dtype", dtype]
    command = [sys.executable, __file__, "--measure", what, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main(
    folder: Annotated[Path, typer.Option(help="A place that is not there yet, with room for the checkpoint.")],
    layers: Annotated[int, typer.Option(min=1)] = 32,
    width: Annotated[int, typer.Option(min=128)] = 4096,
    intermediate: Annotated[int, typer.Option(min=1)] = 14_336,
    vocabulary: Annotated[int, typer.Option(min=1)] = 128_256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the window.")] = 64,
    perturbations: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="What to compute in: bfloat16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write the checkpoint, measure, print, and remove it."""
    if measure is not None:
        one(measure, folder, tokens, perturbations, getattr(torch, dtype))
        return
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    try:
        write(folder, config)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{layers} layers, {size / 1e9:.1f} GB, {tokens} tokens, {perturbations} perturbations", flush=True)
        found: dict[str, list[dict[str, float]]] = {what: [] for what in WHAT}
        for _ in range(rounds):
            for what, numbers in found.items():
                numbers.append(measured(what, folder, tokens, perturbations, dtype))
                print(what, {key: round(value, 2) for key, value in numbers[-1].items()}, flush=True)
    finally:
        shutil.rmtree(folder)
    seconds = {what: statistics.median(numbers["seconds"] for numbers in found[what]) for what in WHAT}
    floor = seconds["read"] + seconds["forwards"]
    for what in ("trace", "hooked"):
        peak = max(numbers["gib"] for numbers in found[what])
        print(f"{what}: x {seconds[what] / floor:.2f} of read + forwards, peak memory {peak:.2f} GiB")
    print(f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    typer.run(main)
