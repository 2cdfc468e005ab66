"""Names of hook points as users write them: TransformerLens' short forms, and what is near to a misspelt one."""

from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any

from torch import Tensor
from transformer_lens.utilities import get_act_name

from rope_probe.errors import InputError

_EAGER_ONLY = ("hook_attn_scores", "hook_pattern")


class Cache(dict[str, Tensor]):
    """Activations by the names of their hook points, and by TransformerLens' short forms of them.

    `cache["resid_post", 7]` is `cache["blocks.7.hook_resid_post"]`, and `cache["embed"]` is `cache["hook_embed"]`.
    Raises InputError for a name that is not in it.
    """

    def __missing__(self, key: Any) -> Tensor:
        name = full_name(key)
        require_known(name, self, "was not cached")
        return super().__getitem__(name)


def full_name(key: str | tuple) -> str:
    """A hook point's name from its short form: a name, or a name and a layer, or these and what in the layer.

    Raises InputError for what is none of these.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
        raise InputError(f"{key!r} names no activation; write 'hook_embed', or ('resid_post', 7) for one of a layer")
    return get_act_name(*parts)


def require_known(name: str | Callable[[str], bool], names: Collection[str], problem: str = "is unknown") -> None:
    """Raises InputError for a hook point not among `names`, saying which is nearest; a filter is let through."""
    if not isinstance(name, str) or name in names:
        return
    if name.endswith(_EAGER_ONLY) and not any(known.endswith(_EAGER_ONLY) for known in names):
        raise InputError(f"{name} {problem}: scores and patterns are [T, T], and only attn='eager' has them")
    nearest = get_close_matches(name, names, 1, cutoff=0)
    raise InputError(f"hook point {name!r} {problem}; " + (f"did you mean {nearest[0]!r}?" if nearest else "none is"))
