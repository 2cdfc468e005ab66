"""What part of a distillation's signal a perturbation of the teacher takes away: in its loss and in its gradients."""

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rope_probe.distillation.student import by_distance
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.parameters import query_key_value_rows
from rope_probe.runs.tables import Metric, declare
from rope_probe.tracing.perturbations import Perturbation
from rope_probe.windows.packing import Window

_BLOCK = 256
SIGNAL = declare(
    "signal",
    "What part of a distillation's signal a perturbation of the teacher takes away.",
    (
        "seq_len", "document", "position", "distance", "occurrence", "perturbation", "kind", "side", "delta_tokens",
        "layer", "site",
    ),
    {
        "signal_kl_nats": Metric("KL of the teacher's distribution from the perturbed teacher's", "nats"),
        "loss_kl_nats": Metric("KL of the teacher's distribution from the student's", "nats"),
        "remaining_kl_nats": Metric("KL of the perturbed teacher's distribution from the student's", "nats"),
        "signal_kl_nats_at": Metric("the first of these, at one position", "nats"),
        "loss_kl_nats_at": Metric("the second, at one position", "nats"),
        "remaining_kl_nats_at": Metric("the third, at one position", "nats"),
        "loss_gradient": Metric("Frobenius norm of the loss's gradient in a matrix of the student"),
        "signal_gradient": Metric("norm of what the perturbation takes from that gradient"),
        "gradient_cosine": Metric("cosine of these two gradients"),
        "remaining_gradient": Metric("norm of the gradient of the loss against the perturbed teacher"),
        "remaining_gradient_cosine": Metric("cosine of that gradient and the loss's"),
    },
)  # fmt: skip
Gradients = dict[tuple[int, str], Tensor]


def distillation_signal(
    teacher: HookedCausalLM,
    student: HookedCausalLM,
    window: Window,
    perturbations: Perturbation | Iterable[Perturbation],
    *,
    masked: bool = False,
) -> pd.DataFrame:
    """How much of what a student is taught on a window hangs on what a perturbation takes from the teacher.

    With p the teacher's next-token distribution, p' that of the perturbed teacher and s the student's, rows are

    - `loss_kl_nats`, KL(p || s), and `remaining_kl_nats`, KL(p' || s), what is left of the loss when the teacher has
      lost what the perturbation takes: see `signal_share`. Beside them `signal_kl_nats`, KL(p || p'), which is no part
      of either. Means over the window, and by `occurrence` of a position's token ("new", or "again" after `distance`
      tokens, the upper end of a bin that doubles); with `_at` after the name, the same of each `position`;
    - by layer, at the sites `blocks.{i}.attn.W_Q|W_K|W_V` of the student: `loss_gradient`, the Frobenius norm of the
      gradient of the mean of KL(p || s); `signal_gradient`, that of what the perturbation takes from it, the gradient
      of KL(p || s) less that of KL(p' || s); and `gradient_cosine` between the two. `remaining_gradient` is the norm of
      that of KL(p' || s), `remaining_gradient_cosine` its cosine with the loss's: near 1, the student is taught much
      the same without.

    `masked` keeps the teacher's attention inside documents. Vocabularies of different size are cut to the shared part.
    Only final hidden states are held over the whole window, logits block by block.
    """
    perturbations = [perturbations] if isinstance(perturbations, Perturbation) else list(perturbations)
    with torch.no_grad(), teacher.measuring():
        clean = teacher.hidden(window, masked=masked)
        perturbed = []
        for perturbation in perturbations:
            with teacher.hooks(fwd_hooks=perturbation.hooks(teacher, window)):
                perturbed.append(teacher.hidden(window, masked=masked))
    with torch.enable_grad(), student.measuring():
        learned = student.hidden(window)
    parts = [_pull(teacher, student, learned.detach(), clean, other) for other in [None, *perturbed]]
    _, loss_kl, of_loss = parts[0]
    loss = _gradients(student, learned, of_loss)
    rows = list(_where("loss_kl_nats", loss_kl, window, {}))
    for perturbation, (kl, remaining_kl, pull) in zip(perturbations, parts[1:], strict=True):
        perturbed_by = {
            "perturbation": str(perturbation),
            "kind": type(perturbation).__name__,
            "side": perturbation.side,
        }
        perturbed_by["delta_tokens"] = perturbation.delta_tokens  # type: ignore[assignment]
        rows += _where("signal_kl_nats", kl, window, perturbed_by)
        rows += _where("remaining_kl_nats", remaining_kl, window, perturbed_by)
        for key, taken in _gradients(student, learned, pull).items():
            layer, matrix = key
            place = {**perturbed_by, "layer": layer, "site": f"blocks.{layer}.attn.W_{matrix.upper()}"}
            remaining = loss[key] - taken
            for metric, value in (
                ("signal_gradient", taken.norm()),
                ("loss_gradient", loss[key].norm()),
                ("gradient_cosine", _cosine(taken, loss[key])),
                ("remaining_gradient", remaining.norm()),
                ("remaining_gradient_cosine", _cosine(remaining, loss[key])),
            ):
                rows.append({**place, "metric": metric, "value": value.item()})
    return SIGNAL.frame(rows).assign(seq_len=len(window))


