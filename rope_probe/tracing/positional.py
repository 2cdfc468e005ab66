"""Positional decomposition: how much of a state is its content, how much its place, how much the two together.

The same D contents stand at each of P places of a window. Their states at a site are a balanced table [D, P], which a
two-way analysis of variance splits exactly, position of the content by position and dimension by dimension:

    state[d, p] = mean + content[d] + position[p] + interaction[d, p]

- The four parts are orthogonal over the table, so their sums of squares add up to that of the states.
- `position` is what a place does to every content alike. `interaction` is what it does to some of them.
- Contents are few, so chance alone leaves something in `position`: about interaction / (D - 1).
- A place is where the content stands and what stands before it. With one filler for all contents, `position` holds
  both. With a filler of its own for each content, what stands before differs from content to content: `position` is
  then what the place does whatever stands before, and the fillers' part is in `interaction`.
- Logits are only defined up to a number at each position, so their mean over the vocabulary is taken off first.
- Nothing of size [D, P, width] is held for states: sums over contents and over places suffice. They are float64, of
  differences from each content's state at the first place, so that a part that is nothing comes out as nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.offloaded import require_in_memory
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.tracing.cone import LOGITS
from rope_probe.tracing.deltas import logit_deltas
from rope_probe.windows.packing import Window

LAYER_SITES = (
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.unrotated_q",
    "attn.unrotated_k",
    "hook_attn_out",
    "hook_resid_post",
)
SHARES = ("content_share", "position_share", "interaction_share")
BY_CHANCE = "position_by_chance"
LOGIT_ELEMENTS = 2**24
"""Logits of all contents at all places that are held at a time, at least those of one position."""

POSITIONAL_PARTS = declare(
    "positional_parts",
    "States of several contents at several places, split into content, position and interaction by a two-way analysis "
    "of variance. Shares are of the sum of squares about the grand mean of each of the content's positions; the three "
    "sum to 1.",
    ("arm", "role", "seq_len", "masked", "contents", "places", "content_length", "layer", "site"),
    {
        "content_share": Metric("share of the states that tells contents apart, wherever they stand"),
        "position_share": Metric("share that tells places apart, whatever stands there"),
        "interaction_share": Metric("share that depends on both"),
        BY_CHANCE: Metric("position_share that so few contents would leave if places did nothing to all alike"),
        "mean_square": Metric("squared distance from the grand mean, over all cells and positions"),
        "position_kl_nats": Metric("KL(logits || the same less their positional part), mean over cells", "nats"),
        "interaction_kl_nats": Metric("KL(logits || the same less their interaction), mean over cells", "nats"),
    },
    own={
        "contents": Column("Int64", "number of contents, D"),
        "places": Column("Int64", "number of places, P"),
        "content_length": Column("Int64", "length of each content", "tokens"),
    },
)


@dataclass(frozen=True)
class PlacedContents:
    """D contents of n tokens, to be read at each of P places of a window that is otherwise filled.

    `places` are indices in the window where a content begins, rising. `filler` are the tokens before it: [T], the same
    for every content, or [D, T], for each its own; which of the two `position` then means is told in the module. Only
    what stands before the content is read, since nothing after it can change it. Masked from its filler, a content is
    a document of its own.

    Raises InputError for fewer than two contents or places, for places that do not rise, and for a content that does
    not fit between its place and the end of the filler.
    """

    contents: Int[Tensor, "D n"]
    filler: Int[Tensor, "*D T"]
    places: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(int(place) for place in self.places))
        for name, tokens, shapes in (("contents", self.contents, (2,)), ("filler", self.filler, (1, 2))):
            if tokens.ndim not in shapes or tokens.is_floating_point():
                kind = f"{tokens.dtype} of shape {list(tokens.shape)}"
                raise InputError(f"{name} must be token ids, a row for each content, but they are {kind}")
        if len(self.contents) < 2 or len(self.places) < 2:
            counts = f"{len(self.contents)} and {len(self.places)}"
            raise InputError(f"a decomposition needs 2 contents and 2 places or more, but there are {counts}")
        if self.filler.ndim == 2 and len(self.filler) != len(self.contents):
            raise InputError(
                f"fillers must be one for all or one for each of the {len(self.contents)} contents, but there are "
                f"{len(self.filler)}"
            )
        last = self.filler.shape[-1] - self.length
        rises = all(one < other for one, other in zip(self.places, self.places[1:], strict=False))
        if not rises or self.places[0] < 0 or self.places[-1] > last:
            raise InputError(f"places must rise within 0..{last}, where contents fit, but they are {self.places}")

    @property
    def length(self) -> int:
        """Tokens of each content, n."""
        return self.contents.shape[1]

    @property
    def cells(self) -> tuple[int, int]:
        """D and P."""
        return len(self.contents), len(self.places)

    def window(self, content: int, place: int) -> Window:
        """The window that ends with a content at a place, by their numbers."""
        start = self.places[place]
        filler = self.filler if self.filler.ndim == 1 else self.filler[content]
        tokens = torch.cat([filler[:start], self.contents[content]]).long().unsqueeze(0)
        bounds = torch.tensor(sorted({0, start, tokens.shape[1]}), dtype=torch.int32)
        return Window(tokens, bounds, torch.arange(tokens.shape[1]).unsqueeze(0))


@dataclass(frozen=True)
class TwoWay:
    """The parts of a balanced table [D, P, ...]; each broadcasts against it, and they add up to it."""

    mean: Float[Tensor, "1 1 *shape"]
    content: Float[Tensor, "D 1 *shape"]
    position: Float[Tensor, "1 P *shape"]
    interaction: Float[Tensor, "D P *shape"]

    @property
    def sums_of_squares(self) -> tuple[float, float, float]:
        """Of content, position and interaction, over the whole table; their sum is that of the table less its mean."""
        contents, places = self.interaction.shape[:2]
        return (
            places * float(self.content.square().sum()),
            contents * float(self.position.square().sum()),
            float(self.interaction.square().sum()),
        )


def two_way(table: Float[Tensor, "D P *shape"]) -> TwoWay:
    """The two-way analysis of variance of a table, contents by places, in float64.

    Raises InputError for a table with fewer than two contents or places.
    """
    if table.ndim < 2 or min(table.shape[:2]) < 2:
        raise InputError(f"a table has 2 contents and 2 places or more, but its shape is {list(table.shape)}")
    table = table.double()
    mean = table.mean((0, 1), keepdim=True)
    content = table.mean(1, keepdim=True) - mean
    position = table.mean(0, keepdim=True) - mean
    return TwoWay(mean, content, position, table - mean - content - position)


def default_sites(model: HookedCausalLM) -> list[str]:
    """Rotated and unrotated q and k, attention output and residual stream of every layer that has them; the logits."""
    sites = [f"blocks.{layer}.{site}" for layer in range(len(model.blocks)) for site in LAYER_SITES]
    return [site for site in sites if _is_site(model, site)] + [LOGITS]


def positional_parts(
    model: HookedCausalLM,
    contents: PlacedContents,
    *,
    sites: Sequence[str] | None = None,
    masked: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Shares of content, position and interaction at every site; a tidy frame.

    `sites` are hook names, `blocks.{i}.attn.unrotated_q|k` (q and k with their rotation undone, so that what is left of
    position came in below), and "logits"; by default those of `default_sites`. `masked` keeps attention inside the
    content. `progress` is called with the passes just done, of D x P in all. Metrics: see POSITIONAL_PARTS. Shares are
    null at a site that is the same in every cell.

    Memory: 2D + P states of n positions at each site, in float64; final hidden states of all cells. The model must be
    in one place: one that accelerate dispatched or offloads is not supported, since each of the D x P passes would
    fetch all its weights. Raises InputError for such a model, for an unknown site, for what `HookedCausalLM.hidden`
    refuses, and for states that are not finite.
    """
    chosen = known_sites(model, default_sites(model) if sites is None else sites)
    sums, hidden = _gathered(model, contents, chosen, masked, progress)
    rows: list[dict[str, Any]] = []
    for site in chosen:
        if site == LOGITS:
            squares, nats = _logit_squares(model, hidden)
        else:
            squares, nats = sums[site].sums_of_squares, {}
        rows += [{"site": site, "layer": _layer(site), **row} for row in _rows(squares, contents)]
        rows += [{"site": site, "metric": metric, "value": value} for metric, value in nats.items()]
    places, length = contents.places, contents.length
    every = {"seq_len": places[-1] + length, "masked": masked, "contents": len(contents.contents)}
    return POSITIONAL_PARTS.frame([{**every, "places": len(places), "content_length": length, **row} for row in rows])


