"""Distance of the student's hidden states from a teacher's, as LongReD takes it (arXiv 2502.07365)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rope_probe.distillation.terms.base import StateTerm
from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM


@dataclass(frozen=True)
class HiddenStates(StateTerm):
    """How far the student's hidden states are from the teacher's, summed over `sites`, averaged over all positions.

    `distance` "cosine" is 1 - cosine similarity; "mse" the mean over the width of the squared difference, in squared
    units of the residual stream. Raises InputError for another distance, and where widths differ.
    """

    teacher: str = "teacher"
    distance: Literal["cosine", "mse"] = "cosine"
    kind: Literal["hidden"] = "hidden"

    metric: ClassVar[str] = "hidden"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance not in ("cosine", "mse"):
            raise InputError(f"hidden states are compared by cosine or mse, but distance is {self.distance!r}")

    def check(self, student: HookedCausalLM, teacher: HookedCausalLM | None) -> None:
        """Raises InputError for a site that a model does not have, and for models of different width."""
        super().check(student, teacher)
        if teacher is not None and student.config.hidden_size != teacher.config.hidden_size:
            raise InputError(
                f"hidden states are {student.config.hidden_size} wide in the student, {teacher.config.hidden_size} in "
                f"the teacher {self.teacher!r}"
            )

    def values(
        self, states: Sequence[Float[Tensor, "*rows M"]], taught: Sequence[Float[Tensor, "*rows M"]] | None
    ) -> Float[Tensor, " N"]:
        """Distance at each position, of states site by site. Raises InputError where widths differ."""
        assert taught is not None
        total = torch.zeros((), device=states[0].device)
        for site, mine, teachers in zip(self.sites, states, taught, strict=True):
            if mine.shape != teachers.shape:
                raise InputError(f"{site} is {mine.shape[-1]} wide in the student, {teachers.shape[-1]} in the teacher")
            wide = torch.promote_types(mine.dtype, torch.float32)
            a, b = mine.flatten(0, -2).to(wide), teachers.flatten(0, -2).to(wide)
            if self.distance == "cosine":
                total = total + (1 - nn.functional.cosine_similarity(a, b, dim=-1))
            else:
                total = total + (a - b).square().mean(-1)
        return total