def signal_share(frame: pd.DataFrame) -> pd.DataFrame:
    """What part of each student's loss goes with what a perturbation takes from the teacher: 1 - remaining / loss.

    `frame` is of the table `signal`. Rows by whatever of `model`, `seed`, `perturbation`, `occurrence` and `distance`
    it has, with the columns `loss_kl_nats`, `remaining_kl_nats` and `share`. 1 where nothing is left of the loss, 0
    where as much is left, below 0 where the student is farther from the perturbed teacher than from the teacher.
    """
    keys = [column for column in ("model", "seed", "occurrence", "distance") if column in frame]
    losses = frame[frame["metric"] == "loss_kl_nats"][[*keys, "value"]].rename(columns={"value": "loss_kl_nats"})
    remaining = frame[frame["metric"] == "remaining_kl_nats"][[*keys, "perturbation", "value"]]
    both = remaining.rename(columns={"value": "remaining_kl_nats"}).merge(losses, on=keys)
    return both.assign(share=1 - both["remaining_kl_nats"] / both["loss_kl_nats"])


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum() / (x.norm() * y.norm())


def _pull(
    teacher: HookedCausalLM, student: HookedCausalLM, learned: Tensor, clean: Tensor, perturbed: Tensor | None
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"], Float[Tensor, "1 T M"]]:
    """Per position, KL(p || p'), KL(p' || s), and the gradient that p' takes from that of the student's states.

    Without a perturbation p' is p, and it is the whole gradient.
    """
    taken_away, losses, gradients = [], [], []
    shared = min(teacher.config.vocab_size, student.config.vocab_size)
    others = [None] * clean.shape[1] if perturbed is None else perturbed.split(_BLOCK, 1)
    for block, h, other in zip(learned.split(_BLOCK, 1), clean.split(_BLOCK, 1), others, strict=False):
        block.requires_grad_()
        with torch.enable_grad():
            logs = student.unembed(block)[..., :shared].log_softmax(-1)
        with torch.no_grad():
            p = teacher.unembed(h)[..., :shared].log_softmax(-1)
            q = p if other is None else teacher.unembed(other)[..., :shared].log_softmax(-1)
            taken_away.append((p.exp() * (p - q)).sum(-1)[0])
            losses.append((q.exp() * (q - logs)).sum(-1)[0])
            weight = p.exp() if other is None else p.exp() - q.exp()
        gradients.append(torch.autograd.grad(logs, block, -weight / learned.shape[1])[0])
    return torch.cat(taken_away), torch.cat(losses), torch.cat(gradients, 1)


def _gradients(student: HookedCausalLM, learned: Tensor, pull: Tensor) -> Gradients:
    model = student.original_model
    rows = {
        (layer, name): part
        for layer in range(len(student.blocks))
        for name, part in query_key_value_rows(model, layer).items()
    }
    weights = list({id(part.weight): part.weight for part in rows.values()}.values())
    gradients = torch.autograd.grad(learned, weights, pull, retain_graph=True)
    of_weight = {id(weight): gradient for weight, gradient in zip(weights, gradients, strict=True)}
    return {key: of_weight[id(part.weight)][part.rows] for key, part in rows.items()}


def _where(metric: str, values: Tensor, window: Window, columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {**columns, "metric": metric, "value": values.mean().item()}
    for position, (document, value) in enumerate(zip(window.document_of.tolist(), values.tolist(), strict=True)):
        yield {**columns, "metric": f"{metric}_at", "document": document, "position": position, "value": value}
    for k, (total, count) in enumerate(by_distance(values, window.tokens).T.tolist()):
        if count:
            last_seen = {"occurrence": "again", "distance": 2 ** (k - 1)} if k else {"occurrence": "new"}
            yield {**columns, **last_seen, "metric": metric, "value": total / count}
