"""The one attention seam: rotated q and k go in on every architecture, and any kernel stands behind it.

- Registered with transformers' `AttentionInterface` under a name of its own; transformers calls it with q
  [B, H, T, D] and k, v [B, K, T, D] after rotation. The TransformerLens hook points fire here.
- No T x T mask is ever built. The seam registers a mask function that returns nothing, and applies causality, documents
  and sliding windows itself: documents run one by one (equal lengths together), sliding windows in blocks of queries.
- In a layer that attends in chunks (Llama 4's), every chunk of a document runs as a document. Chunks are counted from
  the document's start, as transformers counts them in packed documents; where none are masked, the window is one.
- Documents come as `document_bounds` (cu_seqlens as integers), a keyword argument that transformers' layers hand on,
  to the second forward of gradient checkpointing too; never through `position_ids`, where a jump reads as a boundary.
- Kernels are transformers' own, except "eager": scores and patterns exist only there, with hooks on them, and its
  softmax keeps float64. A soft cap and attention sinks (a score per head that takes weight and gives no value), which
  sdpa has no kernel for, run in exact blocks of queries.
- An argument that the seam does not know is refused, never dropped.
"""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rope_probe.errors import InputError
from rope_probe.models.architectures import attention_modules
from rope_probe.models.measured import unknown_arguments
from rope_probe.names import KERNELS

QUERY_BLOCK = 512
_NAMES = {kernel: f"rope_probe_{i}" for i, kernel in enumerate(KERNELS)}  # transformers reads "sdpa", "flash" in names

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scoring:
    """How one attention layer makes its pattern of rotated q and k, as the model itself asked when it last ran.

    A query's score of a key is `scaling` * q·k, then `softcap` * tanh(score / softcap) where there is a soft cap. It
    looks back over its own document alone (`bounds`, cu_seqlens; None: the whole window), and over no more than
    `sliding_window` keys, itself included, where there is one. Where there is a `chunk`, the document is cut every so
    many positions, and it looks back over its own piece alone. `sinks` are further scores, one a head, that take weight
    in the softmax and give no value.
    """

    scaling: float
    softcap: float | None
    sliding_window: int | None
    bounds: tuple[int, ...] | None
    sinks: Float[Tensor, " H"] | None = None
    chunk: int | None = None


