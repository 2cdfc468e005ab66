"""What the positional part of a state is like, whether two models share it, and what it causes.

- Principal directions: is the part spread over the state, or a line along which places lie?
- Alignment: does one model's part at each place point where another's does? Cosine, with two rivals beside it: places
  of the second permuted, and what both owe to the same few contents.
- Patching: a content at one place is read with the positional part of another. What that does to the logits is what
  this part of this site causes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.tracing.cone import LOGITS
from rope_probe.tracing.deltas import logit_deltas
from rope_probe.tracing.positional import PlacedContents, known_sites, logit_blocks, positional_part, states_at

POSITIONAL_ALIGNMENT = declare(
    "positional_alignment",
    "Whether the positional part of one model's states points where another's does, place by place.",
    ("arm", "role", "other", "seq_len", "masked", "site", "low", "high"),
    {
        "cosine": Metric("of the two positional parts"),
        "cosine_across_contents": Metric(
            "the same from pairs of different contents alone, free of what both models owe to the same few contents; "
            "null where either model has no positional part beyond chance; interval by bootstrap over contents"
        ),
        "slope": Metric(
            "of the second part on the first, across contents: 1 where it is as large, 0 where unrelated; interval by "
            "bootstrap over contents"
        ),
        "cosine_places_permuted": Metric("mean cosine with the second model's places permuted; interval: 95% of them"),
        "p_value": Metric("share of permutations whose cosine is as large as the cosine found"),
    },
    own={"other": Column("string", "the second model")},
)
POSITIONAL_PATCHES = declare(
    "positional_patches",
    "A content read at one place with the positional part that another place has at a site.",
    ("arm", "role", "seq_len", "masked", "here", "there", "layer", "site"),
    {
        "apart_nats": Metric("KL(logits there || logits here): what the place does to the content", "nats"),
        "patched_nats": Metric("KL(logits there || logits here with the part of there)", "nats"),
        "share_caused": Metric("1 - patched_nats / apart_nats: how much of it goes through this part of the site"),
    },
    own={
        "here": Column("Int64", "place where the content is read", "tokens"),
        "there": Column("Int64", "place whose part it gets", "tokens"),
    },
)


@dataclass(frozen=True)
class Directions:
    """Principal directions of a positional part, largest first.

    `vectors` are unit vectors of the site, heads side by side. `shares` are of the part's sum of squares, and sum to 1.
    `coordinates` say where each place, at each of the content's positions, lies along them.
    """

    vectors: Float[Tensor, "r width"]
    shares: Float[Tensor, " r"]
    coordinates: Float[Tensor, "P n r"]


def principal_directions(part: Float[Tensor, "P n *shape"]) -> Directions:
    """Principal directions of a positional part (see `positional_part`), by singular value decomposition, float64.

    Raises InputError for a part that is zero everywhere.
    """
    flat = part.double().flatten(2)  # [P, n, width]
    left, sizes, vectors = torch.linalg.svd(flat.flatten(0, 1), full_matrices=False)
    total = sizes.square().sum()
    if not total > 0:
        raise InputError("this positional part is zero everywhere, and has no directions")
    coordinates = (left * sizes).view(*flat.shape[:2], -1)
    return Directions(vectors, sizes.square() / total, coordinates)


def positional_alignment(
    first: HookedCausalLM,
    second: HookedCausalLM,
    contents: PlacedContents,
    *,
    site: str = LOGITS,
    masked: bool = False,
    second_masked: bool | None = None,
    draws: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether two models' positional parts at one site agree, as rows of POSITIONAL_ALIGNMENT.

    Both read the same contents at the same places. Intervals across contents are percentiles of `draws` bootstrap
    samples of contents; the plain cosine has none, as samples that hold a content twice raise its share in both parts.
    The permuted cosine is over `draws` random orders of the second model's places, and the p-value
    counts the order found as one more of them; few places have few orders. `second_masked` is for a second model that
    is read otherwise than the first.
    Raises InputError for sites of different width, for fewer than one draw, and as `positional_parts`.
    """
    if draws < 1:
        raise InputError(f"draws must be 1 or more, but it is {draws}")
    other_masked = masked if second_masked is None else second_masked
    of_contents = torch.zeros(3, len(contents.contents), len(contents.contents), dtype=torch.float64)
    of_places = torch.zeros(3, len(contents.places), len(contents.places), dtype=torch.float64)
    blocks = zip(_blocks(first, contents, site, masked), _blocks(second, contents, site, other_masked), strict=True)
    for one, other in blocks:
        if one.shape != other.shape:
            shapes = f"{list(one.shape[2:])} and {list(other.shape[2:])}"
            raise InputError(
                f"states of two models are aligned where their widths agree, but at {site!r} they are {shapes}"
            )
        moved = [(block - block.mean(1, keepdim=True)).flatten(2) for block in (one, other)]  # [D, P, f] each
        for number, (a, b) in enumerate(((0, 0), (1, 1), (0, 1))):
            of_contents[number] += moved[a].flatten(1) @ moved[b].flatten(1).T
            of_places[number] += moved[a].mean(0) @ moved[b].mean(0).T
    rng = np.random.default_rng(seed)
    every = {"seq_len": contents.places[-1] + contents.length, "masked": masked, "site": site}
    rows = [*_by_contents(of_contents.numpy(), draws, rng), *_by_places(of_places.numpy(), draws, rng)]
    return POSITIONAL_ALIGNMENT.frame([{**every, **row} for row in rows])


