"""Traces: how a perturbation of position travels through the layers to the logits, as frames of deltas.

- Deltas are reduced to a number per position where they arise (`deltas` has the metrics), so no activation outlives its
  layer; `cone` runs the passes.
- Every number can carry its float64 control, `value_float64`: the same measurement with all arithmetic in float64.
  What the control brings down, to a thousandth or to float64's own rounding, is rounding; what stays is real.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.models.architectures import final_norm_of, output_projection_of
from rope_probe.models.configs import attention_kinds
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.offloaded import is_offloaded, weights_in_place
from rope_probe.runs.progress import progress as progress_bar
from rope_probe.runs.tables import Metric, declare
from rope_probe.tracing.cone import LENS, LOGITS, lens_sites, logit_block, logit_sites, run_beside, work_of_one
from rope_probe.tracing.deltas import LOGIT_METRICS, VECTOR_METRICS, Deltas, logit_deltas, vector_deltas
from rope_probe.tracing.perturbations import Perturbation, Selection
from rope_probe.windows.packing import Window

LAYER_SITES = ("attn.hook_rot_q", "attn.hook_rot_k", "hook_attn_out", "hook_resid_post")
ROUNDING_SHARE = 1e-3
"""A delta is rounding where float64 leaves less than this share of it ..."""
ROUNDING_FLOOR = {"l2": 1e-10, "rel_l2": 1e-10, "cosine_distance": 1e-20, "kl_nats": 1e-20}
"""... or less than this, the most that float64's own rounding makes of nothing."""

COPY = "Copy"
"""The `kind` of rows that compare copies of a document; other rows have the name of their perturbation's class."""
DELTAS = declare(
    "deltas",
    "What a perturbation changes where it is read: perturbed minus clean, or copy minus first copy. Values are means "
    "over the positions of a document, or of the window.",
    (
        "arm", "seq_len", "masked", "document", "position", "perturbation", "kind", "restriction", "side",
        "delta_tokens", "radians", "factor", "inject_layer", "inject_layers", "attention", "layer", "site", "head",
        "pair", "wavelength", "value_float64",
    ),
    {
        "l2": Metric("Euclidean norm of the delta"),
        "rel_l2": Metric("that norm over the norm of the clean activation"),
        "cosine_distance": Metric("1 - cosine of clean and perturbed"),
        "kl_nats": Metric("KL(clean || perturbed) of next-token distributions", "nats"),
        "top1_flips": Metric("share of positions whose most likely token changes"),
    },
)  # fmt: skip
By = Literal["position", "document", "window"]
_STATE_ELEMENTS = 2**27


