"""Recorded steps: a step's native calls on a tape, replayed in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quire.hardware import CapturedStep
from quire_cpu import _native, native

log = logging.getLogger("quire.cpu")

_VIEWS = frozenset(
    {"view", "_unsafe_view", "slice", "split", "split_with_sizes", "select", "unsqueeze", "squeeze", "expand", "alias",
     "detach", "reshape", "_reshape_alias", "t", "transpose", "permute", "as_strided", "empty", "unbind", "lift_fresh"}
)  # fmt: skip
"""Operations of torch that compute nothing: they may stand between native calls without being replayed."""


class NotRecordable(Exception):
    """A step computes something by torch, which a tape of native calls would leave out."""


class _Refuse(TorchDispatchMode):
    """While a step is recorded: what computes by torch is refused."""


def _only_views(mode: _Refuse, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    name = func.overloadpacket.__name__
    if name not in _VIEWS:
        raise NotRecordable(name)
    return func(*args, **(kwargs or {}))


# Set, not defined in the class: what a class defines torch wraps in something that imports its compiler at the first
# call, which would take a second of the first request.
_Refuse.__torch_dispatch__ = _only_views  # type: ignore[assignment]


class Recorded(CapturedStep):
    """A tape, and what its calls refer to: the function with all it closes over, and the arena."""

    def __init__(self, fn: Callable[[], Tensor], arena: native.Arena) -> None:
        self.fn, self.arena, self.tape = fn, arena, _native.Tape()
        with native.recording(self.tape, arena), _Refuse():
            out = fn()
        # Its memory goes back to the arena, so that a result takes the room of the largest bucket, not of them all.
        self.out = native.borrow(out.data_ptr(), tuple(out.shape), out.dtype)

    def replay(self) -> Tensor:
        self.tape.replay()
        return self.out


def capture(fn: Callable[[], Tensor], arena: native.Arena) -> Recorded | None:
    """Record ``fn``; None when something in it is not a native call."""
    try:
        return Recorded(fn, arena)
    except NotRecordable as error:
        log.info("decode steps are not recorded: they use torch's %s", error)
        return None
