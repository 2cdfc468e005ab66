"""Many perturbed passes beside one clean pass, and no more of each than its causal cone.

- A perturbation changes nothing below the first layer it turns, nor before the first position it turns (of each
  document, where documents are masked from each other). There the clean pass stands for the perturbed one.
- The clean pass is an ordinary forward. After each of its layers, the same layer runs on the perturbed states: those of
  perturbations that begin there start from the clean layer's input and its q, k and v, and at positions before the cone
  attention reads the clean pass's keys and values. So one layer's activations are held at a time, whatever the depth.
- Perturbations with one set of positions share calls, as rows of a batch.
- Of a model that is offloaded, each layer's weights are fetched once, before its clean pass, and stay until its last
  perturbed pass is done; so do those of the head. Where a lens is read, the head stays from the first layer on.
- A lens reads the residual stream after a layer, `blocks.{i}.lens`: it is the states that the passes hold anyway after
  that layer, put through the model's final norm and head, block by block as the logits are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rope_probe.models.architectures import final_norm_of, layers_of, output_projection_of, query_key_value_modules
from rope_probe.models.attention import Tail
from rope_probe.models.hooked import HookedCausalLM, returning
from rope_probe.models.offloaded import weights_in_place
from rope_probe.tracing.perturbations import Perturbation, Site, Turn
from rope_probe.windows.packing import Window

LOGITS = "logits"
LENS = "blocks.{}.lens"
"""The logit lens after a layer."""
NOTHING = torch.empty(0)
CALL_TOKENS = 2**13
"""Most tokens that perturbations share a call with."""
LOGIT_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Most logits that are held at a time, ..."""
LOGIT_TOKENS = 512
"""... but no fewer than those of so many tokens, or the head's weights are read too often; ..."""
LOGIT_ROWS = 8
"""... and of how many perturbations."""

Read = Callable[[list[int], str, Int[Tensor, " n"], Float[Tensor, "n *shape"], Float[Tensor, "rows n *shape"]], None]


@dataclass(frozen=True)
class Cone:
    """Where a perturbation can change anything: from `layer` on, in `segments` (start, first, end) of documents.

    A segment is a document from `start` to `end` of which the positions from `first` on can change.
    """

    layer: int
    segments: tuple[tuple[int, int, int], ...]

    @cached_property
    def at(self) -> Int[Tensor, " n"]:
        """Its positions, as indices into the window."""
        return torch.cat([torch.arange(0), *(torch.arange(first, end) for _, first, end in self.segments)])


def lens_sites(model: HookedCausalLM) -> list[str]:
    """The logit lens after every layer, the first layer's first."""
    return [LENS.format(layer) for layer in range(len(model.blocks))]


def logit_sites(model: HookedCausalLM) -> list[str]:
    """The sites that hold logits: those of the model, and the lens after every layer."""
    return [*lens_sites(model), LOGITS]


def cone_of(turns: dict[Site, Turn], window: Window, masked: bool) -> Cone | None:
    """The causal cone of a perturbation; None where it turns nothing by any angle."""
    tables = {id(turn.angles): turn.changes for turn in turns.values()}
    layers = [layer for (_, layer), turn in turns.items() if tables[id(turn.angles)].any()]
    if not layers:
        return None
    changes = torch.stack(list(tables.values())).any(0)
    documents = pairwise(window.cu_seqlens.tolist()) if masked else [(0, len(window))]
    firsts = [(start, changes[start:end].nonzero(), end) for start, end in documents]
    return Cone(min(layers), tuple((start, start + int(at[0]), end) for start, at, end in firsts if len(at)))


