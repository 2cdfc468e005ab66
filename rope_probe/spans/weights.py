"""How the weights of two checkpoints differ, by layer, head and rotary pair: tensor by tensor, in blocks.

A pair's two rows of W_Q (or W_K), r and s, make one complex row w = r + i s: turning the pair's plane by an angle is
multiplying w by e^(i angle), which is also what shifting the position of q does. Products of w before and after tell
change, cosine and that angle; biases count as one more column.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.models.architectures import architecture_of, layers_of, rotary_layers
from rope_probe.models.parameters import ATTENTION, Projection, norms_around, part_of, projections_of
from rope_probe.runs.tables import Metric, declare
from rope_probe.spans.parts import site_of
from rope_probe.spans.stored import Model, Weights, require_alike, require_same_pairs, resolved, weights_of

_BLOCK = 2**20
Sums = dict[str, Tensor]
_OF_ALL = {
    "change_norm": Metric("Frobenius norm of the change"),
    "rel_change": Metric("that norm over the norm before"),
    "cosine": Metric("cosine of before and after"),
    "norm_change": Metric("norm after over norm before, less 1"),
}
_OF_PAIRS = {
    "rotation_radians": Metric("the turn of the pair's plane that fits the change best", "radians"),
    "unrotated_rel_change": Metric("relative change that is left when that turn is undone"),
    "qk_rel_change": Metric("relative change of the pair's attention scores"),
    "qk_rotation_radians": Metric("turn of the pair's attention scores", "radians"),
}
SPANS = declare(
    "spans",
    "How much each part of the weights changed between two checkpoints. Rows without a head are of the whole part, "
    "rows without a pair of the whole head.",
    ("layer", "site", "head", "pair", "wavelength", "wavelength_after"),
    {
        **_OF_ALL,
        **_OF_PAIRS,
        "rotation_tokens": Metric("`rotation_radians` as a move of position, at the wavelength after", "tokens"),
        "top_singular_share": Metric("share of the change's squared norm in its first singular direction"),
        "participation_rank": Metric("(sum s^2)^2 / sum s^4 over the singular values s of the change"),
        "top_direction_share": Metric("the pair's share of that first singular direction"),
        "log2_ratio": Metric("how much more a span changed in one comparison than in another", "doublings"),
        **{
            f"effective_{name}": Metric(f"{metric.meaning}, of the weights with norms folded in", metric.unit)
            for name, metric in {**_OF_ALL, **_OF_PAIRS}.items()
        },
    },
)


def compare_spans(before: Model, after: Model, *, progress: Callable[[int], Any] | None = None) -> pd.DataFrame:
    """How much each part of the weights changed from one checkpoint to another of the same architecture.

    A model is a folder, a hub id, a name, a GGUF file or a model in memory; `after` may be the folder of a PEFT adapter
    for `before`. Checkpoints in safetensors files are read tensor by tensor, and are never whole in memory.

    Rows of the tidy frame, by `site` (`blocks.{i}.attn.W_Q|W_K|W_V|W_O`, `blocks.{i}.mlp`, `blocks.{i}.ln`, `ln_final`,
    `embed.W_E`, `unembed.W_U`):

    - of every part: `change_norm` (Frobenius norm of after - before), `rel_change` (over the norm before), `cosine`,
      `norm_change` (norm after over norm before, less 1). In W_Q, W_K, W_V, W_O by head too, and in W_Q and W_K by
      `pair`, with its `wavelength` before and `wavelength_after`, in tokens;
    - of a head: `top_singular_share` (share of the change's squared norm in its first singular direction) and
      `participation_rank`, (sum s^2)^2 / sum s^4 over its singular values s;
    - of a pair: `rotation_radians`, the turn of its plane that fits the change best, the same as the query's (or key's)
      position moved on by `rotation_tokens` at the wavelength after; `unrotated_rel_change`, the relative change that
      is left when that turn is undone; `top_direction_share`, the pair's share of that first singular direction;
    - of a pair of W_Q: `qk_rel_change` and `qk_rotation_radians`, change and turn of the pair's attention scores as
      a function of two residual streams (the outer product of its rows in W_Q and W_K), in which a turn or scaling
      of q that k undoes does not show;
    - the same of the effective weights, `effective_` before a metric's name: what multiplies the normalised residual
      stream, with gain and bias of the norm before it folded in, and the gain of a norm of q and k.

    Sums are taken in float32 where both store 16 bits, in float64 else; what cancels only in the scores is then left at
    1e-3 or 1e-8 of them. `progress` is called with the elements just read. Raises InputError for checkpoints of
    different architecture or shape, for what `weights_of` refuses, and for weights that are not finite, naming the
    tensor.
    """
    one, other = weights_of(before, "before"), weights_of(resolved(after, before), "after")
    require_alike(one.model.config, other.model.config)
    require_same_pairs(rotary_layers(one.model), rotary_layers(other.model))
    _require_same_tensors(one, other)
    compared = _Comparison(one, other, progress or (lambda count: None))
    frames = [compared.layer(layer) for layer in range(len(layers_of(one.model)))]
    return SPANS.frame(pd.concat([*frames, compared.whole_tensors()], ignore_index=True))


def _require_same_tensors(before: Weights, after: Weights) -> None:
    for one, other in ((before, after), (after, before)):
        if lost := sorted(set(one.names) - set(other.names)):
            raise InputError(f"{other.label} has no tensor {lost[0]!r}, which {one.label} has")


class _Comparison:
    def __init__(self, before: Weights, after: Weights, progress: Callable[[int], Any]) -> None:
        self.before, self.after, self.progress = before, after, progress
        self.gain_offset = architecture_of(before.model.config).gain_offset
        mine, theirs = projections_of(before.model), projections_of(after.model)
        self.projections = {(one.part, one.layer): one for one in mine}
        self.rotary_after = {one.layer: one.rotary for one in theirs if one.rotary is not None}
        self.parts = [(name, *part_of(before.model, name)) for name in before.names]

    def layer(self, layer: int) -> pd.DataFrame:
        """W_Q, W_K, W_V and W_O of a layer."""
        frames, complex_sums = [], {}
        for part in ATTENTION:
            projection = self.projections[part, layer]
            sums, complex_sums[part] = self._projection(projection)
            bias = self._tensor(projection.bias) if part == "W_O" and projection.bias else None
            frames += list(_head_rows(projection, sums, bias))
            if len(projection.pairs):
                frames += self._pair_rows(projection, sums, complex_sums[part])
        query = self.projections["W_Q", layer]
        if len(query.pairs):
            frames.append(self._score_rows(query, complex_sums["W_Q"], complex_sums["W_K"]))
        return pd.concat(frames, ignore_index=True)

    def whole_tensors(self) -> pd.DataFrame:
        """Every other tensor, those of one part and layer together."""
        totals: dict[tuple, Sums] = {}
        for name, part, layer in self.parts:
            if part is None:
                continue
            sums = self._tensor(name, gain=part == "norms" and name.endswith(".weight"))
            kept = totals.setdefault((part, layer), dict.fromkeys(sums, torch.zeros((), dtype=torch.float64)))
            totals[part, layer] = {key: kept[key] + value for key, value in sums.items()}
        rows = [
            _rows({"site": site_of(part, layer), "layer": layer}, {k: v[None] for k, v in _measures(sums).items()})
            for (part, layer), sums in totals.items()
        ]
        return pd.concat(rows, ignore_index=True)

    def _tensor(self, name: str, *, gain: bool = False) -> Sums:
        """Sums of a whole tensor; the weight of a norm, a `gain`, as what it multiplies by."""
        offset = self.gain_offset if gain else 0.0
        sums = torch.zeros(4, dtype=torch.float64)
        with self.before.read(name) as x, self.after.read(name) as y:
            _require_same_shape(name, x, y)
            wide = _wide(x, y)
            for a, b in zip(x.flatten().split(_BLOCK), y.flatten().split(_BLOCK), strict=True):
                p, q = a.to(wide) + offset if offset else a.to(wide), b.to(wide) + offset if offset else b.to(wide)
                d = q - p
                sums += torch.stack([p.dot(p), q.dot(q), d.dot(d), p.dot(d)])
                if not sums.isfinite().all():
                    self._require_finite(name, p, q)
            self.progress(x.numel())
        return dict(zip(("before", "after", "change", "moved"), sums, strict=True))

    def _projection(self, projection: Projection) -> tuple[Sums, Sums]:
        """Sums by [head, dimension], and by [head, pair] as complex numbers; raw, and effective where it has pairs."""
        sums: list[Sums] = []
        paired: list[Sums] = []
        with ExitStack() as stack:
            x, y = (stack.enter_context(weights.read(projection.weight)) for weights in (self.before, self.after))
            _require_same_shape(projection.weight, x, y)
            wide = _wide(x, y)
            output = projection.part == "W_O"
            bias = None if output else projection.bias
            biases = [self._read_small(weights, bias) for weights in (self.before, self.after)]
            if bias is not None:
                self._require_finite(bias, *biases)
            heads, head_dim = projection.index.shape
            width = x.shape[0] if output else x.shape[1]
            step = max(1, _BLOCK // (head_dim * width))
            rotates = len(projection.pairs) > 0
            gains = [self._gains(weights, projection) for weights in (self.before, self.after)] if rotates else []
            for start in range(0, heads, step):
                index = projection.index[start : start + step]
                p, q = (
                    _block(tensor, shift, index, output, wide) for tensor, shift in zip((x, y), biases, strict=True)
                )
                self._require_finite(projection.weight, p, q)
                of_block = _by_dimension(p, q)
                pairs = _by_pair(p, q, projection.pairs)
                if rotates:
                    pairs["top_direction"] = of_block["direction"][:, projection.pairs].sum(-1)
                    p, q = (
                        _effective(block, gain, slice(start, start + step))
                        for block, gain in zip((p, q), gains, strict=True)
                    )
                    folded = _by_pair(p, q, projection.pairs)
                    pairs |= {f"effective_{key}": value for key, value in folded.items()}
                sums.append(of_block)
                paired.append(pairs)
            self.progress(heads * head_dim * width)
        return _joined(sums), _joined(paired)

    def _read_small(self, weights: Weights, name: str | None) -> Tensor | None:
        if name is None:
            return None
        with weights.read(name) as values:
            return values.clone()

    def _gains(self, weights: Weights, projection: Projection) -> "_Gains":
        before, after = norms_around(weights.model, projection)
        present = set(weights.names)

        def read(name: str) -> Tensor | None:
            return self._read_small(weights, name) if name in present else None

        rows = read(f"{after}.weight")
        columns = read(f"{before}.weight") if before else None
        shift = read(f"{before}.bias") if before else None
        if rows is not None:
            heads, head_dim = projection.index.shape
            rows = (rows.double() + self.gain_offset).flatten().view(-1, head_dim).expand(heads, -1)
        return _Gains(rows, None if columns is None else columns.double() + self.gain_offset, shift)

    def _pair_rows(self, projection: Projection, sums: Sums, pairs: Sums) -> list[pd.DataFrame]:
        rotary_after = self.rotary_after[projection.layer]
        frequency = rotary_after.inv_freq
        measures = _measures(pairs)
        total = sums["direction"].sum(-1, keepdim=True).clamp(min=1e-300)
        turn = (pairs["before"] + pairs["moved"]).angle()
        measures["rotation_radians"] = turn
        measures["rotation_tokens"] = turn / frequency
        measures["unrotated_rel_change"] = _unrotated(pairs)
        measures["top_direction_share"] = pairs["top_direction"] / total
        folded = {key.removeprefix("effective_"): value for key, value in pairs.items() if key.startswith("effective_")}
        effective = _measures(folded) | {"rotation_radians": (folded["before"] + folded["moved"]).angle()}
        measures |= {f"effective_{key}": value for key, value in effective.items()}
        return [_rows(self._at(projection, measures["rel_change"].shape), measures)]

    def _score_rows(self, projection: Projection, query: Sums, key: Sums) -> pd.DataFrame:
        """Change of the complex outer product conj(w_k) w_q^T: conj(dw_k) w_q'^T + conj(w_k) dw_q^T, by its factors."""
        shared = len(query["before"]) // len(key["before"])
        measures: dict[str, Tensor] = {}
        for prefix in ("", "effective_"):
            q = {name: query[prefix + name] for name in ("before", "after", "change", "moved")}
            k = {name: key[prefix + name].repeat_interleave(shared, 0) for name in q}
            before = q["before"] * k["before"]
            crossed = k["moved"] * (q["moved"] + q["change"])
            change = k["change"] * q["after"] + k["before"] * q["change"] + 2 * crossed.real
            product = (q["before"] + q["moved"]) * (k["before"] + k["moved"]).conj()
            measures[f"{prefix}qk_rel_change"] = _ratio(change.clamp(min=0), before).sqrt()
            measures[f"{prefix}qk_rotation_radians"] = product.angle()
        return _rows(self._at(projection, before.shape), measures)

    def _at(self, projection: Projection, shape: torch.Size) -> dict[str, Any]:
        """Columns of rows by head and pair."""
        heads, pairs = shape
        assert projection.rotary is not None  # it has pairs
        lengths = [
            np.tile(rope.wavelengths(rotary.inv_freq).numpy(), heads)
            for rotary in (projection.rotary, self.rotary_after[projection.layer])
        ]
        return {
            "site": projection.site,
            "layer": projection.layer,
            "head": np.repeat(np.arange(heads), pairs),
            "pair": np.tile(np.arange(pairs), heads),
            "wavelength": lengths[0],
            "wavelength_after": lengths[1],
        }

    def _require_finite(self, name: str, x: Tensor | None, y: Tensor | None) -> None:
        for weights, values in ((self.before, x), (self.after, y)):
            if values is not None and not torch.linalg.vector_norm(values).isfinite():
                raise InputError(f"tensor {name!r} of {weights.label} holds values that are not finite, or too large")


