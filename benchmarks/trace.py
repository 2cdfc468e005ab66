"""What a trace costs: against forwards that read nothing, its causal cone, TransformerLens' bridge and nnsight.

A model of Llama's shape with random weights, float32, and four jobs, each read at every layer (rotated q and k,
attention output, residual stream) and at the logits:

    one       q shifted in the first layer
    layers    q shifted in one layer, each layer in turn
    tail      q shifted in the first layer, at the last tenth of the window only
    doses     q shifted in the first layer, by ten amounts

Every measurement runs in a process of its own, which takes the model into memory, warms up on 64 tokens and is timed
once; rounds go through all of them in turn, and ratios are taken within a round, medians over rounds. Peak memory is
the process's high-water mark; "above the model" is less what it held before the job. The floor is two plain forwards of
transformers with sdpa, their logits included; for memory, one forward of two rows. A job's allowance is the floor's
time times the FLOPs of one forward and the job's cones (from rotated q on, in the first layer) over the FLOPs of two
forwards.

The bridge and nnsight (where they are installed) do the job "one": a clean and a perturbed pass with their own caches,
and the same deltas from them.

    python benchmarks/trace.py --positions 8192 --rounds 3
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
from collections.abc import Callable
from itertools import starmap

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

JOBS = ("one", "layers", "tail", "doses")
OTHERS = ("bridge", *(["nnsight"] if importlib.util.find_spec("nnsight") else []))
Work = Callable[[torch.Tensor], object]


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    """The model, with sdpa."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=options.positions,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def perturbations(job: str, positions: int, layers: int) -> list:
    """What a job injects."""
    from rope_probe import PositionShift

    return {
        "one": [PositionShift("q", 16.0, layers=0)],
        "layers": [PositionShift("q", 16.0, layers=layer) for layer in range(layers)],
        "tail": [PositionShift("q", 16.0, layers=0, positions=range(positions - positions // 10, positions))],
        "doses": [PositionShift("q", 2.0**dose, layers=0) for dose in range(-2, 8)],
    }[job]


def flops(options: argparse.Namespace, first_layer: int = 0, first: int = 0, injected: bool = False) -> int:
    """Multiplications and additions of a forward; or of a cone, from rotated q of `first_layer` at `first` on."""
    width, positions = options.width, options.positions
    count = positions - first
    seen = (positions * (positions + 1) - first * (first + 1)) // 2
    projections = 2 * count * width * 4 * width
    per_layer = projections + 2 * count * 3 * width * (width * 8 // 3) + 4 * seen * width
    skipped = projections * 3 // 4 if injected else 0
    return (options.layers - first_layer) * per_layer - skipped + 2 * count * width * options.vocabulary


def allowance(options: argparse.Namespace, job: str) -> float:
    """FLOPs of one forward and the cones of the job, over those of two forwards."""
    tail = options.positions - options.positions // 10
    cones = {
        "one": [(0, 0)],
        "layers": [(layer, 0) for layer in range(options.layers)],
        "tail": [(0, tail)],
        "doses": 10 * [(0, 0)],
    }[job]
    return (flops(options) + sum(starmap(lambda *cone: flops(options, *cone, True), cones))) / (2 * flops(options))


def prepare(variant: str, model: LlamaForCausalLM, options: argparse.Namespace) -> Work:
    """What a variant does with the tokens of a window; returns something made of the deltas."""
    if variant == "two forwards":
        return lambda tokens: [model(tokens, use_cache=False).logits[0, 0, 0].item() for _ in range(2)]
    if variant == "forward of two rows":
        return lambda tokens: model(tokens.expand(2, -1), use_cache=False).logits[0, 0, 0].item()
    if variant in JOBS:
        return traced(variant, model, options)
    return by_bridge(model) if variant == "bridge" else by_nnsight(model)


def traced(job: str, model: LlamaForCausalLM, options: argparse.Namespace) -> Work:
    """rope_probe."""
    from rope_probe import load_model, pack, trace

    hooked = load_model(model)

    def work(tokens: torch.Tensor) -> object:
        positions = tokens.shape[1]
        window = pack([tokens[0]], positions)
        frame = trace(hooked, window, perturbations(job, positions, options.layers), by="window")
        return frame["value"].sum()

    return work


def by_bridge(model: LlamaForCausalLM) -> Work:
    """TransformerLens: two runs with its cache, of the same sites."""
    from transformer_lens.model_bridge import TransformerBridge

    from rope_probe.tracing.deltas import logit_deltas, vector_deltas
    from rope_probe.tracing.propagation import LAYER_SITES

    model.config.architectures = [type(model).__name__]
    words = Tokenizer(WordLevel({str(i): i for i in range(4)}, unk_token="0"))  # never asked, but it wants one
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2").save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers("local/model", hf_model=model, tokenizer=tokenizer, device="cpu")

    def work(tokens: torch.Tensor) -> object:
        def wanted(name: str) -> bool:
            return name.endswith(LAYER_SITES)

        shift = perturbations("one", tokens.shape[1], 1)[0]
        clean_logits, clean = bridge.run_with_cache(tokens, names_filter=wanted)
        with bridge.hooks(fwd_hooks=shift.hooks(bridge)):
            logits, cache = bridge.run_with_cache(tokens, names_filter=wanted)
        told = [vector_deltas(clean[site][0], cache[site][0]) for site in clean]
        return sum(x.sum() for deltas in [*told, logit_deltas(clean_logits[0], logits[0])] for x in deltas.values())

    return work


def by_nnsight(model: LlamaForCausalLM) -> Work:
    """nnsight: two traces that save the same sites, q edited between rotation and the sdpa kernel."""
    from nnsight import NNsight

    from rope_probe.tracing.deltas import logit_deltas, vector_deltas

    wrapped, layers = NNsight(model), range(len(model.model.layers))

    def work(tokens: torch.Tensor) -> object:
        shift = perturbations("one", tokens.shape[1], 1)[0]
        turn = shift.turns(model, tokens.shape[1])["q", 0]

        with torch.no_grad(), wrapped.trace(input_ids=tokens, use_cache=False):
            clean = [].save()
            for layer in layers:
                attention = wrapped.model.layers[layer].self_attn
                q, k = attention.source.apply_rotary_pos_emb_0.output
                clean += [q.transpose(1, 2), k.transpose(1, 2), attention.output[0], wrapped.model.layers[layer].output]
            clean.append(wrapped.lm_head.output)
        with torch.no_grad(), wrapped.trace(input_ids=tokens, use_cache=False):
            other = [].save()
            for layer in layers:
                attention = wrapped.model.layers[layer].self_attn
                q, k = attention.source.apply_rotary_pos_emb_0.output
                if layer == 0:
                    q = turn(q.transpose(1, 2)).transpose(1, 2)
                    attention.source.apply_rotary_pos_emb_0.output = (q, k)
                other += [q.transpose(1, 2), k.transpose(1, 2), attention.output[0], wrapped.model.layers[layer].output]
            other.append(wrapped.lm_head.output)
        told = [vector_deltas(a[0], b[0]) for a, b in zip(clean[:-1], other[:-1], strict=True)]
        return sum(x.sum() for deltas in [*told, logit_deltas(clean[-1][0], other[-1][0])] for x in deltas.values())

    return work


def measure(variant: str, options: argparse.Namespace) -> dict:
    """Seconds, peak bytes of the process, and peak bytes above what it held before the job."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocabulary, (1, options.positions), generator=generator)
    work = prepare(variant, build(options), options)
    with torch.no_grad():
        work(tokens[:, :64])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        told = float(torch.as_tensor(work(tokens)).sum())
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak * 1024, "above": (peak - before) * 1024, "told": told}


def main() -> None:
    """Run everything and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rounds-of-others", type=int, default=1, help="of the bridge and nnsight")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return
    ours = ("two forwards", "forward of two rows", *JOBS)
    rounds: list[dict[str, dict]] = []
    for number in range(options.rounds):
        rounds.append({})
        for variant in (*ours, *(OTHERS if number < options.rounds_of_others else ())):
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{variant}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            got = rounds[-1][variant] = json.loads(done.stdout)
            print(
                f"{variant:20} {got['seconds']:8.2f} s   peak {got['peak'] / 2**30:6.2f} GiB, "
                f"{got['above'] / 2**30:6.3f} above the model",
                flush=True,
            )

    def ratio(of: str, to: str, what: str) -> float:
        return statistics.median(one[of][what] / one[to][what] for one in rounds if of in one and to in one)

    shape = f"T={options.positions} L={options.layers} M={options.width} V={options.vocabulary}"
    print(f"{shape}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds")
    for job in JOBS:
        times, allowed = ratio(job, "two forwards", "seconds"), allowance(options, job)
        print(
            f"{job:8} time x {times:.3f} of two forwards, cone's FLOPs x {allowed:.3f}: x {times / allowed:.3f} of its "
            f"allowance; peak memory x {ratio(job, 'forward of two rows', 'peak'):.3f} of a forward of two rows, above "
            f"the model x {ratio(job, 'forward of two rows', 'above'):.3f}"
        )
    for other in OTHERS:
        if other in rounds[0]:
            print(
                f"{other:8} time x {ratio(other, 'one', 'seconds'):.2f} of ours, memory above the model "
                f"x {ratio(other, 'one', 'above'):.1f} of ours, peak x {ratio(other, 'one', 'peak'):.2f}; "
                f"sum of deltas {rounds[0][other]['told']:.6g}"
            )


if __name__ == "__main__":
    main()
