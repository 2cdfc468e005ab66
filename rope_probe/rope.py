"""Geometry of rotary position embeddings: pure functions of frequencies, positions and layouts. Knows no model.

- The pair index is canonical: pair 0 turns fastest, pair P-1 slowest, whatever the layout in memory.
- Frequencies come from transformers' own functions, for every rope type it has; nothing is cached.
- A *layout* says where the two members of a pair stand in a head: "half" keeps p beside p + rotary_dim/2 (Llama, Qwen,
  Mistral, Gemma, GPT-NeoX), "adjacent" keeps 2p beside 2p + 1 (Cohere, GLM). Rotary dims come first; the rest of a
  partially rotated head has no pair.
- Angles are radians, positions and wavelengths are tokens.

Shape letters: D head dim, P rotary pairs.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from rope_probe.errors import InputError
from rope_probe.precision import keep_float32, promote_float32

Layout = Literal["half", "adjacent"]
_NEEDED_PARAMETERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


# Frequencies ----------------------------------------------------------------------------------------------------------


def inv_freq(
    rope_parameters: Mapping[str, Any],
    head_dim: int,
    *,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " P"]:
    """Inverse frequencies in radians per token, pair 0 (fastest) first: theta^(-2p/d) and its scaled variants.

    `rope_parameters` is the dictionary that a transformers config carries (`rope_type`, `rope_theta`, `factor`,
    `partial_rotary_factor`, ...). `max_position_embeddings` is needed by the types whose formula reads it (dynamic, and
    yarn or longrope without `original_max_position_embeddings`); `seq_len` only by the types that depend on the length
    of the input (dynamic, longrope). With `dtype=torch.float64` the same formula is evaluated in float64.

    Raises InputError for an unknown type, a theta that is not a positive finite number, or an odd or missing head_dim.
    Source: RoFormer, arXiv 2104.09864; the variants as in `transformers.modeling_rope_utils`.
    """
    return _rope_init(rope_parameters, head_dim, max_position_embeddings, seq_len, dtype)[0]


def yarn_temperature(extension: float) -> float:
    """What YaRN multiplies attention scores by when a window grows `extension` times: (0.1 ln(s) + 1) squared.

    Half of it is on the queries and half on the keys (arXiv 2309.00071). Raises InputError for less than 1.
    """
    if not extension >= 1:
        raise InputError(f"extension must be 1 or more times the window, but it is {extension}")
    return (0.1 * math.log(extension) + 1) ** 2


def attention_scaling(
    rope_parameters: Mapping[str, Any],
    head_dim: int,
    *,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
) -> float:
    """The factor on cos and sin that some types carry (yarn: 0.1 ln(s) + 1, arXiv 2309.00071); 1 for plain RoPE.

    Where it is not 1 the rotated norm is not the norm before rotation, and the transpose is not the inverse.
    Raises InputError as `inv_freq`, and for longrope that says neither its factor nor its attention_factor where
    `max_position_embeddings` is not given: the factor is then that length over the original one (Phi-3: 32).
    """
    says_factor = any(rope_parameters.get(key) is not None for key in ("factor", "attention_factor"))
    if rope_parameters.get("rope_type") == "longrope" and max_position_embeddings is None and not says_factor:
        raise InputError(
            "longrope without a 'factor' scales attention by the model's length: pass max_position_embeddings"
        )
    return _rope_init(rope_parameters, head_dim, max_position_embeddings, seq_len, torch.float32)[1]


def _rope_init(
    rope_parameters: Mapping[str, Any],
    head_dim: int,
    max_position_embeddings: int | None,
    seq_len: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, float]:
    rope_type = rope_parameters.get("rope_type", "default")
    theta = rope_parameters.get("rope_theta")
    if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise InputError(f"rope_type {rope_type!r} is unknown; transformers has {known}")
    if not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
        raise InputError(f"rope_theta must be a positive finite number, but it is {theta!r}")
    if head_dim <= 0 or head_dim % 2:
        raise InputError(f"head_dim must be a positive even number, but it is {head_dim}")
    original = rope_parameters.get("original_max_position_embeddings")
    needs_length = rope_type == "dynamic" or (rope_type in ("yarn", "longrope") and original is None)
    if needs_length and max_position_embeddings is None:
        raise InputError(f"rope_type {rope_type!r} reads the model's length: pass max_position_embeddings")
    needed = [key for key in _NEEDED_PARAMETERS.get(rope_type, ()) if key not in rope_parameters]
    if needed:
        raise InputError(f"rope_type {rope_type!r} needs {needed[0]!r} in its rope_parameters")
    length = max_position_embeddings or original or 2048
    shape = {"hidden_size": head_dim, "num_attention_heads": 1, "max_position_embeddings": length}
    with promote_float32() if dtype == torch.float64 else keep_float32():
        if rope_type == "default":
            config = GPTNeoXConfig(**shape, rope_parameters={"partial_rotary_factor": 1.0, **rope_parameters})
            frequencies, factor = GPTNeoXRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            config = LlamaConfig(**shape, head_dim=head_dim, rope_parameters=dict(rope_parameters))
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)
        return frequencies.to(dtype), float(factor)


def wavelengths(inv_freq: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Tokens per full turn of each pair, 2 pi / inv_freq."""
    return 2 * math.pi / inv_freq


