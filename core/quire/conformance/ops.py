"""Calling one operation on the device and in float64 with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.conformance.world import Float64, close
from quire.hardware import Backend
from quire.reference import torch_dtype


@dataclass
class Wide:
    """A float tensor that is float32 on every device, whatever the dtype under test."""

    value: Tensor


@dataclass
class Weight:
    """A raw weight, which each side packs for itself, in ``format``."""

    value: Tensor
    format: str = "dense"


TRUTH = Float64()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def prepare(backend: Backend, dtype: str, argument: Any, true: bool) -> Any:
    """An argument as one side takes it: rounded to the dtype under test, in float64 for the true side."""
    own = torch_dtype(dtype)
    if isinstance(argument, Weight):
        return backend.pack_weight({"weight": prepare(backend, dtype, argument.value, true)}, argument.format)
    if isinstance(argument, Wide):
        return argument.value.double() if true else argument.value.to(backend.device)
    if isinstance(argument, Tensor):
        if not argument.is_floating_point():
            return argument.clone().to(backend.device)
        rounded = argument.to(own)
        return rounded.double() if true else rounded.clone().to(backend.device)
    return argument


def both(
    backend: Backend, dtype: str, call: Callable[..., Any], *arguments: Any, factor: float = 1.0, out: str | None = None
) -> tuple[Tensor, ...]:
    """Assert that ``call(backend, *arguments)`` gives what it gives in float64, in the right dtype, and leaves its
    arguments as they were. Returns what the device gave."""
    mine = [prepare(backend, dtype, a, true=False) for a in arguments]
    before = [a.clone() if isinstance(a, Tensor) else a for a in mine]
    given = call(backend, *mine)
    backend.synchronize()
    expected = call(TRUTH, *(prepare(TRUTH, dtype, a, true=True) for a in arguments))
    given, expected = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (given, expected))
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        what = f"result {i}" if len(given) > 1 else "the result"
        if b.is_floating_point():
            wanted = torch_dtype(out or dtype)
            assert a.dtype == wanted, f"{what} is {a.dtype}, should be {wanted}"
            close(a, b, dtype, factor, what)
        else:
            assert torch.equal(a.cpu(), b), f"{what} differs"
    for a, b in zip(mine, before, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), "an argument was changed"
    return given