class _Gains(NamedTuple):
    """What rows are multiplied by (norm of q or k, [H, D]), columns (norm before them, [M]), and that norm's bias."""

    rows: Tensor | None
    columns: Tensor | None
    shift: Tensor | None


def _wide(x: Tensor, y: Tensor) -> torch.dtype:
    """What sums are taken in."""
    return torch.float32 if {x.dtype, y.dtype} <= {torch.bfloat16, torch.float16} else torch.float64


def _block(
    weight: Tensor, bias: Tensor | None, index: Tensor, transposed: bool, wide: torch.dtype
) -> Float[Tensor, "h D M"]:
    """Some heads of a weight in the dtype that sums are taken in, with their bias as one more column."""
    flat = index.flatten()
    contiguous = bool(flat[-1] - flat[0] + 1 == len(flat))
    start, stop = int(flat[0]), int(flat[-1]) + 1
    if transposed:
        rows = weight[:, start:stop].T if contiguous else weight[:, flat].T
    else:
        rows = weight[start:stop] if contiguous else weight[flat]
    block = rows.to(wide)
    if bias is not None:
        block = torch.cat([block, bias[flat].to(wide).unsqueeze(1)], 1)
    return block.reshape(*index.shape, -1)


def _effective(block: Float[Tensor, "h D M"], gains: _Gains, heads: slice) -> Float[Tensor, "h D N"]:
    """The rows that act on the normalised residual stream: gains folded in, and what the norm's bias adds to theirs."""
    rows, columns, shift = (None if gain is None else gain.to(block.dtype) for gain in gains)
    folded = block
    if columns is not None:
        weight, bias = block[..., : len(columns)], block[..., len(columns) :]
        if shift is not None:
            added = (weight @ shift).unsqueeze(-1)
            bias = added + bias if bias.shape[-1] else added
        folded = torch.cat([weight * columns, bias], -1)
    return folded if rows is None else folded * rows[heads].unsqueeze(-1)