def run_beside(
    model: HookedCausalLM,
    window: Window,
    perturbations: Sequence[Perturbation],
    sites: Sequence[str],
    read: Read,
    *,
    masked: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """One clean pass and a perturbed one per perturbation: `read(which, site, at, clean, perturbed)` gets what differs.

    `which` are indices into `perturbations`, one per row of `perturbed`; `at` are positions as indices into the window;
    the activations are those of `site` there, alive only while it reads them. What it is not told of is the same in
    both passes. Logits come in blocks of positions. `progress` is called with the work just done, in layers:
    `work_of_one` for each perturbation in all, so the blocks of logits count as it says. A site may be one of
    `logit_sites` too.

    Hooks of the user's own hold in every pass; they see whole windows, so cones then have all positions. A layer whose
    weights are offloaded is loaded once for all passes.
    """
    with torch.no_grad(), _Passes(model, window, perturbations, sites, read, masked, progress) as passes:
        hidden = model.hidden(window, masked=masked)
        passes.finish(hidden)


def work_of_one(model: HookedCausalLM, sites: Sequence[str]) -> int:
    """How much work a perturbed pass is, in layers: its own, and for each site with logits that of the head."""
    heads = len(set(sites).intersection(logit_sites(model)))
    return len(model.blocks) + (heads * _work_of_head(model) if heads else 0)


def _work_of_head(model: HookedCausalLM) -> int:
    """How much work logits are, in layers: as many as the head has weights of."""
    layers = layers_of(model.original_model)
    of_layers = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    of_head = output_projection_of(model.original_model).weight.numel()
    return max(1, round(of_head * len(layers) / of_layers))


@dataclass
class _Pass:
    index: int
    turns: dict[Site, Turn]
    cone: Cone
    state: Float[Tensor, "n M"] = NOTHING


class _Passes(ExitStack):
    """The hooks that run perturbed passes beside the clean one, layer by layer."""

    def __init__(
        self,
        model: HookedCausalLM,
        window: Window,
        perturbations: Sequence[Perturbation],
        sites: Sequence[str],
        read: Read,
        masked: bool,
        progress: Callable[[int], Any] | None,
    ) -> None:
        super().__init__()
        self.model, self.sites, self.read, self.progress = model, sites, read, progress
        self.hook_sites = [site for site in sites if site not in logit_sites(model)]
        self.length, self.count = len(window), len(perturbations)
        hooked = any(point.has_hooks() for point in model.hook_dict.values())
        whole = hooked or not model.all_layers_attend  # what is no attention carries its state through whole windows
        self.passes = []
        for index, perturbation in enumerate(perturbations):
            turns = perturbation.turns(model.original_model, len(window), window)
            cone = cone_of(turns, window, masked)
            if cone is not None:
                self.passes.append(_Pass(index, turns, _widened(cone, window, masked) if whole else cone))
        self.running: list[_Pass] = []
        self.at: Tensor = torch.arange(0)
        self.clean: dict[str, Tensor] = {}
        self.projected: dict[nn.Module, Tensor] = {}
        self.weights = ExitStack()  # of the layer that runs, for all passes

    def __enter__(self) -> "_Passes":
        super().__enter__()
        self.callback(self.weights.close)
        plain = self.model.original_model
        if set(lens_sites(self.model)).intersection(self.sites):
            self.enter_context(weights_in_place(final_norm_of(plain), output_projection_of(plain)))
        hooks: list[tuple[str, Callable]] = []
        for layer, module in enumerate(layers_of(self.model.original_model)):
            handles = (
                module.register_forward_pre_hook(self._keep_input, with_kwargs=True, prepend=True),
                module.register_forward_hook(partial(self._run_layer, layer), with_kwargs=True),
            )
            for handle in handles:
                self.callback(handle.remove)
            if f"blocks.{layer}.attn.hook_rot_q" not in self.model.hook_dict:
                continue  # a layer without attention
            hooks += [(f"blocks.{layer}.attn.hook_rot_{side}", partial(self._turn, (side, layer))) for side in "qk"]
            if any(one.cone.layer == layer for one in self.passes):
                for projection in query_key_value_modules(self.model.original_model, layer):
                    self.callback(projection.register_forward_hook(self._keep_projected).remove)
            if any(len(one.cone.at) < self.length for one in self.passes):
                hooks += [(f"blocks.{layer}.attn.{name}", self._keep) for name in ("hook_rot_k", "hook_v")]
        hooks += [(site, self._visit) for site in self.hook_sites]
        self.enter_context(self.model.hooks(fwd_hooks=hooks))
        return self

    def _keep_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.running:
            self.clean["input"] = args[0] if args else kwargs["hidden_states"]
            self.weights.enter_context(weights_in_place(module))

    def _turn(self, site: Site, x: Tensor, hook: Any) -> Tensor:
        for row, one in enumerate(self.running):
            if site in one.turns:
                x[row : row + 1] = one.turns[site](x[row : row + 1], self.at)  # in place: no one else reads it yet
        return x

    def _keep(self, x: Tensor, hook: Any) -> None:
        if not self.running:
            self.clean[hook.name] = x

    def _keep_projected(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.running:
            self.projected[module] = output

    def _visit(self, x: Tensor, hook: Any) -> None:
        if not self.running:
            self.clean[hook.name] = x
            return
        clean = self._taken_at(self.clean[hook.name])[0]
        self.read([one.index for one in self.running], hook.name, self.at, clean, x)

    def _run_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.running:
            return
        for group in self._groups(layer, CALL_TOKENS):
            self.running, self.at = group, group[0].cone.at
            told = self._narrow(layer, kwargs)
            with ExitStack() as begun:
                if group[0].cone.layer == layer:
                    states = self._taken_at(self.clean["input"]).expand(len(group), -1, -1)
                    for projection, projected in self.projected.items():
                        begun.enter_context(returning(projection, self._taken_at(projected).expand(len(group), -1, -1)))
                else:
                    states = _stacked([one.state for one in group])
                    for one in group:
                        one.state = NOTHING
                try:
                    after = module(states, *args[1:], **told) if args else module(**{**told, "hidden_states": states})
                finally:
                    self.running = []
            for one, state in zip(group, after[0] if isinstance(after, tuple) else after, strict=True):
                one.state = state
        self.clean.clear()
        self.projected.clear()
        self.weights.close()
        self._tell(self.count)
        if LENS.format(layer) in self.sites:
            resid_post = output[0] if isinstance(output, tuple) else output
            self._read_logits(LENS.format(layer), layer, resid_post, self.model.lens)

    def _taken_at(self, x: Float[Tensor, "1 T *shape"]) -> Float[Tensor, "1 n *shape"]:
        """A tensor of the clean pass at the positions of the running ones."""
        return x if len(self.at) == self.length else x[:, self.at.to(x.device)]

    def _groups(self, layer: int, tokens: int) -> Iterator[list[_Pass]]:
        """The passes that run at this layer: those of one set of positions together, and those that begin apart."""
        alike = defaultdict(list)
        for one in self.passes:
            if one.cone.layer <= layer:
                alike[one.cone.segments, one.cone.layer == layer].append(one)
        for passes in alike.values():
            size = max(1, tokens // len(passes[0].cone.at))
            yield from (passes[i : i + size] for i in range(0, len(passes), size))

    def _narrow(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the clean layer was told of its positions, for the positions of the running passes alone."""
        if len(self.at) == self.length:
            return kwargs
        earlier = (self.clean[f"blocks.{layer}.attn.{name}"].transpose(1, 2) for name in ("hook_rot_k", "hook_v"))
        narrow = {**kwargs, "document_bounds": None}
        narrow["tail"] = Tail(self.running[0].cone.segments, tuple(earlier))
        if kwargs.get("position_ids") is not None:
            narrow["position_ids"] = self._taken_at(kwargs["position_ids"])
        rotation = kwargs.get("position_embeddings")  # cos and sin, or complex numbers; none where the layer makes them
        if isinstance(rotation, Tensor):
            narrow["position_embeddings"] = self._taken_at(rotation)
        elif rotation is not None:
            narrow["position_embeddings"] = tuple(self._taken_at(x) for x in rotation)
        return narrow

    def finish(self, hidden: Float[Tensor, "1 T M"]) -> None:
        """After the clean pass: the perturbed final states, and the logits of all."""
        plain = self.model.original_model
        with weights_in_place(final_norm_of(plain)):
            self._finish_states()
        if LOGITS in self.sites:
            with weights_in_place(output_projection_of(plain)):
                self._read_logits(LOGITS, len(self.model.blocks), hidden, self.model.unembed)

    def _finish_states(self) -> None:
        for group in self._groups(len(self.model.blocks), CALL_TOKENS):
            self.running, self.at = group, group[0].cone.at
            states = self.model.final_norm(_stacked([one.state for one in group]))
            for one, state in zip(group, states, strict=True):
                one.state = state
        self.running = []

    def _read_logits(
        self, site: str, layer: int, clean_states: Float[Tensor, "1 T M"], head: Callable[[Tensor], Tensor]
    ) -> None:
        """Read what `head` makes of the clean states and of those of the passes that run at `layer`, by blocks."""
        groups = list(self._groups(layer, LOGIT_ROWS * self.length))
        work = self.count * _work_of_head(self.model)
        all_logits = sum(len(one.cone.at) for group in groups for one in group)
        done = told = 0
        size = logit_block(self.model, 1 + max(map(len, groups), default=0))
        for start in range(0, self.length, size):
            end = min(start + size, self.length)
            clean = None
            for group in groups:
                at = group[0].cone.at
                low, high = torch.searchsorted(at, torch.tensor([start, end])).tolist()
                if low == high:
                    continue
                clean = head(clean_states[:, start:end])[0] if clean is None else clean
                logits = head(_stacked([one.state[low:high] for one in group]))
                mine = clean if high - low == end - start else clean[(at[low:high] - start).to(clean.device)]
                self.read([one.index for one in group], site, at[low:high], mine, logits)
                done += len(group) * (high - low)
                share = work * done // all_logits
                self._tell(share - told)
                told = share
        self._tell(work - told)

    def _tell(self, work: int) -> None:
        if self.progress is not None and work:
            self.progress(work)


def logit_block(model: HookedCausalLM, rows: int = 1) -> int:
    """Number of positions at which the logits of `rows` passes may be held at a time."""
    elements = LOGIT_ELEMENTS.get(model.device.type, LOGIT_ELEMENTS["cpu"])
    return max(1, LOGIT_TOKENS // rows, elements // (rows * model.config.vocab_size))


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)


def _widened(cone: Cone, window: Window, masked: bool) -> Cone:
    bounds = window.cu_seqlens.tolist() if masked else [0, len(window)]
    return Cone(cone.layer, tuple((start, start, end) for start, end in pairwise(bounds)))
