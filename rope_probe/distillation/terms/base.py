"""What every term of an objective says of itself, and the kinds of terms that a configuration can name.

A new term is a frozen dataclass derived from `LogitTerm` or `StateTerm`, with a `kind` and a method `values`. Defining
it makes it known, inside this package or outside of it:

    @dataclass(frozen=True)
    class Entropy(LogitTerm):
        kind: Literal["entropy"] = "entropy"

        def values(self, logits, targets, taught):
            return torch.special.entr(logits.softmax(-1)).sum(-1)

Shape letters: B windows, T positions of each, N = B x T positions of all, n positions of a chunk, V vocabulary, W the
teacher's vocabulary, M width, K the teacher's width.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union

from jaxtyping import Bool, Float, Int
from pydantic import Discriminator, GetCoreSchemaHandler
from torch import Tensor

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.ranges import NotNegative, require_ranges

IGNORED = -100
"""The target of a position that has none."""

_KINDS: dict[str, type["Term"]] = {}
_RESERVED = {"step", "tokens", "loss", "lr", "phase", "time", "gate", "missed_gate", "tokens_per_s"}
"""What a record holds besides terms."""


@dataclass(frozen=True)
class Counts:
    """Positions of all windows that a stream reads in one step; how many of them have a target, and how many `moved`.

    A position is moved where the student stands at another one than its teachers.
    """

    positions: int
    targets: int
    moved: int = 0


@dataclass(frozen=True)
class Term:
    """One summand of an objective: a value at every position, averaged over positions, times `weight`.

    `teacher` is the name of the teacher that it reads, None for none. A term of weight 0 is measured and adds nothing.
    Its mean stands in records under `metric`, which is its kind where it names none. `averaged_over` says which
    positions the mean is over: all, those with a target, or those that moved (values at the others must then be 0).
    With `by_distance` the mean is also told by how many tokens ago a position's token last occurred, under
    `METRIC_by_distance`.

    Raises InputError for a weight that is negative or not finite; a subclass, for a kind or metric that is taken.
    """

    weight: NotNegative = 1.0
    teacher: str | None = None

    metric: ClassVar[str]
    averaged_over: ClassVar[Literal["positions", "targets", "moved"]] = "positions"
    by_distance: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        kind = cls.__dict__.get("kind")
        if kind is None:
            return  # a class to derive terms from
        if "metric" not in cls.__dict__:
            cls.metric = kind
        if not re.fullmatch(r"[a-z]\w*", cls.metric) or cls.metric in _RESERVED or cls.metric.startswith("grad_norm"):
            raise InputError(f"metric {cls.metric!r} of term {cls.__name__} is taken or no name; give another `metric`")
        for other in _KINDS.values():
            same_class = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            if not same_class and (other.metric == cls.metric or _KINDS.get(kind) is other):
                raise InputError(f"kind {kind!r} or metric {cls.metric!r} of {cls.__name__} is {other.__name__}'s")
        _KINDS[kind] = cls

    def __post_init__(self) -> None:
        require_ranges(self, self.kind)

    @property
    def kind(self) -> str:
        """What a configuration calls it; a field of every term."""
        raise NotImplementedError

    def check(self, student: HookedCausalLM, teacher: HookedCausalLM | None) -> None:
        """Raises InputError where this student and teacher cannot be compared; terms add what they ask for."""

    def of_counted(self, values: Float[Tensor, " n"], has_target: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
        """`values`, with 0 at positions that the mean leaves out."""
        return values.where(has_target, 0) if self.averaged_over == "targets" else values

    def mean(self, values: Float[Tensor, " n"], counts: Counts) -> Float[Tensor, ""]:
        """What these positions add to the mean over the whole step."""
        return values.sum() / max(getattr(counts, self.averaged_over), 1)

    def loss(self, values: Float[Tensor, " n"], counts: Counts, factor: float) -> Float[Tensor, ""]:
        """What these positions add to the loss of the step, of which the stream is `factor`."""
        return factor * self.weight * values.sum() / max(getattr(counts, self.averaged_over), 1)


@dataclass(frozen=True)
class LogitTerm(Term):
    """A term that reads logits. It gets them in chunks of positions, never those of a whole window."""

    def values(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], taught: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, " n"]:
        """The value at each position, differentiable in `logits`. `taught` are the teacher's, None without one.

        A target of -100 is none.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StateTerm(Term):
    """A term that reads states at `sites`, TransformerLens hook names of [B, T, M]: "blocks.3.hook_resid_post".

    Raises InputError where there is no site.
    """

    sites: tuple[str, ...] = ("ln_final.hook_out",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sites:
            raise InputError(f"{self.kind} needs a site, such as ln_final.hook_out, but has none")

    def check(self, student: HookedCausalLM, teacher: HookedCausalLM | None) -> None:
        """Raises InputError for a site that a model does not have."""
        for role, model in (("student", student), (f"teacher {self.teacher!r}", teacher)):
            for site in self.sites:
                if model is not None and site not in model.hook_dict:
                    raise InputError(f"the {role} has no site {site!r}; ln_final.hook_out is one it has")

    def values(
        self, states: Sequence[Float[Tensor, "*rows M"]], taught: Sequence[Float[Tensor, "*rows K"]] | None
    ) -> Float[Tensor, " N"]:
        """The value at each position, of states site by site. `taught` are the teacher's, None without one."""
        raise NotImplementedError


class AnyKind:
    """Marks a field that takes any term known when the configuration is read, chosen by `kind`."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        for term in _KINDS.values():
            if "kind" not in {field.name for field in dataclasses.fields(term)}:
                raise InputError(f"term {term.__name__} must be a dataclass; write @dataclass(frozen=True) above it")
        known: Any = Union[tuple(_KINDS.values())]  # noqa: UP007  (made of what is known now)
        return handler.generate_schema(Annotated[known, Discriminator("kind")])


def labels(terms: Sequence[Term]) -> list[str]:
    """What each term's mean is called in a record: its metric, with a suffix where several of `terms` share it.

    The suffix is the teacher's name where that tells them apart, else a number from 1 on.
    """
    names = []
    for index, term in enumerate(terms):
        alike = [other for other in terms if other.metric == term.metric]
        if len(alike) == 1:
            names.append(term.metric)
        elif len({other.teacher for other in alike}) == len(alike):
            names.append(f"{term.metric}.{term.teacher}")
        else:
            before = sum(other.metric == term.metric for other in terms[:index])
            names.append(f"{term.metric}.{before + 1}")
    return names