def _by_dimension(x: Float[Tensor, "h D M"], y: Float[Tensor, "h D M"]) -> Sums:
    """Per head: squared norms and products of each row, and the first left singular direction of the change."""
    change = y - x
    gram = torch.bmm(change, change.mT).double()
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    largest = values[:, -1:]
    return {
        "before": torch.linalg.vector_norm(x, dim=-1).double().square(),
        "after": torch.linalg.vector_norm(y, dim=-1).double().square(),
        "change": gram.diagonal(dim1=-2, dim2=-1),
        "moved": _products(x, change),
        "direction": vectors[..., -1].square() * (largest > 0),
        "singular": torch.cat([largest, values.sum(-1, keepdim=True), values.square().sum(-1, keepdim=True)], -1),
    }


def _products(x: Float[Tensor, "h D M"], y: Float[Tensor, "h D M"]) -> Float[Tensor, "h D"]:
    """x . y of every row, two rows to a matrix product where they are even, which is what processors do fast."""
    heads, head_dim, width = x.shape
    if head_dim % 2:
        return (x * y).sum(-1).double()
    twos = (heads * head_dim // 2, 2, width)
    return torch.bmm(x.reshape(twos), y.reshape(twos).mT).diagonal(dim1=-2, dim2=-1).reshape(heads, head_dim).double()


def _by_pair(x: Float[Tensor, "h D M"], y: Float[Tensor, "h D M"], pairs: Tensor) -> Sums:
    """Per head and pair, of complex rows: squared norms before, after and of the change, and `moved`, <before, change>.

    <before, after> is `before` + `moved`; it is not summed itself, so that no change is exactly none.
    """
    heads, _, width = x.shape
    members = pairs.flatten()
    first, second = (part[:, members].view(-1, 2, width) for part in (x, y))
    change = second - first
    shape = (heads, len(pairs))
    product = torch.bmm(first, change.mT).double()
    real = (product[:, 0, 0] + product[:, 1, 1]).view(shape)
    imaginary = (product[:, 0, 1] - product[:, 1, 0]).view(shape)

    def square(part: Tensor) -> Tensor:
        return torch.linalg.vector_norm(part, dim=(1, 2)).double().square().view(shape)

    return {
        "before": square(first),
        "after": square(second),
        "change": square(change),
        "moved": torch.complex(real, imaginary),
    }


def _measures(sums: Sums) -> dict[str, Tensor]:
    before, after = sums["before"], sums["after"]
    return {
        "change_norm": sums["change"].sqrt(),
        "rel_change": _ratio(sums["change"], before).sqrt(),
        "cosine": (before + sums["moved"].real) / (before * after).sqrt(),
        "norm_change": torch.where(after == before, torch.zeros_like(after), (after / before).sqrt() - 1),
    }


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """A share that is 0 where there is nothing of it, whatever the whole."""
    return torch.where(part == 0, torch.zeros_like(part), part / whole)


def _unrotated(pairs: Sums) -> Tensor:
    """Relative change with the best turn undone, from |after|^2 + |before|^2 - 2 |<before, after>|."""
    product = pairs["before"] + pairs["moved"]
    turned_away = 2 * (product.abs() - product.real)
    return _ratio((pairs["change"] - turned_away).clamp(min=0), pairs["before"]).sqrt()


def _head_rows(projection: Projection, sums: Sums, bias: Sums | None) -> Iterator[pd.DataFrame]:
    """Rows of the whole projection, with the bias that belongs to no head, and of each head."""
    additive = {key: sums[key] for key in ("before", "after", "change", "moved")}
    columns = {"site": projection.site, "layer": projection.layer}
    whole = {key: value.sum() + (0 if bias is None else bias[key]) for key, value in additive.items()}
    yield _rows(columns, _measures({key: value[None] for key, value in whole.items()}))
    by_head = _measures({key: value.sum(-1) for key, value in additive.items()})
    largest, total, fourth = sums["singular"].unbind(-1)
    by_head["top_singular_share"] = _ratio(largest, total)
    by_head["participation_rank"] = _ratio(total.square(), fourth)
    yield _rows({**columns, "head": np.arange(len(largest))}, by_head)


def _rows(columns: dict[str, Any], measures: dict[str, Tensor]) -> pd.DataFrame:
    """Long rows: the same columns for every metric."""
    frames = [
        pd.DataFrame({**columns, "metric": metric, "value": values.flatten().numpy()})
        for metric, values in measures.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _joined(parts: Iterable[Sums]) -> Sums:
    parts = list(parts)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _require_same_shape(name: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise InputError(f"tensor {name!r} is {list(x.shape)} before and {list(y.shape)} after")
