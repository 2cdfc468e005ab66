"""What a run was made from: its models by their weights, and what they read by its tokens, masks and positions."""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

Positions = Literal["continuous", "reset", "skipped"]


class Tokens(Protocol):
    """A window, or a batch of them."""

    @property
    def tokens(self) -> Tensor:
        """Token ids, [B, T]."""

    @property
    def position_ids(self) -> Tensor:
        """The position of each, [B, T]."""


@dataclass(frozen=True)
class Model:
    """A model: its type, rope parameters in full, size, and what it was.

    One that was loaded has a dtype and a hash of its weights, and the kernel it ran by if it ran. One that was read
    from its files has their hashes instead. `origin` says where it comes from, where its name does not.
    """

    model_type: str
    rope_parameters: dict[str, Any]
    parameters: int
    dtype: str | None = None
    weights_sha256: str | None = None
    files_sha256: dict[str, str] | None = None
    attention_kernel: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class Read:
    """Tokens that models read: a hash of their ids, whether attention stayed inside documents, and how positions run.

    `teacher_masked` and `teacher_positions` are those of a teacher that read them too.
    """

    tokens_sha256: str
    masked: bool = False
    positions: str = "continuous"
    teacher_masked: bool | None = None
    teacher_positions: str | None = None


@dataclass
class Provenance:
    """What a manifest says of how its numbers came about: models, their teachers, and what was read, by name."""

    models: dict[str, Model] = field(default_factory=dict)
    teachers: dict[str, Model] = field(default_factory=dict)
    read: dict[str, list[Read]] = field(default_factory=dict)

    def add_model(self, name: str, model: Any, *, kernel: str | None = None, origin: str | None = None) -> Model:
        """A model by name: a HookedCausalLM, which knows its kernel, or a plain one. Returns what is said of it."""
        plain = getattr(model, "original_model", model)
        described = describe_model(plain, kernel=kernel or getattr(model, "attn", None), origin=origin)
        self.models[name] = described
        return described

    def add_tokens(
        self,
        name: str,
        tokens: Tokens,
        *,
        masked: bool = False,
        teacher_masked: bool | None = None,
        teacher_positions: str | None = None,
    ) -> None:
        """A window or batch that was read, by name; several of one name, or read in several ways, are listed."""
        self.add_read(
            name,
            Read(hash_tokens(tokens.tokens), masked, positions_of(tokens), teacher_masked, teacher_positions),
        )

    def add_read(self, name: str, read: Read) -> None:
        """What was read, by name, where its hash is known."""
        entries = self.read.setdefault(name, [])
        if read not in entries:
            entries.append(read)

    def as_manifest(self) -> dict[str, Any]:
        """Its entries in a manifest: `models`, `teachers` and `read`."""
        return asdict(self)


def describe_model(model: PreTrainedModel, *, kernel: str | None = None, origin: str | None = None) -> Model:
    """What a manifest says of a model. The hash is over names and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Model(
        model_type=model.config.model_type,
        rope_parameters=dict(model.config.rope_parameters),
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(next(model.parameters()).dtype),
        weights_sha256=digest.hexdigest(),
        attention_kernel=kernel,
        origin=origin,
    )


def hash_tokens(tokens: Tensor) -> str:
    """SHA-256 of token ids, whatever their integer type."""
    return hashlib.sha256(tokens.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def positions_of(tokens: Tokens) -> Positions:
    """How positions run: one after the other, from 0 in every document, or with jumps."""
    positions = tokens.position_ids.cpu()  # [B, T]
    steps = positions.diff(dim=-1)
    if (steps == 1).all():
        return "continuous"
    restarts = positions[..., 1:] == 0
    return "reset" if ((steps == 1) | restarts).all() else "skipped"
