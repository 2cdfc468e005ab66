"""The trace engine: how a perturbation of position travels through the layers to the logits.

- Clean and perturbed passes are rows of one batch; the deltas are reduced to a number per position inside the hooks,
  where they arise, so no activation outlives its layer. Logits are taken in blocks of positions.
- Every number can carry its float64 control, `value_float64`: the same measurement with all arithmetic in float64.
  What the control brings down, to a thousandth or to float64's own rounding, is rounding; what stays is real.

Metrics, each taken per position and then averaged (a: clean, b: perturbed vector at a site, heads side by side):

    l2               |b - a|
    rel_l2           |b - a| / |a|
    cosine_distance  1 - cos(a, b), computed as |a/|a| - b/|b||^2 / 2, which does not cancel
    kl_nats          KL(softmax a || softmax b), logits only
    top1_flips       share of positions whose most likely token changes, logits only
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM
from rope_probe.packing import Window
from rope_probe.perturbations import Perturbation, Selection
from rope_probe.results import tidy

LOGITS = "logits"
LAYER_SITES = ("attn.hook_rot_q", "attn.hook_rot_k", "hook_attn_out", "hook_resid_post")
ROUNDING_SHARE = 1e-3
"""A delta is rounding where float64 leaves less than this share of it ..."""
ROUNDING_FLOOR = {"l2": 1e-10, "rel_l2": 1e-10, "cosine_distance": 1e-20, "kl_nats": 1e-20}
"""... or less than this, the most that float64's own rounding makes of nothing."""

By = Literal["position", "document", "window"]
Deltas = dict[str, Float[Tensor, " T"]]
_LOGIT_BLOCK_ELEMENTS = 2**23


