"""The chunked distillation loss against the plain one: peak memory above the inputs, time, and the gradients.

Forward KL from a teacher, forward and backward, T positions over a vocabulary of V, width M, float32. Each variant runs
in a process of its own, one after the other; memory is that process's high-water mark less what it held once the inputs
were made. Times are medians over repeats, gradients are compared relative to the largest. Liger's chunked loss (package
liger-kernel) joins in where it is installed, in chunks of the same size and not compiled. The plain loss at the default
size needs about 20 GB.

    python benchmarks/chunked_loss.py --positions 8192 --vocabulary 128256 --width 512
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812

from rope_probe.distillation import Divergence, Head
from rope_probe.distillation.terms import loss_in_chunks

VARIANTS = ("plain", "chunked", *(["liger"] if importlib.util.find_spec("liger_kernel") else []))


def inputs(positions: int, vocabulary: int, width: int) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of student and teacher; the student's want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((positions, width), (vocabulary, width), (positions, width), (vocabulary, width))
    made = [torch.randn(*shape, generator=generator) for shape in shapes]
    for weight in (made[1], made[3]):
        weight.mul_(width**-0.5)
    return made[0].requires_grad_(), torch.nn.Parameter(made[1]), made[2], made[3]


def loss_of(variant: str, chunk: int, hidden: torch.Tensor, head: torch.Tensor, taught: torch.Tensor,
            teacher_head: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """The same loss, the plain way or in chunks."""
    if variant == "plain":
        with torch.no_grad():
            target = F.linear(taught, teacher_head).log_softmax(-1)
        return F.kl_div(F.linear(hidden, head).log_softmax(-1), target, log_target=True, reduction="batchmean")
    targets = torch.zeros(len(hidden), dtype=torch.long)
    if variant == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        options = {"beta": 0.0, "compiled": False, "chunk_size": chunk}  # beta 0 is KL(teacher || student)
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **options)
        return loss(hidden, head, taught, teacher_head, targets)
    heads = [
        torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta") for weight in (head, teacher_head)
    ]
    heads[0].weight, heads[1].weight = head, torch.nn.Parameter(teacher_head, requires_grad=False)
    teachers = {"teacher": (taught, Head(heads[1]))}
    loss, _ = loss_in_chunks([Divergence()], hidden, Head(heads[0]), targets, teachers, chunk=chunk)
    return loss


def measure(variant: str, options: argparse.Namespace) -> dict:
    """Seconds of each repeat, peak bytes above the inputs, and a digest of the gradients."""
    made = inputs(options.positions, options.vocabulary, options.width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(options.repeats):
        for tensor in made[:2]:
            tensor.grad = None
        started = time.perf_counter()
        loss = loss_of(variant, options.chunk, *made)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    save_file({str(i): tensor.grad for i, tensor in enumerate(made[:2])}, f"{options.gradients}.{variant}")
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss.item()}


def main() -> None:
    """Run both variants and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            more = ["--variant", variant, "--gradients", f"{folder}/gradients"]
            command = [sys.executable, __file__, *sys.argv[1:], *more]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            told[variant] = json.loads(done.stdout)
            seconds = statistics.median(told[variant]["seconds"])
            peak = told[variant]["peak_bytes"] / 2**30
            print(f"{variant:8} {seconds:8.2f} s   {peak:6.2f} GiB above the inputs", flush=True)
        gradients = {variant: load_file(f"{folder}/gradients.{variant}") for variant in VARIANTS}
    print(f"T={options.positions} V={options.vocabulary} M={options.width} chunk={options.chunk}, against plain:")
    for variant in VARIANTS[1:]:
        right, got = gradients["plain"], gradients[variant]
        apart = max(((right[k] - got[k]).abs().max() / right[k].abs().max()).item() for k in "01")
        time_ratio = statistics.median(told[variant]["seconds"]) / statistics.median(told["plain"]["seconds"])
        memory_ratio = told[variant]["peak_bytes"] / told["plain"]["peak_bytes"]
        print(
            f"{variant:8} time x {time_ratio:.3f}, memory x {memory_ratio:.4f} (1/{1 / memory_ratio:.1f}), gradients "
            f"within {apart:.1e} of the largest, losses {told['plain']['loss']:.6f} {told[variant]['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