def rotations(inv_freq: Float[Tensor, " P"], window: float) -> Float[Tensor, " P"]:
    """Full turns that each pair makes over `window` tokens."""
    return window * inv_freq / (2 * math.pi)


def spectrum_use(inv_freq: Float[Tensor, " P"], window: float) -> float:
    """Share of pairs whose wavelength fits into `window` tokens, a proxy for "the rotary spectrum is well used".

    No published formula for spectrum utilisation is known to us; this one counts the pairs that complete a turn.
    """
    return (rotations(inv_freq, window) >= 1).double().mean().item()


def critical_dimension(head_dim: int, theta: float, train_length: int) -> int:
    """Number of dimensions whose pairs saw a full turn in training, 2 ceil(d/2 log_theta(T / 2 pi)), within 0..d.

    Source: arXiv 2310.05209, the critical dimension (92 of 128 for LLaMA-2).
    """
    dimensions = 2 * math.ceil(head_dim / 2 * math.log(train_length / (2 * math.pi), theta))
    return min(max(dimensions, 0), head_dim)


def base_bound(head_dim: int, window: int, *, resolution: float = 1e-3) -> float:
    """Smallest theta whose sum over pairs of cos(m theta^(-2p/d)) is >= 0 for every distance 0 <= m < `window`.

    The condition is not monotone in theta, so thetas are scanned upwards from 2 on a grid of relative step `resolution`
    and the first that passes is refined by bisection; a passing island narrower than a step is missed. Float64.
    Source: arXiv 2405.14591, the base bound. Raises InputError for a head dim that is odd or below 4: a single pair
    turns by 1 radian a token whatever theta is.
    """
    if head_dim < 4 or head_dim % 2:
        raise InputError(f"head_dim must be even and 4 or more, but it is {head_dim}")
    exponents = -torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    distances = torch.arange(window, dtype=torch.float64)
    witnesses = distances[:0]  # distances that refuted an earlier theta refute most of its neighbours too

    def lowest(theta: float, at: Tensor) -> tuple[float, Tensor]:
        similarity = torch.outer(at, theta**exponents).cos_().sum(-1)
        worst = similarity.argmin()
        return similarity[worst].item(), at[worst]

    def passes(theta: float) -> bool:
        nonlocal witnesses
        if len(witnesses) and lowest(theta, witnesses)[0] < 0:
            return False
        for block in distances.split(4096):
            value, worst = lowest(theta, block)
            if value < 0:
                witnesses = torch.cat([worst[None], witnesses])[:64]
                return False
        return True

    low, high = 2.0, 2.0
    while not passes(high):
        low, high = high, high * (1 + resolution)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


# Rotations ------------------------------------------------------------------------------------------------------------


