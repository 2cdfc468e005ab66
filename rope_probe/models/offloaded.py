"""Models whose weights accelerate keeps elsewhere, on other devices, in memory or on disk, until a module runs.

accelerate does so by hooks of its own (`_hf_hook`) on modules: one loads a module's weights before its forward, and
drops them after it. Weights that are away are on torch's meta device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from rope_probe.errors import InputError
from rope_probe.precision import keep_float32

DISK = "disk"
"""accelerate's name for a place of weights; as a `device_map`, all of them are left on disk."""


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves a model's weights or inputs, so that it must stay where it is."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of a model's weights are away until they are needed."""
    return any(hook.offload for module in model.modules() for hook in _align_hooks(module))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module; None where it is not accelerate that decides."""
    devices = [hook.execution_device for hook in _align_hooks(module) if hook.execution_device is not None]
    if not devices:
        return None
    return torch.device("cuda", devices[0]) if isinstance(devices[0], int) else torch.device(devices[0])


def require_in_memory(model: nn.Module, what: str, remedy: str) -> None:
    """Raises InputError for a model that accelerate dispatched: it has no copy and no other dtype."""
    if is_dispatched(model):
        raise InputError(f"{what} needs the whole model in one place, but accelerate dispatched this one; {remedy}")


@contextmanager
def weights_in_place(*modules: nn.Module) -> Iterator[None]:
    """Within it, the weights of some modules are there, loaded once, however often the modules run."""
    held: list[tuple[nn.Module, AlignDevicesHook]] = []
    try:
        for module in modules:
            for part in module.modules():
                for hook in _align_hooks(part):
                    if hook.offload:
                        hook.pre_forward(part)  # loads
                        hook.offload = False  # ... and now it neither loads nor drops
                        held.append((part, hook))
        yield
    finally:
        for part, hook in held:
            hook.offload, hook.input_device = True, None
            hook.post_forward(part, None)  # drops


def keep_stored_dtype(model: nn.Module) -> None:
    """Have a model's weights fetched as they are stored, even inside `promote_float32`.

    safetensors asks for float32 by name to say what the bytes of a file are.
    """
    for module in model.modules():
        for hook in _align_hooks(module):
            if hook.offload:
                hook.pre_forward = keep_float32()(hook.pre_forward)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have a dispatched model compute in `dtype`; weights that are away keep their files and are converted if fetched.

    accelerate gives a weight the dtype of what stands for it on the meta device.
    """
    converted: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter not in converted:
                converted[parameter] = nn.Parameter(parameter.data.to(dtype), requires_grad=parameter.requires_grad)
            if parameter in converted:
                setattr(module, name, converted[parameter])


def map_to_disk(rotary_module: str, device: torch.device) -> dict[str, Any]:
    """The device map that leaves all weights on disk and computes on `device`; `rotary_module` is the name of one.

    accelerate computes where something of the map is that is neither on disk nor on the CPU. The module that makes cos
    and sin has no weights.
    """
    return {"": DISK, rotary_module: str(device)}


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in hooks if isinstance(one, AlignDevicesHook)]
