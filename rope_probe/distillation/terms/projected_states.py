"""Hidden states of another width than the teacher's, through a linear map that was learnt beforehand.

`fit_projections` learns the maps by least squares on some windows and writes them to a file; the term reads them and
leaves them as they are. A loop that trained them along with the student would need a place for parameters that are in
the optimizer and in snapshots and not in the model that is saved; docs/longred.md says what that would take.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rope_probe.distillation.terms.base import StateTerm
from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.windows.packing import Batch


@dataclass(frozen=True)
class ProjectedStates(StateTerm):
    """How far the student's states, mapped to the teacher's width, are from the teacher's, summed over `sites`.

    `projections` is a file that `fit_projections` wrote, with a map [K, M] for each site. `distance` "cosine" is 1 -
    cosine similarity, "mse" the mean over the teacher's width of the squared difference.
    Raises InputError for another distance; `check`, for a file that does not fit the models.
    """

    teacher: str = "teacher"
    projections: str = ""
    distance: Literal["cosine", "mse"] = "cosine"
    kind: Literal["projected_hidden"] = "projected_hidden"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance not in ("cosine", "mse"):
            raise InputError(f"hidden states are compared by cosine or mse, but distance is {self.distance!r}")
        if not self.projections:
            raise InputError("projected_hidden needs projections, a file that fit_projections wrote, but has none")

    def check(self, student: HookedCausalLM, teacher: HookedCausalLM | None) -> None:
        """Raises InputError for a site that a model does not have, and for maps of other widths or none."""
        super().check(student, teacher)
        maps = _maps(self.projections)
        for site in self.sites:
            if site not in maps:
                raise InputError(f"{self.projections!r} has no map for {site!r}; it has {', '.join(sorted(maps))}")
            ours = student.config.hidden_size
            theirs = maps[site].shape[0] if teacher is None else teacher.config.hidden_size
            if maps[site].shape != (theirs, ours):
                raise InputError(
                    f"the map of {site} in {self.projections!r} must be [{theirs}, {ours}], the widths of teacher and "
                    f"student, but it is {list(maps[site].shape)}"
                )

    def values(
        self, states: Sequence[Float[Tensor, "*rows M"]], taught: Sequence[Float[Tensor, "*rows K"]] | None
    ) -> Float[Tensor, " N"]:
        """Distance at each position, of states site by site."""
        assert taught is not None
        maps = _maps(self.projections)
        total = torch.zeros((), device=states[0].device)
        for site, mine, teachers in zip(self.sites, states, taught, strict=True):
            wide = torch.promote_types(mine.dtype, torch.float32)
            a, b = mine.flatten(0, -2).to(wide), teachers.flatten(0, -2).to(wide)
            with torch.autocast(a.device.type, enabled=False):
                mapped = a @ maps[site].to(a).T  # [N, K]
            if self.distance == "cosine":
                total = total + (1 - nn.functional.cosine_similarity(mapped, b, dim=-1))
            else:
                total = total + (mapped - b).square().mean(-1)
        return total


@torch.no_grad()
def fit_projections(
    student: HookedCausalLM,
    teacher: HookedCausalLM,
    batches: Sequence[Batch],
    sites: Sequence[str],
    file: str | os.PathLike[str],
    *,
    ridge: float = 1e-6,
) -> dict[str, Float[Tensor, "K M"]]:
    """The linear maps from the student's states to the teacher's of least squares over `batches`, written to `file`.

    `ridge` is added to the diagonal of the student's second moments, relative to their mean, so that states that do not
    span their space have a map too. Both models are left as they are. Raises InputError for a site that a model does
    not have, and for no batches.
    """
    if not batches:
        raise InputError("a projection is fitted on a batch or more, but there is none")
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        read = []
        for model in (student, teacher):
            with model.measuring():
                read.append(model.run_with_cache(batch, names_filter=list(sites))[1])
        for site in sites:
            x, y = (cache[site].flatten(0, -2).double().cpu() for cache in read)  # [N, M], [N, K]
            squares, products = moments.get(site, (0, 0))
            moments[site] = (squares + x.T @ x, products + x.T @ y)
    maps = {site: _least_squares(*moments[site], ridge) for site in sites}
    save_file({site: map_.contiguous() for site, map_ in maps.items()}, file)
    return maps


def _least_squares(squares: Tensor, products: Tensor, ridge: float) -> Tensor:
    diagonal = torch.eye(len(squares), dtype=squares.dtype) * squares.diagonal().mean() * ridge
    return torch.linalg.solve(squares + diagonal, products).T


def _maps(file: str) -> Mapping[str, Tensor]:
    try:
        return _read(file, Path(file).stat().st_mtime_ns)
    except Exception as error:  # safetensors has classes of its own
        raise InputError(f"cannot read projections {file!r}: {error}") from error


@lru_cache(maxsize=4)
def _read(file: str, changed: int) -> Mapping[str, Tensor]:
    return load_file(file)