def rotate(
    x: Float[Tensor, "*batch D"],
    angles: Float[Tensor, "*broadcast P"],
    layout: Layout = "half",
    scale: float | Float[Tensor, "*broadcast P"] = 1.0,
) -> Float[Tensor, "*shape D"]:
    """Turn pair p of the last dimension of `x` by `angles[..., p]` radians and scale it; dims past 2P pass through.

    x and the angles broadcast against each other. Cos and sin are taken in the angles' dtype, then cast to x's, so pass
    float64 angles: at position 100,000 a float32 angle is off by 0.004 radians. Rotating by d * inv_freq moves a
    rotated query or key d tokens onward, fractions included.
    """
    first, second = _members(x, layout, 2 * angles.shape[-1])
    cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(turned, -1) if layout == "half" else torch.stack(turned, -1).flatten(-2)
    untouched = x[..., 2 * angles.shape[-1] :]
    return torch.cat([rotated, untouched.expand(*rotated.shape[:-1], -1)], -1) if untouched.shape[-1] else rotated


def pair_norms(
    x: Float[Tensor, "*batch D"], layout: Layout = "half", rotary_dim: int | None = None
) -> Float[Tensor, "*batch P"]:
    """Length of each rotary pair in the last dimension of `x`; a rotation leaves it as it is."""
    return torch.hypot(*_members(x, layout, x.shape[-1] if rotary_dim is None else rotary_dim))


def _members(x: Tensor, layout: Layout, rotary_dim: int) -> tuple[Tensor, Tensor]:
    _check_layout(layout, x.shape[-1], rotary_dim)
    rotary = x[..., :rotary_dim]
    if layout == "half":
        return rotary[..., : rotary_dim // 2], rotary[..., rotary_dim // 2 :]
    return rotary[..., 0::2], rotary[..., 1::2]


# Pairs and weight rows ------------------------------------------------------------------------------------------------


def rows_of_pair(
    layout: Layout,
    head: int,
    pair: int,
    *,
    head_dim: int,
    rotary_dim: int | None = None,
    head_stride: int | None = None,
    offset: int = 0,
) -> tuple[int, int]:
    """The two rows of a projection weight [rows, M] that make rotary pair `pair` of head `head`.

    `head_stride` is the number of rows from one head to the next (head_dim unless the projection interleaves q, k and v
    by head, as GPT-NeoX does: 3 * head_dim); `offset` the row where this projection's first head begins in a fused one.
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    _check_layout(layout, head_dim, rotary_dim)
    if head < 0:
        raise InputError(f"head must be 0 or more, but it is {head}")
    if not 0 <= pair < rotary_dim // 2:
        raise InputError(f"pair {pair} is out of range: rotary_dim {rotary_dim} has pairs 0 to {rotary_dim // 2 - 1}")
    start = offset + head * (head_dim if head_stride is None else head_stride)
    if layout == "half":
        return start + pair, start + pair + rotary_dim // 2
    return start + 2 * pair, start + 2 * pair + 1


def pair_of_row(
    layout: Layout,
    row: int,
    *,
    head_dim: int,
    rotary_dim: int | None = None,
    head_stride: int | None = None,
    offset: int = 0,
) -> tuple[int, int] | None:
    """The (head, pair) that a weight row belongs to, or None for a row that is not rotated; undoes `rows_of_pair`."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    _check_layout(layout, head_dim, rotary_dim)
    head, dim = divmod(row - offset, head_dim if head_stride is None else head_stride)
    if head < 0 or dim >= rotary_dim:
        return None
    return head, dim % (rotary_dim // 2) if layout == "half" else dim // 2


def _check_layout(layout: str, head_dim: int, rotary_dim: int) -> None:
    if layout not in get_args(Layout):
        raise InputError(f"layout {layout!r} is unknown; known are {', '.join(get_args(Layout))}")
    if rotary_dim <= 0 or rotary_dim % 2 or rotary_dim > head_dim:
        raise InputError(f"rotary_dim must be even and in 2..{head_dim} (the head dim), but it is {rotary_dim}")