def _blocks(
    model: HookedCausalLM, contents: PlacedContents, site: str, masked: bool
) -> Iterator[Float[Tensor, "D P block width"]]:
    states = states_at(model, contents, site, masked=masked)
    if site != LOGITS:
        yield states.double().flatten(3)
        return
    for block in logit_blocks(model, states):  # position by position, so that blocks of two models are alike
        yield from block.split(1, dim=2)


def _by_contents(products: np.ndarray, draws: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Cosines and slope, from products [3, D, D] of the contents' own moves: first, second, first with second."""
    count = products.shape[1]
    samples = rng.multinomial(count, np.full(count, 1 / count), size=draws)  # how often each content was drawn
    weights = np.concatenate([np.ones((1, count), int), samples])  # what was found comes first
    every = np.einsum("wd,kde,we->kw", weights, products, weights)
    same = np.einsum("wd,kdd->kw", weights**2, products)
    cosine, across = (_cosine(*products) for products in (every, every - same))
    of_first, _, of_both = every - same
    return [
        {"metric": "cosine", "value": cosine[0]},
        _with_interval("cosine_across_contents", across),
        _with_interval("slope", _ratio(of_both, np.maximum(of_first, 0))),
    ]


def _cosine(of_first: np.ndarray, of_second: np.ndarray, of_both: np.ndarray) -> np.ndarray:
    return np.clip(_ratio(of_both, np.sqrt(np.maximum(of_first, 0) * np.maximum(of_second, 0))), -1, 1)


def _by_places(products: np.ndarray, draws: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The permuted cosine and its p-value, from products [3, P, P] of place means less their mean."""
    places = products.shape[1]
    norm = np.sqrt(np.trace(products[0]) * np.trace(products[1]))
    orders = rng.permuted(np.tile(np.arange(places), (draws, 1)), axis=1)
    if not norm > 0:
        return [{"metric": metric, "value": np.nan} for metric in ("cosine_places_permuted", "p_value")]
    found = np.trace(products[2]) / norm
    permuted = products[2][np.arange(places), orders].sum(1) / norm
    low, high = np.quantile(permuted, [0.025, 0.975])
    reached = int((permuted >= found - 1e-12).sum())
    return [
        {"metric": "cosine_places_permuted", "value": permuted.mean(), "low": low, "high": high},
        {"metric": "p_value", "value": (1 + reached) / (1 + draws)},
    ]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _with_interval(metric: str, values: np.ndarray) -> dict[str, Any]:
    """What was found, and percentiles of the samples after it; samples without a value are left out."""
    found, samples = values[0], values[1:][np.isfinite(values[1:])]
    if not np.isfinite(found) or not len(samples):
        return {"metric": metric, "value": found}
    low, high = np.quantile(samples, [0.025, 0.975])
    return {"metric": metric, "value": found, "low": low, "high": high}


@contextmanager
def moved(
    model: HookedCausalLM,
    parts: Mapping[str, Float[Tensor, "P n *shape"]],
    contents: PlacedContents,
    here: int,
    there: int,
) -> Iterator[HookedCausalLM]:
    """Within it, a content at place number `here` has the positional parts of place number `there`.

    `parts` are those of `positional_part`, by site: of this model, or of another of the same width. At each site the
    states of the content's n positions get the part of there less that of here. For windows of `contents.window`, or
    longer ones that begin so.
    Raises InputError for the logits and for unrotated q and k, which no hook can change, and for a place that is none.
    """
    _require_places(contents, here, there)
    start, end = contents.places[here], contents.places[here] + contents.length
    changes = {}
    for site in known_sites(model, list(parts)):
        if site not in model.hook_dict:
            raise InputError(f"site {site!r} can be read, not changed; patch a name in model.hook_dict")
        changes[site] = parts[site][there] - parts[site][here]

    def change(x: Float[Tensor, "B T *shape"], hook: Any) -> Tensor:
        difference = changes[hook.name].to(x.device)
        patched = x.clone()
        patched[:, start:end] = (x[:, start:end] + difference).to(x.dtype)
        return patched

    with model.hooks(fwd_hooks=[(site, change) for site in changes]):
        yield model


def positional_patches(
    model: HookedCausalLM,
    contents: PlacedContents,
    sites: Sequence[str],
    *,
    here: int = 0,
    there: int = -1,
    masked: bool = False,
    parts: Mapping[str, Float[Tensor, "P n *shape"]] | None = None,
) -> pd.DataFrame:
    """What the positional part of each site causes in the logits, one site at a time; rows of POSITIONAL_PATCHES.

    Every content is read at place number `here` and at `there` (negative numbers count from the end), and at here with
    the part of there. KL is the mean over contents and their positions, all from plain forward passes. `parts` are
    those of `positional_part` where they are known already. `share_caused` is null where the places are not apart.
    Errors as in `positional_parts` and `moved`.
    """
    here, there = (number + len(contents.places) if number < 0 else number for number in (here, there))
    _require_places(contents, here, there)
    chosen = known_sites(model, sites)
    if parts is None:
        parts = positional_part(model, contents, chosen, masked=masked)
    apart = 0.0
    patched = dict.fromkeys(chosen, 0.0)
    for content in range(len(contents.contents)):
        of_there = _content_logits(model, contents, content, there, masked)
        of_here = _content_logits(model, contents, content, here, masked)
        apart += _kl(of_there, of_here)
        for site in chosen:
            with moved(model, {site: parts[site]}, contents, here, there):
                patched[site] += _kl(of_there, _content_logits(model, contents, content, here, masked))
    count = len(contents.contents)
    rows = []
    for site in chosen:
        caused = 1 - patched[site] / apart if apart else float("nan")
        values = {"apart_nats": apart / count, "patched_nats": patched[site] / count, "share_caused": caused}
        layer = int(site.split(".")[1]) if site.startswith("blocks.") else None
        rows += [{"site": site, "layer": layer, "metric": metric, "value": value} for metric, value in values.items()]
    every = {"seq_len": contents.places[-1] + contents.length, "masked": masked}
    every |= {"here": contents.places[here], "there": contents.places[there]}
    return POSITIONAL_PATCHES.frame([{**every, **row} for row in rows])


def _require_places(contents: PlacedContents, *numbers: int) -> None:
    for number in numbers:
        if not 0 <= number < len(contents.places):
            raise InputError(f"place number {number} is out of range; places are 0..{len(contents.places) - 1}")


def _content_logits(
    model: HookedCausalLM, contents: PlacedContents, content: int, place: int, masked: bool
) -> Float[Tensor, "n V"]:
    with torch.no_grad(), model.measuring():
        hidden = model.hidden(contents.window(content, place), masked=masked)
        logits = model.unembed(hidden[:, contents.places[place] :])[0]
    model.require_finite(logits, LOGITS)
    return logits


def _kl(clean: Float[Tensor, "n V"], other: Float[Tensor, "n V"]) -> float:
    return float(logit_deltas(clean, other)["kl_nats"].double().mean())