@dataclass
class Seam:
    """What the seam knows of one attention module: its hook points, and the implementation it had before (`native`).

    Shapes are TransformerLens': rot_q, z [B, T, H, D]; rot_k, v [B, T, K, D]; scores, pattern [B, H, T, S]. `handles`
    are the wrapper's hooks on modules of this layer; `hooks_now` tells which hooks are attached to its hook points.
    `chunk` is how many positions a chunk has, where the layer attends in chunks. `scoring` is that of the forward pass
    under way, from before its first hook on. `kept` are the seam's own arguments of a layer that keeps them from its
    attention. `earlier` are the rotated keys and the values of what was read before the positions of a pass that reads
    on; without them a pass reads a window from its start.
    """

    native: str
    handles: list[RemovableHandle] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[Float[Tensor, "1 K n D"], ...] = ()
    hooks_now: Callable[[], tuple[int, ...]] = tuple
    chunk: int | None = None
    scoring: Scoring | None = None
    hook_rot_q: HookPoint = field(default_factory=HookPoint)
    hook_rot_k: HookPoint = field(default_factory=HookPoint)
    hook_v: HookPoint = field(default_factory=HookPoint)
    hook_z: HookPoint = field(default_factory=HookPoint)
    hook_attn_scores: HookPoint = field(default_factory=HookPoint)
    hook_pattern: HookPoint = field(default_factory=HookPoint)

    def keep_arguments(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook before a layer: keep what the layer was told for the seam."""
        names = ("document_bounds", "tail", "hooks_of_forward", "window_length")
        self.kept = {name: kwargs.get(name) for name in names}


@dataclass(frozen=True)
class Tail:
    """Which part of a window is read, where another run has read the rest: the ends of some documents.

    A segment (start, first, end) is a document from `start` to `end` of which the positions from `first` on are read;
    the read positions lie end to end in q, k and v. `earlier` are the keys and values of the other run, over the whole
    window; without them every document is read from its start.
    """

    segments: Sequence[tuple[int, int, int]]
    earlier: tuple[Float[Tensor, "1 K T D"], ...] = ()


def attach(model: PreTrainedModel, kernel: str, seams: Sequence[Seam]) -> None:
    """Route every attention layer of `model` through its seam with this kernel.

    Raises InputError for an unknown kernel, one whose package is missing, or one the model does not support.
    """
    if kernel not in KERNELS:
        raise InputError(f"attention kernel {kernel!r} is unknown; known are {', '.join(KERNELS)}")
    if kernel.startswith("flash"):
        _require_flash(model, kernel)
    if is_hooked(model):
        detach(model)
    model.set_attn_implementation(_NAMES[kernel])
    for module, seam in zip(attention_modules(model), seams, strict=True):
        if not getattr(module, "is_causal", True):
            raise InputError(f"{model.config.model_type} attends in both directions; rope_probe reads causal models")
        module.rope_probe_seam = seam


def _require_flash(model: PreTrainedModel, kernel: str) -> None:
    if model.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"attention kernel {kernel!r} runs in float16 and bfloat16, but the model is {model.dtype}")
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        raise InputError(f"attention kernel {kernel!r} cannot run here: {error}; 'sdpa' runs everywhere") from error


def native_kernel(model: PreTrainedModel) -> str:
    """The attention implementation `model` runs, or ran before the seam took over."""
    seam = _seam_of(attention_modules(model)[0])
    return model.config._attn_implementation if seam is None else seam.native


def detach(model: PreTrainedModel) -> None:
    """Give `model` back the attention it had, and take the wrapper's hooks off it; undoes `attach`.

    An implementation that was set since stays.
    """
    if model.config._attn_implementation in _NAMES.values():
        model.set_attn_implementation(native_kernel(model))
    for module in attention_modules(model):
        seam = _seam_of(module)
        if seam is not None:
            for handle in seam.handles:
                handle.remove()
            del module.rope_probe_seam


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` without seams or a wrapper's hooks; `model` stays as it is."""
    replaced: dict[int, Any] = {}  # of what is not to be copied: the hook points, with the user's own hooks on them
    for module in attention_modules(model):
        seam = _seam_of(module)
        if seam is not None:
            replaced[id(seam.hooks_now)] = tuple
            replaced |= {id(point): HookPoint() for point in vars(seam).values() if isinstance(point, HookPoint)}
            for handle in seam.handles:
                hooks = handle.hooks_dict_ref() or {}
                replaced[id(hooks.get(handle.id))] = _no_hook
    copied = copy.deepcopy(model, replaced)
    if is_hooked(copied):
        detach(copied)
    return copied


def _no_hook(*args: Any, **kwargs: Any) -> None:
    """Stands for a hook that is not copied."""


def is_hooked(model: PreTrainedModel) -> bool:
    """Whether the model's attention has seams."""
    return _seam_of(attention_modules(model)[0]) is not None


def belongs_to(model: PreTrainedModel, seams: Sequence[Seam]) -> bool:
    """Whether the seams of the model's attention are these: not after `detach`, nor after another `attach`."""
    return _seam_of(attention_modules(model)[0]) is seams[0]


def is_attached(model: PreTrainedModel, seams: Sequence[Seam]) -> bool:
    """Whether every layer's attention runs through these seams: not after `set_attn_implementation` either."""
    return all(
        _seam_of(module) is seam and module.config._attn_implementation in _NAMES.values()
        for module, seam in zip(attention_modules(model), seams, strict=True)
    )


def _seam_of(module: Any) -> Seam | None:
    return getattr(module, "rope_probe_seam", None)


def _attend(
    kernel: str,
    module: Any,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K T D"],
    value: Float[Tensor, "B K T D"],
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    document_bounds: list[int] | None = None,
    tail: "Tail | None" = None,
    hooks_of_forward: tuple[int, ...] | None = None,
    window_length: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H D"], None]:
    seam = module.rope_probe_seam
    if seam.kept:
        document_bounds, tail, hooks_of_forward, window_length = seam.kept.values()
    if attention_mask is not None:
        raise InputError("a 4D attention mask cannot pass the seam; say where documents end with cu_seqlens")
    if hooks_of_forward is not None and hooks_of_forward != seam.hooks_now():
        raise InputError(
            "gradient checkpointing computes this layer again, with other hooks than in the forward pass; call "
            "backward() where the hooks are still attached"
        )
    if unknown := unknown_arguments(kwargs):
        raise InputError(
            f"attention of a {module.config.model_type} model is given {unknown[0]}, which the seam does not know"
        )
    if kernel.startswith("flash") and kwargs.get("s_aux") is not None:
        raise InputError(f"attention kernel {kernel!r} runs without sinks here, and this model has them; use 'sdpa'")
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    bounds = None if document_bounds is None else tuple(document_bounds)
    seam.scoring = Scoring(
        kwargs["scaling"], kwargs.get("softcap"), sliding_window, bounds, kwargs.get("s_aux"), seam.chunk
    )
    length = query.shape[2]
    if seam.earlier:
        before = seam.earlier[0].shape[2]
        tail = Tail([(0, before, before + length)], seam.earlier)
    query = _at_its_temperature(module, query, tail, window_length)
    if seam.chunk is not None and tail is not None:
        tail = dataclasses.replace(tail, segments=_in_chunks(tail.segments, seam.chunk))
    elif seam.chunk is not None and length > seam.chunk:
        documents = [(start, start, end) for start, end in pairwise(document_bounds or (0, length))]
        document_bounds = [0, *(end for _, _, end in _in_chunks(documents, seam.chunk))]
    query = seam.hook_rot_q(query.transpose(1, 2)).transpose(1, 2)
    key = seam.hook_rot_k(key.transpose(1, 2)).transpose(1, 2)
    value = seam.hook_v(value.transpose(1, 2)).transpose(1, 2)
    kwargs.pop("position_ids", None)  # flash attention would infer documents from it
    if tail is not None:
        z = _by_segment(_kernel_of(kernel, module, sliding_window, kwargs), query, key, value, tail)
    elif kernel.startswith("flash"):
        z = _flash(kernel, module, query, key, value, document_bounds, sliding_window, kwargs)
    elif kernel == "eager":
        z = _eager(seam, query, key, value, _full_mask(query, document_bounds, sliding_window), kwargs)
    elif document_bounds is None:
        z = _kernel_of(kernel, module, sliding_window, kwargs)(query, key, value)
    else:
        whole = Tail([(start, start, end) for start, end in pairwise(document_bounds)])
        z = _by_segment(_kernel_of(kernel, module, sliding_window, kwargs), query, key, value, whole)
    return seam.hook_z(z), None


def chunk_bounds(start: int, end: int, chunk: int | None) -> list[int]:
    """Where the chunks of a document from `start` to `end` begin, and `end`; without chunks it is one."""
    return [start, end] if chunk is None else [*range(start, end, chunk), end]


def _in_chunks(segments: Sequence[tuple[int, int, int]], chunk: int) -> list[tuple[int, int, int]]:
    """Segments (see `Tail`) cut where chunks end; they read the same positions in the same order."""
    return [
        (low, max(low, first), high)
        for start, first, end in segments
        for low, high in pairwise(chunk_bounds(start, end, chunk))
        if first < high
    ]


def _at_its_temperature(module: Any, query: Tensor, tail: Tail | None, window_length: int | None) -> Tensor:
    """Queries with the temperature of their positions in the window, where the layer has one that rises with them.

    Llama 4's layers without RoPE count positions from the first that they are given. That is right for a whole window,
    but neither for a part of one nor for windows laid end to end.
    """
    by_position = getattr(module, "attn_temperature_tuning", False) and not module.use_rope
    if not by_position or (tail is None and window_length is None):
        return query

    def temperature(positions: Tensor) -> Tensor:  # as transformers computes it
        return torch.log1p(torch.floor((positions.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    counted = torch.arange(query.shape[2], device=query.device)
    positions = counted if window_length is None else counted % window_length
    if tail is not None:
        positions = torch.cat([torch.arange(first, end) for _, first, end in tail.segments]).to(query.device)
    return (query * (temperature(positions) / temperature(counted)).unsqueeze(-1)).to(query.dtype)


def _flash(
    kernel: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int] | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    batch, _, length, _ = query.shape
    documents: dict[str, Any] = {}
    if bounds is None:
        states = [rearrange(x, "b h t d -> b t h d") for x in (query, key, value)]
    else:  # the batch becomes one long window of batch x documents
        states = [rearrange(x, "b h t d -> 1 (b t) h d") for x in (query, key, value)]
        ends = length * torch.arange(batch).unsqueeze(1) + torch.tensor(bounds[1:])
        cu_seqlens = torch.tensor([0, *ends.flatten().tolist()], dtype=torch.int32, device=query.device)
        longest = max(end - start for start, end in pairwise(bounds))
        documents = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        documents |= {"max_length_q": longest, "max_length_k": longest}
    device = query.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    z = _flash_attention_forward(
        *states,
        None,
        query_length=states[0].shape[1],
        is_causal=True,
        dropout=kwargs.get("dropout", 0.0),
        softmax_scale=kwargs["scaling"],
        sliding_window=sliding_window,
        softcap=kwargs.get("softcap"),
        target_dtype=autocast,
        attn_implementation=kernel,
        **documents,
    )
    return z.reshape(batch, length, *z.shape[2:])


def _kernel_of(name: str, module: Any, sliding_window: int | None, kwargs: dict[str, Any]) -> Kernel:
    """Causal attention over one document: of its last positions, or all of them, to the whole of it."""
    exact = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None

    def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _eager(None, query, key, value, mask, kwargs)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = mask if mask is None else mask[None, None]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)[0]

    run = eager if exact or name == "eager" else sdpa

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name.startswith("flash"):
            return _flash(name, module, query, key, value, None, sliding_window, kwargs)
        queries, keys = query.shape[2], key.shape[2]
        window = None if sliding_window is None or sliding_window >= keys else sliding_window
        if window is None and queries == keys and (run is sdpa or queries <= QUERY_BLOCK):
            return run(query, key, value, None)
        return torch.cat(
            [
                run(query[:, :, rows], key[:, :, seen], value[:, :, seen], mask)
                for rows, seen, mask in _query_blocks(queries, keys, window, query.device)
            ],
            dim=1,
        )

    return attend


def _eager(
    seam: Seam | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scores = query @ key.transpose(-1, -2) * kwargs["scaling"]  # [B, H, T, S]
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    mask = _causal(query.shape[2], key.shape[2], query.device) if mask is None else mask
    scores = scores.masked_fill(~mask, float("-inf"))
    if seam is not None:
        scores = seam.hook_attn_scores(scores)
    sinks = kwargs.get("s_aux")
    if sinks is None:
        pattern = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    else:
        of_sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)  # [B, H, T, 1]
        scores = torch.cat([scores, of_sinks], -1)
        pattern = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        pattern = pattern[..., :-1]
    if seam is not None:
        pattern = seam.hook_pattern(pattern)
    pattern = nn.functional.dropout(pattern, kwargs.get("dropout", 0.0), training=kwargs.get("dropout", 0.0) > 0)
    return (pattern @ value).transpose(1, 2).contiguous()


def _by_segment(attend: Kernel, query: Tensor, key: Tensor, value: Tensor, tail: Tail) -> Tensor:
    """Attention inside each document; segments of one shape run together as a batch."""
    alike = defaultdict(list)
    read = 0
    for start, first, end in tail.segments:
        alike[first - start, end - first].append((start, read))
        read += end - first
    batch, heads, length, _ = query.shape
    z = query.new_empty(batch, length, heads, value.shape[-1])
    for (before, size), places in alike.items():
        starts, reads = torch.tensor(places, device=query.device).unsqueeze(-1).unbind(1)
        rows = reads + torch.arange(size, device=query.device)  # [segments, size]
        stacked = [_stack(x, rows) for x in (query, key, value)]
        if before:
            skipped = starts + torch.arange(before, device=query.device)
            for i, x in enumerate(tail.earlier, start=1):
                stacked[i] = torch.cat([_stack(x.expand(batch, -1, -1, -1), skipped), stacked[i]], 2)
        z[:, rows] = rearrange(attend(*stacked), "(b n) t h d -> b n t h d", b=batch)
    return z


def _stack(x: Tensor, rows: Tensor) -> Tensor:
    return rearrange(x[:, :, rows], "b h n t d -> (b n) h t d")


def _query_blocks(
    queries: int, keys: int, sliding_window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    before = keys - queries
    for start in range(0, queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries)
        first = 0 if sliding_window is None else max(0, before + start - sliding_window + 1)
        mask = _causal(end - start, before + end - first, device, sliding_window)
        yield slice(start, end), slice(first, before + end), mask


def _causal(queries: int, keys: int, device: torch.device, sliding_window: int | None = None) -> Tensor:
    """Boolean [queries, keys], true where a query may look; the last query stands at the last key."""
    reach = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    return (reach >= 0) if sliding_window is None else (reach >= 0) & (reach < sliding_window)


def _full_mask(query: Tensor, bounds: list[int] | None, sliding_window: int | None) -> Tensor:
    length = query.shape[2]
    mask = _causal(length, length, query.device, sliding_window)
    if bounds is not None:
        sizes = torch.tensor(bounds).diff()
        document = torch.arange(len(sizes)).repeat_interleave(sizes).to(query.device)
        mask &= document.unsqueeze(1) == document
    return mask


def _no_mask(*, attention_mask: Tensor | None = None, q_length: int, kv_length: int, **kwargs: Any) -> None:
    if attention_mask is not None and not attention_mask.all():
        raise InputError("a padding mask cannot pass the seam; pack documents and give cu_seqlens")
    if q_length != kv_length:
        raise InputError(f"the seam reads whole windows, but {q_length} queries met {kv_length} cached keys")


for _kernel in KERNELS:
    AttentionInterface.register(_NAMES[_kernel], partial(_attend, _kernel))
    AttentionMaskInterface.register(_NAMES[_kernel], _no_mask)