def trace(
    model: HookedCausalLM,
    window: Window,
    perturbations: Perturbation | Iterable[Perturbation],
    *,
    sites: Sequence[str] | None = None,
    masked: bool = False,
    control: bool | None = None,
    by: By = "document",
    rows: int = 4,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Deltas (perturbed minus clean) at every site, for every perturbation; a tidy frame.

    `sites` are hook names, and "logits" (default: rotated q and k, attention output and residual stream of every layer,
    and the logits). `masked` keeps attention inside documents. `by` says what a row is averaged over: each position,
    each document, or the whole window. `control` measures everything again in float64 beside it; by default where
    `masked`, the setting in which much of what is seen is rounding; it needs a float64 copy of the model in memory.
    `rows` perturbations share one batch with their clean pass. `progress` is called with the perturbations just done.

    Equals two plain forward passes to rounding. Raises InputError for an unknown site, a perturbation that does not fit
    the model (see `Perturbation.hooks`), and activations that are not finite.
    """
    perturbations = [perturbations] if isinstance(perturbations, Perturbation) else list(perturbations)
    sites = _known(model, default_sites(model) if sites is None else sites)
    measured = list(_measure(model, window, perturbations, sites, masked, rows, progress))
    for deltas in measured:
        _check_finite(model, deltas)
    frame = tidy(
        [
            {
                **_columns(perturbation, model),
                "seq_len": len(window),
                "layer": _layer(site),
                "site": site,
                "metric": metric,
                "document": document,
                "position": position,
                "value": value,
            }
            for perturbation, deltas in zip(perturbations, measured, strict=True)
            for (site, metric), values in deltas.items()
            for document, position, value in _average(values, window, by)
        ]
    )
    if control is None:
        control = masked
    if control:
        frame["value_float64"] = frame["value"]
        if model.dtype != torch.float64:
            twin = trace(
                model.double(),
                window,
                perturbations,
                sites=sites,
                masked=masked,
                control=False,
                by=by,
                rows=rows,
                progress=progress,
            )
            frame["value_float64"] = twin["value"]
    return frame


def copy_deltas(
    model: HookedCausalLM, window: Window, *, reference: int = 0, masked: bool = False, control: bool | None = None
) -> pd.DataFrame:
    """Copies of a repeated document against the first copy, at every layer: what position alone does to one content.

    `document` is the copy, `delta_tokens` how far after the first it begins; values are averaged over the document.
    Sites are those of `trace`, and `blocks.{i}.attn.unrotated_q|k`: q and k with their rotation undone, so that what is
    left between copies came in through the layers below. `reference` is the document that counts as the first copy;
    those before it may be something else. `control` as in `trace`.

    Raises InputError for a window whose documents from `reference` on are not copies of one.
    """
    length = int(window.cu_seqlens.diff()[0])
    if not (window.cu_seqlens.diff() == length).all() or not 0 <= reference < window.documents - 1:
        raise InputError(f"copies are compared in a window of {reference + 2} or more documents of one length")
    copies = window.tokens.view(-1, length)[reference:]
    if not (copies == copies[0]).all():
        raise InputError("the documents of this window are not copies of one; make it with repeated_window")
    later = range(reference + 1, window.documents)
    found: dict[tuple[str, str], Tensor] = {}

    def compare(site: str, x: Tensor) -> None:
        parts = x.view(window.documents, length, *x.shape[1:])
        per_copy = [vector_deltas(parts[reference], parts[copy]) for copy in later]
        found.update({(site, metric): torch.stack([d[metric].mean() for d in per_copy]) for metric in per_copy[0]})

    def read(x: Tensor, hook: Any) -> None:
        compare(hook.name, x[0])
        if "hook_rot_" in hook.name and (rotary := model.rotary[hook.layer()]) is not None:
            back = -torch.outer(window.position_ids[0].double(), rotary.inv_freq).unsqueeze(1).to(x.device)
            compare(
                hook.name.replace("hook_rot_", "unrotated_"), rope.rotate(x[0], back, rotary.layout, 1 / rotary.scaling)
            )

    with torch.no_grad():
        sites = [site for site in default_sites(model) if site != LOGITS]
        with model.hooks(fwd_hooks=[(site, read) for site in sites]):
            hidden = model.hidden(window, masked=masked)[0].view(window.documents, length, -1)
        blocks: list[list[Deltas]] = [[] for _ in later]
        for block in hidden[reference:].split(_logit_block(model, len(later) + 1), dim=1):
            first, *others = model.unembed(block)
            for of_copy, logits in zip(blocks, others, strict=True):
                of_copy.append(logit_deltas(first, logits))
    joined = [_concatenate(copy) for copy in blocks]
    found.update({(LOGITS, metric): torch.stack([d[metric].mean() for d in joined]) for metric in joined[0]})
    _check_finite(model, found)
    frame = tidy(
        [
            {
                "perturbation": "Copy",
                "delta_tokens": float((copy - reference) * length),
                "seq_len": len(window),
                "document": copy,
                "layer": _layer(site),
                "site": site,
                "metric": metric,
                "value": value,
            }
            for (site, metric), values in found.items()
            for copy, value in zip(later, values.tolist(), strict=True)
        ]
    )
    if masked if control is None else control:
        twin = model if model.dtype == torch.float64 else model.double()
        frame["value_float64"] = copy_deltas(twin, window, reference=reference, masked=masked, control=False)["value"]
    return frame


def attribute(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per perturbation, site and metric of a controlled trace: what is rounding and what is not.

    Columns `value` and `value_float64` (means), and `verdict`: "none" where both are zero, "rounding" where float64
    leaves less than a thousandth, "signal" otherwise. Raises InputError for a frame traced without control.
    """
    if frame["value_float64"].isna().any():
        raise InputError("this frame has no float64 control; trace with control=True")
    groups = frame.groupby(["perturbation", "side", "delta_tokens", "site", "metric"], dropna=False, sort=False)
    table = groups[["value", "value_float64"]].mean().reset_index()
    table["verdict"] = is_rounding(table).map({True: "rounding", False: "signal"})
    table.loc[(table["value"] == 0) & (table["value_float64"] == 0), "verdict"] = "none"
    return table


def is_rounding(frame: pd.DataFrame) -> pd.Series:
    """Where the float64 control leaves next to nothing: ROUNDING_SHARE, ROUNDING_FLOOR. False without a control."""
    exact, floor = frame["value_float64"].abs(), frame["metric"].map(ROUNDING_FLOOR).fillna(0.0)
    return (exact <= np.maximum(floor, ROUNDING_SHARE * frame["value"].abs())).fillna(False)


def default_sites(model: HookedCausalLM) -> list[str]:
    """Rotated q and k, attention output and residual stream of every layer, then the logits."""
    return [f"blocks.{layer}.{site}" for layer in range(len(model.blocks)) for site in LAYER_SITES] + [LOGITS]


def vector_deltas(clean: Float[Tensor, "T *shape"], perturbed: Float[Tensor, "T *shape"]) -> Deltas:
    """l2, rel_l2 and cosine_distance between two vectors at each position."""
    precise = torch.promote_types(clean.dtype, torch.float32)
    a, b = clean.flatten(1).to(precise), perturbed.flatten(1).to(precise)
    l2, a_norm, b_norm = (b - a).norm(dim=1), a.norm(dim=1), b.norm(dim=1)
    tiny = torch.finfo(precise).tiny
    unit_delta = a / a_norm.clamp_min(tiny).unsqueeze(1) - b / b_norm.clamp_min(tiny).unsqueeze(1)
    return {"l2": l2, "rel_l2": l2 / a_norm.clamp_min(tiny), "cosine_distance": unit_delta.square().sum(1) / 2}


def logit_deltas(clean: Float[Tensor, "T V"], perturbed: Float[Tensor, "T V"]) -> Deltas:
    """The metrics of `vector_deltas`, and kl_nats and top1_flips.

    KL is summed in float64 as p (e^d - 1 - d), d = log q - log p: the same number, of terms that are never negative, so
    that it holds its digits down to the square of the rounding of the logits, where -p d would cancel.
    """
    p, q = clean.double().log_softmax(-1), perturbed.double().log_softmax(-1)
    d = q - p
    excess = torch.where(d.abs() < 1e-3, d.square() * (1 / 2 + d / 6 + d.square() / 24), d.expm1() - d)
    return {
        **vector_deltas(clean, perturbed),
        "kl_nats": (p.exp() * excess).sum(-1),
        "top1_flips": (clean.argmax(-1) != perturbed.argmax(-1)).double(),
    }


def _measure(
    model: HookedCausalLM,
    window: Window,
    perturbations: list[Perturbation],
    sites: Sequence[str],
    masked: bool,
    rows: int,
    progress: Callable[[int], Any] | None,
) -> Iterator[dict[tuple[str, str], Float[Tensor, " T"]]]:
    """Per perturbation, the deltas by (site, metric) at each position."""
    hooked_sites = [site for site in sites if site != LOGITS]
    hooks = [perturbation.hooks(model, window) for perturbation in perturbations]
    for start in range(0, len(perturbations), rows):
        group = hooks[start : start + rows]
        found: list[dict[tuple[str, str], Tensor]] = [{} for _ in group]

        def read(x: Tensor, hook: Any, found: list = found) -> None:
            for row, deltas in enumerate(found, start=1):
                for metric, values in vector_deltas(x[0], x[row]).items():
                    deltas[hook.name, metric] = values.cpu()

        injections = [
            (name, partial(_on_row, turn, row)) for row, fwd in enumerate(group, start=1) for name, turn in fwd
        ]
        with torch.no_grad(), model.hooks(fwd_hooks=[*injections, *((site, read) for site in hooked_sites)]):
            hidden = model.hidden(window, masked=masked, rows=1 + len(group))
            if LOGITS in sites:
                blocks: list[list[Deltas]] = [[] for _ in group]
                for block in hidden.split(_logit_block(model, 1 + len(group)), dim=1):
                    logits = model.unembed(block)
                    for deltas, perturbed in zip(blocks, logits[1:], strict=True):
                        deltas.append(logit_deltas(logits[0], perturbed))
                for row, of_row in zip(found, blocks, strict=True):
                    row.update({(LOGITS, metric): values.cpu() for metric, values in _concatenate(of_row).items()})
        yield from found
        if progress is not None:
            progress(len(group))


def _on_row(turn: Callable[..., Tensor], row: int, x: Tensor, hook: Any) -> Tensor:
    x[row : row + 1] = turn(x[row : row + 1], hook=hook)  # in place: q and k of this row are read by no one else yet
    return x


def _logit_block(model: HookedCausalLM, rows: int) -> int:
    return max(1, _LOGIT_BLOCK_ELEMENTS // (rows * model.config.vocab_size))


def _concatenate(blocks: list[Deltas]) -> Deltas:
    return {metric: torch.cat([block[metric] for block in blocks]) for metric in blocks[0]}


def _average(values: Tensor, window: Window, by: By) -> Iterator[tuple[int | None, int | None, float]]:
    """(document, position, value) for each row of the frame."""
    values = values.double()
    if by == "position":
        yield from zip(window.document_of.tolist(), range(len(window)), values.tolist(), strict=True)
    elif by == "document":
        sums = torch.zeros(window.documents, dtype=torch.float64).index_add(0, window.document_of, values)
        for document, mean in enumerate((sums / window.cu_seqlens.diff()).tolist()):
            yield document, None, mean
    elif by == "window":
        yield None, None, values.mean().item()
    else:
        raise InputError(f"by must be 'position', 'document' or 'window', but it is {by!r}")


def _columns(perturbation: Perturbation, model: HookedCausalLM) -> dict[str, Any]:
    layer, head, pair = map(_only, (perturbation.layers, perturbation.heads, perturbation.pairs))
    rotating = [one for one in (model.rotary if layer is None else [model.rotary[layer]]) if one is not None]
    alike = all(torch.equal(one.inv_freq, rotating[0].inv_freq) for one in rotating)
    wavelength = rope.wavelengths(rotating[0].inv_freq)[pair].item() if pair is not None and alike else None
    return {
        "perturbation": str(perturbation),
        "side": perturbation.side,
        "delta_tokens": perturbation.delta_tokens,
        "inject_layer": layer,
        "head": head,
        "pair": pair,
        "wavelength": wavelength,
    }


def _only(selection: Selection) -> int | None:
    """The one index that a selection names, if it is one."""
    chosen = list(selection) if isinstance(selection, Iterable) else [selection]
    return chosen[0] if len(chosen) == 1 else None


def _check_finite(model: HookedCausalLM, deltas: dict[tuple[str, str], Tensor]) -> None:
    for (site, _), values in deltas.items():
        if not values.isfinite().all():
            weights = model.original_model.named_parameters()
            broken = next((name for name, weight in weights if not weight.isfinite().all()), None)
            why = f"weight {broken} is not finite" if broken else f"they overflow {model.dtype}; try float32"
            raise InputError(f"activations at {site} are not finite numbers: {why}")


def _layer(site: str) -> int | None:
    return int(site.split(".")[1]) if site.startswith("blocks.") else None


def _known(model: HookedCausalLM, sites: Sequence[str]) -> list[str]:
    for site in sites:
        if site.endswith(("hook_attn_scores", "hook_pattern")):
            raise InputError(f"site {site!r} is [T, T] and has no delta per position; trace hook_z instead")
        if site != LOGITS and site not in model.hook_dict:
            raise InputError(f"site {site!r} is unknown; sites are 'logits' and the names in model.hook_dict")
    return list(sites)
