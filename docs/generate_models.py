"""Make docs/models.md: what rope_probe makes of a tiny random model of every causal-LM type that transformers has.

python docs/generate_models.py
"""

import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT))

from rope_probe.models.architectures import ARCHITECTURES  # noqa: E402
from tests.every_type import TYPES, WITHOUT_ROPE, Outcome, outcome_of  # noqa: E402

INTRODUCTION = """# Models

Made by `python docs/generate_models.py`; `tests/test_every_type.py` keeps it true. Every causal-LM type of transformers
{version} that rotates queries and keys is here, {total} of them: {exact} exact, {refused} refused, {unbuilt} that could
not be built small.

**Exact** means, on a tiny random model in float64:

- logits are transformers' own to 1e-9, by `sdpa` and by `eager`, in windows longer than its sliding window or chunk;
- `resid_pre + attn_out + mlp_out = resid_post` in every layer, multipliers included, to 1e-10;
- logits after a shift of all queries are those that transformers' own rotary code gives for queries further on, to
  1e-9;
- the tracer's numbers are those of hooks on whole windows, to 1e-9;
- a document in a masked pack reads as it does alone. A model with layers without attention (recurrences, convolutions)
  carries its state through all documents, so that masks are refused there.

A model is recognised by measuring a small random model of its type and config when it is loaded, so that one with other
switches than those here may be refused. Types marked *by hand* have an entry in `rope_probe.models.architectures`,
which `spans` needs: it compares weights by head and pair, and refuses the types that are only measured. Within limits:

- Llama 4 attends in chunks. They are counted from the start of a document where documents are masked from each other,
  else from that of the window. The temperature of its layers without RoPE counts from the window's start either way.
- The temperature that some models put on queries far into a window is left as it is by a shift.
- MiniMax M3 is exact without its layers of sparse attention, and refused with them.
- Experts of Granite's hybrid type add a third term to the stream, and are refused; without experts it is exact.

Reasons of refusal, and the best-known models that each is about:

{reasons}

| model type | outcome | why |
|---|---|---|
"""
REASONS = {
    "heads that differ between layers, or from what the config says": ("query heads",),
    "no buffer of rotary frequencies; some of these have no RoPE at all": ("no rotary frequencies",),
    "no plain rotation of queries and keys": ("not rotations", "do not turn"),
    "masks or arguments that the seam does not know": ("the mask", "a mask", "the seam does not know"),
    "no call of transformers' attention interface": ("none of its layers calls", "has no attention"),
    "another form of layer or stream": ("",),
}
"""Classes of reasons by words in them; a refusal is of the first class that has one."""
NAMES = {
    "blt": "BLT", "codegen": "CodeGen", "dbrx": "DBRX", "deepseek_v32": "DeepSeek-V3.2", "deepseek_v4": "DeepSeek-V4",
    "diffllama": "DiffLlama", "dots3_note_text": "Dots 3", "falcon": "Falcon", "falcon_h1": "Falcon-H1",
    "gemma3n_text": "Gemma 3n", "gemma4_text": "Gemma 4", "glm_moe_dsa": "GLM-5",
    "gpt_neox_japanese": "GPT-NeoX Japanese", "gptj": "GPT-J", "hrm_text": "HRM",
    "hunyuan_v1_dense": "Hunyuan", "jamba": "Jamba", "lfm3": "LFM3",
    "longcat_flash": "LongCat-Flash", "mimo_v2_flash": "MiMo-V2-Flash", "minimax": "MiniMax-01",
    "mllama": "Llama 3.2 Vision", "nemotron_h": "Nemotron-H", "phimoe": "Phi-3.5-MoE", "qwen4_exp_text": "Qwen4-Exp",
    "roformer": "RoFormer", "zamba2": "Zamba2", "zaya": "ZAYA",
}  # fmt: skip
"""What people call the types that may be refused."""


def reasons_told(outcomes: dict[str, Outcome]) -> str:
    """How many types are refused for each class of reasons, the most used first, and the known ones by name."""
    of_class: dict[str, list[str]] = {}
    for model_type, outcome in outcomes.items():
        if outcome.status == "refused":
            told = next(told for told, words in REASONS.items() if any(word in outcome.why for word in words))
            of_class.setdefault(told, []).append(model_type)
    lines = []
    for told, types in sorted(of_class.items(), key=lambda one: -len(one[1])):
        known = ", ".join(NAMES[one] for one in types if one in NAMES)
        lines.append(f"- {told}, {len(types)} types{': ' * bool(known)}{known}")
    return "\n".join(lines)


def row(model_type: str, outcome: Outcome) -> str:
    """The line of a model type."""
    by_hand = ", by hand" if model_type in ARCHITECTURES else ""
    return f"| {model_type} | {outcome.status}{by_hand} | {outcome.why.replace('|', '/')} |"


def page(outcomes: dict[str, Outcome]) -> str:
    """The page for the outcomes of all types."""
    counts = Counter(outcome.status for outcome in outcomes.values())
    introduction = INTRODUCTION.format(
        version=transformers.__version__,
        total=len(outcomes),
        exact=counts["exact"],
        refused=counts["refused"],
        unbuilt=counts["cannot be built small"],
        reasons=reasons_told(outcomes),
    )
    rows = "\n".join(row(model_type, outcome) for model_type, outcome in outcomes.items())
    without = ", ".join(WITHOUT_ROPE)
    return f"{introduction}{rows}\n\nCausal-LM types without a rotary embedding, refused as such: {without}.\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page({model_type: outcome_of(model_type) for model_type in TYPES}))
    print(PAGE)