def trace(
    model: HookedCausalLM,
    window: Window | str | Tensor,
    perturbations: Perturbation | Iterable[Perturbation],
    *,
    sites: Sequence[str] | None = None,
    lens: bool = False,
    masked: bool = False,
    control: bool | HookedCausalLM | None = None,
    by: By = "document",
    rows: int | None = None,
    progress: Callable[[int], Any] | bool = False,
) -> pd.DataFrame:
    """Deltas (perturbed minus clean) at every site, for every perturbation; a tidy frame.

    `window` can be text too, or token ids: one document (see `HookedCausalLM.as_window`).
    `sites` are hook names, and "logits" (default: rotated q and k, attention output and residual stream of every layer,
    and the logits). "blocks.{i}.lens" is the logit lens, with the metrics of the logits: what the model's own final
    norm and head make of the residual stream after layer i. `lens` adds it for every layer; each costs a head more, and
    the last one is the logits again, but for hooks at ln_final.
    `masked` keeps attention inside documents. `by` says what a row is averaged over: each position, each document, or
    the whole window. `control` measures everything again in float64 beside it; by default where `masked`, the setting
    in which much of what is seen is rounding. It needs a float64 copy of the model in memory: give `model.double()`
    itself where several traces share one.
    `rows` perturbations share one clean pass (default: as many as half a gigabyte of float32 states holds). With
    `progress` a bar on stderr shows how far it is; a function is called with the work just done instead, in layers,
    which sums to `trace_work`.

    Equals two plain forward passes to rounding, at the cost of each perturbation's causal cone (see `cone`). Raises
    InputError for an unknown site, a perturbation that does not fit the model (see `Perturbation.hooks`), and
    activations that are not finite.
    """
    window = model.as_window(window)
    perturbations = [perturbations] if isinstance(perturbations, Perturbation) else list(perturbations)
    sites = _known(model, _chosen_sites(model, sites, lens))
    if by not in get_args(By):
        raise InputError(f"by must be 'position', 'document' or 'window', but it is {by!r}")
    if progress is True:
        work = trace_work(model, len(perturbations), sites=sites, masked=masked, control=control)
        with progress_bar("layers of perturbed passes", work) as advance:
            return trace(
                model,
                window,
                perturbations,
                sites=sites,
                masked=masked,
                control=control,
                by=by,
                rows=rows,
                progress=advance,
            )
    if rows is None:
        rows = max(1, _STATE_ELEMENTS // (len(window) * model.config.hidden_size))
        if is_offloaded(model.original_model):  # its weights are read once for each group of perturbations
            rows = max(1, len(perturbations))
    means = _Means(model, window, sites, by, len(perturbations))
    for first in range(0, len(perturbations), rows):
        group = perturbations[first : first + rows]
        add = partial(means.add, first)
        with model.measuring():
            run_beside(model, window, group, sites, add, masked=masked, progress=progress or None)
    frame = means.frame([_columns(perturbation, model) for perturbation in perturbations]).assign(masked=masked)
    frame = _with_kinds(DELTAS.frame(frame), model)
    if control is None:
        control = masked
    if control:
        frame["value_float64"] = frame["value"]
        if model.dtype != torch.float64:
            twin = _float64(model, control)
            checked = trace(
                twin, window, perturbations, sites=sites, masked=masked, control=False, by=by, progress=progress
            )
            frame["value_float64"] = checked["value"]
    return frame


def trace_work(
    model: HookedCausalLM,
    perturbations: int,
    *,
    sites: Sequence[str] | None = None,
    lens: bool = False,
    masked: bool = False,
    control: bool | HookedCausalLM | None = None,
) -> int:
    """The work of a `trace` with these arguments, in layers, as its `progress` counts it.

    A perturbation is as many layers as the model has, and for each site with logits the head counts as so many more as
    it has weights of. The float64 control is as much again.
    """
    passes = 2 if (masked if control is None else control) and model.dtype != torch.float64 else 1
    return perturbations * passes * work_of_one(model, _chosen_sites(model, sites, lens))


class _Means:
    """Deltas of each perturbation, averaged as they come in; what never comes in is zero."""

    def __init__(self, model: HookedCausalLM, window: Window, sites: Sequence[str], by: By, count: int) -> None:
        self.model = model
        self.of_logits = set(logit_sites(model))
        of_site = {site: LOGIT_METRICS if site in self.of_logits else VECTOR_METRICS for site in sites}
        self.keys = [(site, metric) for site, metrics in of_site.items() for metric in metrics]
        positions, documents = torch.arange(len(window)), window.document_of
        self.lines = {
            "position": pd.DataFrame({"document": documents.numpy(), "position": positions.numpy()}),
            "document": pd.DataFrame({"document": range(window.documents)}),
            "window": pd.DataFrame(index=[0]),
        }[by]
        self.line_of = {"position": positions, "document": documents, "window": torch.zeros_like(positions)}[by]
        self.sums = torch.zeros(count, len(self.keys), len(self.lines), dtype=torch.float64)

    def add(self, first: int, which: list[int], site: str, at: Tensor, clean: Tensor, perturbed: Tensor) -> None:
        """Take in a site of the perturbations `which`, counted from `first`, at the positions `at`."""
        measured = (logit_deltas if site in self.of_logits else vector_deltas)(clean, perturbed)
        for metric, values in measured.items():
            key = self.keys.index((site, metric))
            self.model.require_finite(values, site)
            for index, of_one in zip(which, values.double().cpu(), strict=True):
                self.sums[first + index, key].index_add_(0, self.line_of[at], of_one)

    def values(self) -> Float[Tensor, "perturbations keys lines"]:
        """The means."""
        return self.sums / self.line_of.bincount()

    def frame(self, columns: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """A row per perturbation (`columns` of each), site and metric, and position, document or window."""
        keys = pd.DataFrame(self.keys, columns=["site", "metric"])
        sources = [pd.DataFrame(columns), keys.assign(layer=keys["site"].map(_layer)), self.lines]
        rows = np.indices(self.sums.shape).reshape(3, -1)
        parts = [part.iloc[row_indices].reset_index(drop=True) for part, row_indices in zip(sources, rows, strict=True)]
        return DELTAS.frame(
            pd.concat(parts, axis=1).assign(seq_len=len(self.line_of), value=self.values().flatten().numpy())
        )


def copy_deltas(
    model: HookedCausalLM,
    window: Window | str | Tensor,
    *,
    reference: int = 0,
    lens: bool = False,
    masked: bool = False,
    control: bool | HookedCausalLM | None = None,
) -> pd.DataFrame:
    """Copies of a repeated document against the first copy, at every layer: what position alone does to one content.

    `document` is the copy, `delta_tokens` how far after the first it begins; values are averaged over the document.
    Sites are those of `trace`, and `blocks.{i}.attn.unrotated_q|k`: q and k with their rotation undone, so that what is
    left between copies came in through the layers below; with `lens` also the logit lens of every layer. `reference` is
    the document that counts as the first copy; those before it may be something else. `control` as in `trace`.

    Raises InputError for a window whose documents from `reference` on are not copies of one. Text and token ids are one
    document, so that they are refused too: make copies of them with `repeated_window`.
    """
    window = model.as_window(window)
    length = int(window.cu_seqlens.diff()[0])
    if not (window.cu_seqlens.diff() == length).all() or not 0 <= reference < window.documents - 1:
        raise InputError(
            f"copies are compared in a window of {reference + 2} or more documents of one length; "
            "make one with repeated_window(token_ids, copies)"
        )
    copies = window.tokens.view(-1, length)[reference:]
    if not (copies == copies[0]).all():
        raise InputError("the documents of this window are not copies of one; make it with repeated_window")
    later = range(reference + 1, window.documents)
    means: dict[tuple[str, str], Tensor] = {}

    def compare(site: str, x: Tensor) -> None:
        parts = x.view(window.documents, length, *x.shape[1:])
        per_copy = [vector_deltas(parts[reference], parts[copy]) for copy in later]
        means.update({(site, metric): torch.stack([d[metric].mean() for d in per_copy]) for metric in per_copy[0]})

    def compare_logits(site: str, hidden: Float[Tensor, "T M"], head: Callable[[Tensor], Tensor]) -> None:
        parts = hidden.view(window.documents, length, -1)[reference:]  # [copies, length, M]
        blocks: list[list[Deltas]] = [[] for _ in later]
        for block in parts.split(logit_block(model, len(parts)), dim=1):
            first, *others = head(block)
            for of_copy, logits in zip(blocks, others, strict=True):
                of_copy.append(logit_deltas(first, logits))
        joined = [_concatenate(copy) for copy in blocks]
        means.update({(site, metric): torch.stack([d[metric].mean() for d in joined]) for metric in joined[0]})

    def read(x: Tensor, hook: Any) -> None:
        compare(hook.name, x[0])
        if lens and hook.name == f"blocks.{hook.layer()}.hook_resid_post":
            compare_logits(LENS.format(hook.layer()), x[0], model.lens)
        if "hook_rot_" in hook.name and (rotary := model.rotary[hook.layer()]) is not None:
            compare(hook.name.replace("hook_rot_", "unrotated_"), rotary.undo(x[0], window.position_ids[0]))

    plain = model.original_model
    head_modules = (final_norm_of(plain), output_projection_of(plain)) if lens else ()
    with torch.no_grad(), model.measuring(), weights_in_place(*head_modules):
        sites = [site for site in default_sites(model) if site != LOGITS]
        with model.hooks(fwd_hooks=[(site, read) for site in sites]):
            hidden = model.hidden(window, masked=masked)[0]
        with weights_in_place(output_projection_of(plain)):
            compare_logits(LOGITS, hidden, model.unembed)
    for (site, _), values in means.items():
        model.require_finite(values, site)
    frame = DELTAS.frame(
        [
            {
                "perturbation": COPY,
                "kind": COPY,
                "masked": masked,
                "delta_tokens": float((copy - reference) * length),
                "seq_len": len(window),
                "document": copy,
                "layer": _layer(site),
                "site": site,
                "metric": metric,
                "value": value,
            }
            for (site, metric), values in means.items()
            for copy, value in zip(later, values.tolist(), strict=True)
        ]
    )
    frame = _with_kinds(frame, model)
    if masked if control is None else control:
        twin = _float64(model, control)
        checked = copy_deltas(twin, window, reference=reference, lens=lens, masked=masked, control=False)
        frame["value_float64"] = checked["value"]
    return frame


def _float64(model: HookedCausalLM, control: bool | HookedCausalLM | None) -> HookedCausalLM:
    if isinstance(control, HookedCausalLM):
        return control
    return model if model.dtype == torch.float64 else model.double()


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
    """Rotated q and k, where a layer has them, attention output and residual stream of every layer, then the logits."""
    sites = [f"blocks.{layer}.{site}" for layer in range(len(model.blocks)) for site in LAYER_SITES]
    return [site for site in sites if site in model.hook_dict] + [LOGITS]


def _chosen_sites(model: HookedCausalLM, sites: Sequence[str] | None, lens: bool) -> list[str]:
    """Each site once: those that are named, or the default ones, and with `lens` the lens after every layer."""
    named = default_sites(model) if sites is None else list(sites)
    return list(dict.fromkeys([*named, *(lens_sites(model) if lens else [])]))


def _with_kinds(frame: pd.DataFrame, model: HookedCausalLM) -> pd.DataFrame:
    """The frame with the kind of attention of the layer that is perturbed, else of the one that is read."""
    kinds = dict(enumerate(attention_kinds(model.config)))
    layers = frame["inject_layer"].fillna(frame["layer"])
    return frame.assign(attention=layers.map(kinds, na_action="ignore").astype("string"))


def _concatenate(blocks: list[Deltas]) -> Deltas:
    return {metric: torch.cat([block[metric] for block in blocks]) for metric in blocks[0]}


def _columns(perturbation: Perturbation, model: HookedCausalLM) -> dict[str, Any]:
    layer, head, pair = map(_only, (perturbation.layers, perturbation.heads, perturbation.pairs))
    layers = perturbation.layers
    named = range(len(model.rotary)) if layers is None else layers if isinstance(layers, Iterable) else [layers]
    rotating = [rotary for rotary in (model.rotary[i] for i in named) if rotary is not None]
    wavelength = None
    if pair is not None and all(torch.equal(rotary.inv_freq, rotating[0].inv_freq) for rotary in rotating):
        wavelength = rope.wavelengths(rotating[0].inv_freq)[pair].item()
    return {
        "perturbation": str(perturbation),
        "kind": type(perturbation).__name__,
        "restriction": perturbation.restriction,
        "side": perturbation.side,
        "delta_tokens": perturbation.delta_tokens,
        "radians": getattr(perturbation, "radians", None),
        "factor": None if isinstance(factor := getattr(perturbation, "factor", None), str) else factor,
        "inject_layer": layer,
        "inject_layers": _several(perturbation.layers),
        "head": head,
        "pair": pair,
        "wavelength": wavelength,
    }


def _several(selection: Selection) -> str | None:
    """Several indices as text, runs of them as ranges: "0-4, 6". None for one, and for all."""
    if not isinstance(selection, Iterable) or len(indices := sorted(set(selection))) < 2:
        return None
    ends = [i for i, index in enumerate(indices) if index + 1 not in indices]
    starts = [0, *(end + 1 for end in ends[:-1])]
    runs = [(indices[start], indices[end]) for start, end in zip(starts, ends, strict=True)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _only(selection: Selection) -> int | None:
    """The one index that a selection names, if it is one."""
    chosen = list(selection) if isinstance(selection, Iterable) else [selection]
    return chosen[0] if len(chosen) == 1 else None


def _layer(site: str) -> int | None:
    return int(site.split(".")[1]) if site.startswith("blocks.") else None


def _known(model: HookedCausalLM, sites: Sequence[str]) -> list[str]:
    of_logits = logit_sites(model)
    for site in sites:
        if site.endswith(("hook_attn_scores", "hook_pattern")):
            raise InputError(f"site {site!r} is [T, T] and has no delta per position; trace hook_z instead")
        if site not in of_logits and site not in model.hook_dict:
            raise InputError(
                f"site {site!r} is unknown; sites are 'logits', {of_logits[0]!r} to {of_logits[-2]!r}, and the names "
                "in model.hook_dict"
            )
    return list(sites)
