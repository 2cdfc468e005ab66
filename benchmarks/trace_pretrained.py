"""What tracing real pretrained models costs, logits of a large vocabulary and their KL included.

SmolLM2-135M (vocabulary 49,152) and Gemma 3 270M (262,144; left out with a line where it is not installed or its terms
are not accepted), float32, on natural text, a document of 64 tokens again and again:

    two forwards   of transformers with sdpa, all logits: the floor
    one            q shifted in every layer, read at every layer (rotated q and k, attention output, residual stream)
                   and at the logits
    sweep          the default sweep of `rope-probe trace`, read at the same places, without its float64 control
    layers         the part of it that shifts one layer at a time, which is affordable at 4,096 tokens

Every measurement runs in a process of its own, which takes the model into memory, warms up on 64 tokens and is timed
once; rounds go through all of them in turn, and ratios are taken within a round, medians over rounds. "one" is told in
the floor's time, and a sweep in its allowance: the floor's time, times the FLOPs of one forward and of the sweep's
cones (from rotated q on, in the layer where one begins) over those of two forwards. Attention counts as causal over the
whole window, in local layers too, on both sides. Time is processor time of all threads, which other work on the machine
changes little. Peak memory is the process's high-water mark; "above the model" is
less what it held before the job.

    python benchmarks/trace_pretrained.py --positions 1024 --rounds 3
    python benchmarks/trace_pretrained.py --positions 4096 --rounds 1 --jobs one layers
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from rope_probe import HookedCausalLM, PositionShift, Window, load_model, trace
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.models.architectures import heads_of, layers_of, output_projection_of, query_key_value_modules
from rope_probe.models.pretrained import file_of
from rope_probe.tracing.cone import cone_of
from rope_probe.tracing.perturbations import Perturbation
from rope_probe.tracing.sweeps import sweep
from rope_probe.windows.natural import text_window

MODELS = ("smollm2-135m", "gemma3-270m")
FLOOR, JOBS = "two forwards", ("one", "sweep", "layers")
KINDS_OF = {"sweep": ("dose", "layer"), "layers": ("layer",)}
"""The sweeps that a job consists of."""
DOCUMENT = 64
"""Tokens of a document, and of the window that warms up."""
Work = Callable[[Window], float]


def perturbations(job: str, model: HookedCausalLM, positions: int) -> list[Perturbation]:
    """What a job injects."""
    if job == "one":
        return [PositionShift("q", 16.0)]
    return [perturbation for kind in KINDS_OF[job] for perturbation in sweep(kind, model, positions)]


def flops(model: PreTrainedModel, positions: int, first_layer: int = 0, first: int = 0, injected: bool = False) -> int:
    """Multiplications and additions of a forward; or of a cone, from rotated q of `first_layer` at `first` on."""
    count = positions - first
    seen = (positions * (positions + 1) - first * (first + 1)) // 2
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * seen * heads_of(config).query * head_dim
    total = 0
    for layer in layers_of(model)[first_layer:]:
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
        total += 2 * count * weights + attention
    if injected:
        total -= 2 * count * sum(module.weight.numel() for module in query_key_value_modules(model, first_layer))
    return total + 2 * count * output_projection_of(model).weight.numel()


def allowance(job: str, model: HookedCausalLM, window: Window) -> float:
    """FLOPs of one forward and the cones of the job, over those of two forwards."""
    plain, positions = model.original_model, len(window)
    cones = [
        cone_of(perturbation.turns(plain, positions, window), window, masked=False)
        for perturbation in perturbations(job, model, positions)
    ]
    of_cones = sum(
        flops(plain, positions, cone.layer, positions - len(cone.at), injected=True)
        for cone in cones
        if cone is not None
    )
    return (flops(plain, positions) + of_cones) / (2 * flops(plain, positions))


def prepare(variant: str, name: str) -> tuple[Work, HookedCausalLM | None]:
    """What a variant does with a window, and its hooked model, if it has one."""
    if variant == FLOOR:
        model = checkpoints.load(name, dtype=torch.float32).eval()
        assert model.config._attn_implementation == "sdpa"
        return lambda window: sum(model(window.tokens, use_cache=False).logits[0, 0, 0].item() for _ in range(2)), None
    hooked = load_model(name, dtype=torch.float32)

    def work(window: Window) -> float:
        frame = trace(hooked, window, perturbations(variant, hooked, len(window)))
        return frame["value"].sum()

    return work, hooked


def measure(variant: str, name: str, positions: int) -> dict[str, float]:
    """Processor seconds, peak bytes of the process and above what it held before the job, and the job's allowance."""
    tokenizer = checkpoints.load_tokenizer(name)
    assert tokenizer is not None
    work, hooked = prepare(variant, name)
    window = text_window(tokenizer, positions, document_length=DOCUMENT)
    with torch.no_grad():
        work(text_window(tokenizer, DOCUMENT, document_length=DOCUMENT))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        total = work(window)
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        allowed = 1.0 if hooked is None else allowance(variant, hooked, window)
        count = 0 if hooked is None else len(perturbations(variant, hooked, positions))
    return {
        "seconds": seconds,
        "peak": peak * 1024,
        "above": (peak - before) * 1024,
        "total": total,
        "allowance": allowed,
        "perturbations": count,
    }


def compare(name: str, positions: int, rounds: int, jobs: Sequence[str]) -> None:
    """Measure a model at a size, round by round, and print the ratios."""
    measured: dict[str, list[dict[str, float]]] = {variant: [] for variant in (FLOOR, *jobs)}
    for _ in range(rounds):
        for variant in measured:
            command = [sys.executable, __file__, "--variant", variant, "--models", name, "--positions", str(positions)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}, {variant}: {done.stderr.strip().splitlines()[-1]}")
            got = json.loads(done.stdout.splitlines()[-1])
            measured[variant].append(got)
            print(
                f"{name:13} T={positions:<6} {variant:13} {got['seconds']:8.2f} s   peak {got['peak'] / 2**30:6.2f} "
                f"GiB, {got['above'] / 2**30:6.3f} above the model",
                flush=True,
            )

    def ratio(variant: str, what: str) -> float:
        both = zip(measured[variant], measured[FLOOR], strict=True)
        return statistics.median(
            ours[what] / max(floor[what], 1.0 if what == "above" else 1e-9) for ours, floor in both
        )

    for variant in jobs:
        times, allowed = ratio(variant, "seconds"), measured[variant][0]["allowance"]
        print(
            f"{name}, T={positions}, {variant} ({measured[variant][0]['perturbations']:.0f} perturbations): time "
            f"x {times:.3f} of two forwards, its cones' FLOPs x {allowed:.3f}: x {times / allowed:.3f} of its "
            f"allowance; peak memory x {ratio(variant, 'peak'):.3f} of a plain forward's, above the model "
            f"x {ratio(variant, 'above'):.3f}",
            flush=True,
        )


def main() -> None:
    """Run everything that is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--positions", nargs="+", type=int, default=[1024, 4096], help="tokens, multiples of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", default=JOBS[:2], choices=JOBS, help="a sweep at 4,096 takes an hour")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.models[0], options.positions[0])))
        return
    print(f"{torch.get_num_threads()} threads, float32, medians of {options.rounds} rounds")
    for name in options.models:
        try:
            file_of(name)
        except InputError as error:
            print(f"{name} is left out: {error}")
            continue
        for positions in options.positions:
            compare(name, positions, options.rounds, options.jobs)


if __name__ == "__main__":
    main()
