"""Float64 that stays float64.

transformers asks for float32 by name inside its norms, softmaxes and rotary angles. In a bfloat16 model that is an
upcast; in a float64 model it is a *downcast*, and the control loses nine digits. Inside `promote_float32` each such
request gets float64 instead, so transformers' own code runs unchanged in double precision.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DOUBLE = {torch.float32: torch.float64}
_suspended = ContextVar("_suspended", default=False)


class promote_float32(TorchFunctionMode):  # noqa: N801  (a context manager, used like a function)
    """Within it, every float32 that torch is asked for becomes float64."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _suspended.get():
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            func = Tensor.double
        promoted = {name: self._promote(value) for name, value in (kwargs or {}).items()}
        return func(*(self._promote(value) for value in args), **promoted)

    @staticmethod
    def _promote(value: Any) -> Any:
        return _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def keep_float32() -> Iterator[None]:
    """Within it, float32 means float32 even inside `promote_float32`: for what is float32 by definition."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)
