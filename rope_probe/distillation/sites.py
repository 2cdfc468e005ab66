"""Which hidden states a student is held to: the sites that LongReD's restoration sums over (arXiv 2502.07365).

The state after layer l is `blocks.{l}.hook_resid_post`, but for the last layer, whose state is read after the final
norm: `ln_final.hook_out`. So the last entry of transformers' `hidden_states` was counted when LongReD was published.
LongReD's layers {1, 9, 12, 14, 15, 32} of `hidden_states` for Llama-3-8B are `sites_of_layers([0, 8, 11, 13, 14, 31],
32)`.
"""

from collections.abc import Sequence

from rope_probe.errors import InputError


def sites_of_layers(chosen: Sequence[int], layers: int) -> tuple[str, ...]:
    """The sites of states after the `chosen` of a model's `layers`, in their order.

    Raises InputError for a layer that the model does not have, and where there is none.
    """
    for layer in chosen:
        if not 0 <= layer < layers:
            raise InputError(f"layer {layer} is out of range: there are layers 0 to {layers - 1}")
    if not chosen:
        raise InputError("a restoration needs a layer or more, but none was chosen")
    last = layers - 1
    return tuple(
        "ln_final.hook_out" if layer == last else f"blocks.{layer}.hook_resid_post" for layer in sorted(set(chosen))
    )


def sites_by_drift(attention_kl: Sequence[float], count: int) -> tuple[str, ...]:
    """The last layer, and those of the largest attention KL, `count` in all.

    `attention_kl` has a number for each layer, in nats: mean over heads and positions of KL(original || extended).
    Raises InputError for a count that is not between 1 and the number of layers.
    """
    layers = len(attention_kl)
    _require_count(count, layers)
    by_drift = sorted(range(layers - 1), key=lambda layer: -attention_kl[layer])
    return sites_of_layers([*by_drift[: count - 1], layers - 1], layers)


def sites_evenly(layers: int, count: int) -> tuple[str, ...]:
    """`count` layers at equal distances, the last one among them. Raises InputError as `sites_by_drift`."""
    _require_count(count, layers)
    return sites_of_layers([round(layers * (i + 1) / count) - 1 for i in range(count)], layers)


def last_site() -> tuple[str, ...]:
    """The last layer alone."""
    return ("ln_final.hook_out",)


def _require_count(count: int, layers: int) -> None:
    if not 1 <= count <= layers:
        raise InputError(f"between 1 and {layers} layers can be chosen of {layers}, but {count} were asked for")
