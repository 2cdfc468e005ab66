"""compare_spans at the shape of Llama 3.1 8B: time against just reading the two checkpoints once, and peak memory.

Two checkpoints with random bfloat16 weights (theta 500,000, then llama3 scaling; the second is the first and noise of a
tenth; drawn from a pool of 2^26 normal values) are written in shards of 5 GB into `--folder`, 16 GB each, and removed
at the end. Every measurement is a process of its own, after the files were dropped from the page cache, in turns:
`read` reads the bytes of all files in order into one buffer of 16 MiB and does nothing else; `compare` is
compare_spans. Ratios are of medians over rounds; memory is the process's high-water mark, mapped files included, as
Linux tells it.

    python benchmarks/compare_scale.py --folder /tmp/scale
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
from transformers import LlamaConfig

from rope_probe import compare_spans
from rope_probe.models.checkpoints import skeleton

SHAPE = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
ROPE = {
    "before": {"rope_type": "default", "rope_theta": 500_000.0},
    "after": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LENGTH = {"before": 8192, "after": 131_072}
SHARD = 5 * 10**9
BUFFER = 2**24
POOL = 2**26


def write(folder: Path, layers: int) -> None:
    """A checkpoint with random weights, shard by shard."""
    config = LlamaConfig(
        **SHAPE,
        num_hidden_layers=layers,
        rope_parameters=ROPE[folder.name],
        max_position_embeddings=LENGTH[folder.name],
    )
    shapes = {name: p.shape for name, p in skeleton(config).named_parameters()}
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
    normal = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: weight(name, shapes[name], folder.name, normal) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(map(torch.Size.numel, shapes.values()))}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weight(name: str, shape: torch.Size, which: str, normal: torch.Tensor) -> torch.Tensor:
    """One tensor, from normal values read on from a place that its name gives; after is before and noise of a tenth."""
    start = int.from_bytes(name.encode(), "little") % (len(normal) // 2)
    made = normal[start : start + len(normal) // 2]
    if which == "after":
        made = made + 0.1 * normal[: len(made)].flip(0)
    count = shape.numel()
    return made.mul(0.02).bfloat16().repeat(-(-count // len(made)))[:count].view(shape)


def shards_of(folder: Path) -> list[Path]:
    """The weight files of both checkpoints."""
    return sorted(folder.glob("*/*.safetensors"))


def drop_from_cache(folder: Path) -> None:
    """So that every measurement reads from the disk."""
    for file in shards_of(folder):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Every byte of both, once."""
    buffer = bytearray(BUFFER)
    for file in shards_of(folder):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def compare(folder: Path) -> None:
    """What is measured."""
    frame = compare_spans(folder / "before", folder / "after")
    changes = frame.loc[frame["metric"] == "rel_change", "value"]
    print(f"{len(frame):,} rows, relative change {changes.min():.3f} to {changes.max():.3f}", file=sys.stderr)


def measured(what: str, folder: Path) -> dict[str, float]:
    """Seconds and gigabytes of one of them, in a process of its own."""
    drop_from_cache(folder)
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def one(what: str, folder: Path) -> None:
    """Measure `read` or `compare` in this process."""
    started = time.perf_counter()
    {"read": read, "compare": compare}[what](folder)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "gib": peak / 2**20}))


def main(
    folder: Annotated[Path, typer.Option(help="A place that is not there yet, with room for both checkpoints.")],
    layers: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write the checkpoints, measure, print, and remove them."""
    if measure is not None:
        one(measure, folder)
        return
    folder.mkdir(parents=True)
    try:
        for name in ROPE:
            (folder / name).mkdir()
            write(folder / name, layers)
        size = sum(file.stat().st_size for file in shards_of(folder))
        print(f"two checkpoints of {layers} layers, {len(shards_of(folder))} shards, {size / 1e9:.1f} GB", flush=True)
        found: dict[str, list[dict[str, float]]] = {"read": [], "compare": []}
        for _ in range(rounds):
            for what, numbers in found.items():
                numbers.append(measured(what, folder))
                print(what, {key: round(value, 2) for key, value in numbers[-1].items()}, flush=True)
    finally:
        shutil.rmtree(folder)
    seconds = {what: statistics.median(one["seconds"] for one in numbers) for what, numbers in found.items()}
    print(f"compare over read: x {seconds['compare'] / seconds['read']:.2f} ({torch.get_num_threads()} threads)")
    print(f"peak memory of compare: {max(one['gib'] for one in found['compare']):.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