def positional_part(
    model: HookedCausalLM,
    contents: PlacedContents,
    sites: Sequence[str],
    *,
    masked: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Float[Tensor, "P n *shape"]]:
    """By site, what each place does to every content alike: place means less the grand mean, float64.

    Sites, memory and errors as in `positional_parts`. Logits are without their mean over the vocabulary, [P, n, V].
    """
    chosen = known_sites(model, sites)
    sums, hidden = _gathered(model, contents, chosen, masked, progress)
    parts = {site: sums[site].position for site in chosen if site != LOGITS}
    if LOGITS in chosen:
        blocks = [two_way(block).position[0] for block in logit_blocks(model, hidden)]
        parts[LOGITS] = torch.cat(blocks, 1)
    return parts


def states_at(
    model: HookedCausalLM,
    contents: PlacedContents,
    site: str,
    *,
    masked: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Float[Tensor, "D P n *shape"]:
    """The states of every content at every place at one site; for the logits the final hidden states (`logit_blocks`).

    Errors as in `positional_parts`.
    """
    (site,) = known_sites(model, [site])
    states: list[list[Tensor]] = [[] for _ in contents.contents]
    for content, _, name, state in _read(model, contents, [site], masked, progress):
        if name == site:
            states[content].append(state)
    return torch.stack([torch.stack(places) for places in states])


def logit_blocks(model: HookedCausalLM, hidden: Float[Tensor, "D P n M"]) -> Iterator[Float[Tensor, "D P block V"]]:
    """Logits of final hidden states less their mean over the vocabulary, float64; some of the n positions at a time."""
    contents, places, length, width = hidden.shape
    size = max(1, LOGIT_ELEMENTS // (contents * places * model.config.vocab_size))
    for start in range(0, length, size):
        block = hidden[:, :, start : start + size]
        with torch.no_grad():
            logits = model.unembed(block.reshape(contents * places, -1, width).to(model.device)).double().cpu()
        model.require_finite(logits, LOGITS)
        logits -= logits.mean(-1, keepdim=True)
        yield logits.view(contents, places, *logits.shape[1:])


def known_sites(model: HookedCausalLM, sites: Sequence[str]) -> list[str]:
    """The sites, each once. Raises InputError for one that this model does not have, or has no decomposition."""
    for site in sites:
        if site.endswith(("hook_attn_scores", "hook_pattern")):
            raise InputError(f"site {site!r} is [T, T] and has no place of its own; decompose attn.hook_z instead")
        if site != LOGITS and not _is_site(model, site):
            raise InputError(
                f"site {site!r} is unknown; sites are 'logits', the names in model.hook_dict, and "
                "blocks.{i}.attn.unrotated_q or unrotated_k of a layer with RoPE"
            )
    return list(dict.fromkeys(sites))


_UNROTATED, _ROTATED = "attn.unrotated_", "attn.hook_rot_"


def _is_site(model: HookedCausalLM, site: str) -> bool:
    source = site.replace(_UNROTATED, _ROTATED)
    return source in model.hook_dict and (source == site or model.rotary[_layer_of(site)] is not None)


def _layer_of(site: str) -> int:
    return int(site.split(".")[1])


def _layer(site: str) -> int | None:
    return _layer_of(site) if site.startswith("blocks.") else None


def _read(
    model: HookedCausalLM,
    contents: PlacedContents,
    sites: Sequence[str],
    masked: bool,
    progress: Callable[[int], Any] | None,
) -> Iterator[tuple[int, int, str, Float[Tensor, "n *shape"]]]:
    """Content, place, site and state of every cell, place by place; for the logits the final hidden states."""
    require_in_memory(model.original_model, "a positional decomposition", "load it without device_map")
    sources = {site.replace(_UNROTATED, _ROTATED) for site in sites if site != LOGITS}
    for place, start in enumerate(contents.places):
        for content in range(len(contents.contents)):
            window = contents.window(content, place)
            kept: dict[str, Tensor] = {}

            def keep(x: Float[Tensor, "1 T *shape"], hook: Any, start: int = start, kept: dict = kept) -> None:
                kept[hook.name] = x[0, start:].clone()

            with torch.no_grad(), model.measuring(), model.hooks(fwd_hooks=[(source, keep) for source in sources]):
                hidden = model.hidden(window, masked=masked)[0, start:]
            for site in sites:
                state = hidden if site == LOGITS else kept[site.replace(_UNROTATED, _ROTATED)]
                if _UNROTATED in site:
                    rotary: Any = model.rotary[_layer_of(site)]
                    state = rotary.undo(state.double(), window.position_ids[0, start:])
                model.require_finite(state, site)
                yield content, place, site, state.cpu()
            if progress is not None:
                progress(1)


def _gathered(
    model: HookedCausalLM,
    contents: PlacedContents,
    sites: Sequence[str],
    masked: bool,
    progress: Callable[[int], Any] | None,
) -> tuple[dict[str, "_Sums"], Float[Tensor, "D P n M"]]:
    """Running sums at every site, and the final hidden states, empty unless logits are asked for."""
    sums: dict[str, _Sums] = {}
    final: list[list[Tensor]] = [[] for _ in contents.contents]
    for content, place, site, state in _read(model, contents, sites, masked, progress):
        if site == LOGITS:
            final[content].append(state)
        else:
            sums.setdefault(site, _Sums(*contents.cells, state.shape)).add(content, place, state)
    hidden = torch.stack([torch.stack(places) for places in final]) if LOGITS in sites else torch.empty(0)
    return sums, hidden


class _Sums:
    """Sums of a site's states over contents and over places, of differences from each content's first place."""

    def __init__(self, contents: int, places: int, shape: torch.Size) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64)
        self.shape = shape
        self.first = zeros(contents, shape.numel())
        self.of_content = zeros(contents, shape.numel())
        self.of_place = zeros(places, shape.numel())
        self.squares = 0.0

    def add(self, content: int, place: int, state: Float[Tensor, "n *shape"]) -> None:
        """Take in one cell; a content's first place comes before its others."""
        state = state.double().flatten()
        if place == 0:
            self.first[content] = state
            return
        moved = state - self.first[content]
        self.of_content[content] += moved
        self.of_place[place] += moved
        self.squares += float(moved @ moved)

    @property
    def position(self) -> Float[Tensor, "P n *shape"]:
        """Place means less the grand mean."""
        means = self.of_place / len(self.of_content)
        return (means - means.mean(0)).view(-1, *self.shape)

    @property
    def sums_of_squares(self) -> tuple[float, float, float]:
        """Of content, position and interaction."""
        contents, places = len(self.of_content), len(self.of_place)
        moved = self.of_content / places
        means = self.first + moved
        content = places * float((means - means.mean(0)).square().sum())
        within = self.squares - places * float(moved.square().sum())  # what is not content
        position = contents * float(self.position.square().sum())
        return content, position, max(0.0, within - position)


def _logit_squares(
    model: HookedCausalLM, hidden: Float[Tensor, "D P n M"]
) -> tuple[tuple[float, float, float], dict[str, float]]:
    """Sums of squares of the logits, and what their parts do to the next-token distributions, in nats."""
    squares = torch.zeros(3, dtype=torch.float64)
    nats = {"position_kl_nats": 0.0, "interaction_kl_nats": 0.0}
    for logits in logit_blocks(model, hidden):
        parts = two_way(logits)
        squares += torch.tensor(parts.sums_of_squares, dtype=torch.float64)
        clean = logits.flatten(0, 2)  # [D x P x block, V]
        for metric, part in zip(nats, (parts.position, parts.interaction), strict=True):
            nats[metric] += float(logit_deltas(clean, (logits - part).flatten(0, 2))["kl_nats"].sum())
    cells = hidden.shape[:3].numel()
    return tuple(squares.tolist()), {metric: total / cells for metric, total in nats.items()}


def _rows(squares: tuple[float, float, float], contents: PlacedContents) -> list[dict[str, Any]]:
    total = sum(squares)
    content, position, interaction = (part / total if total else float("nan") for part in squares)
    rows = zip(SHARES, (content, position, interaction), strict=True)
    number, places = contents.cells
    extra = [
        (BY_CHANCE, interaction / (number - 1)),
        ("mean_square", total / (number * places * contents.length)),
    ]
    return [{"metric": metric, "value": value} for metric, value in [*rows, *extra]]
