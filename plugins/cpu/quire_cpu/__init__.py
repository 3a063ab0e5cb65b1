"""Quire on the CPU. Importing this registers the devices and touches nothing.

``cpu`` computes with native kernels; where they were not built it is ``cpu-torch``, which any machine can be asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from quire.hardware import Backend, hookimpl


def make_torch() -> Backend:
    """The form that needs nothing but torch."""
    from quire_cpu.backend import CpuBackend

    return CpuBackend()


def make() -> Backend:
    """The native form where its extension was built, else the torch form, with one line that says so."""
    try:
        from quire_cpu.native_backend import NativeCpuBackend
    except ImportError as error:
        logging.getLogger("quire.cpu").warning(
            "no native kernels (%s): computing with torch, which is slower; a C++ compiler and "
            "`pip install --force-reinstall --no-deps quire-plugin-cpu` build them", error,
        )  # fmt: skip
        return make_torch()
    return NativeCpuBackend()


def begin(weights: int, largest: int) -> None:
    """Have memory for a model's weights made ready while torch is imported: clearing a gigabyte takes as long.

    The thread stays ``largest`` bytes back, so that a weight on its way has room and the peak is no higher. Not on a
    machine with several memory nodes, where the threads that will use a page should touch it first.
    """
    try:
        from quire_cpu import _native
    except ImportError:
        return
    from quire_cpu.memory import cores, memory
    from quire_cpu.placement import place

    if place(cores()).nodes:
        return
    ready = min(weights, memory().free // 2)  # a model that does not fit is refused later, by name
    _native.begin_buffers(ready, max(0, ready - largest))


@hookimpl
def quire_register_backends(register: Callable[..., None]) -> None:
    register("cpu", make, begin)
    register("cpu-torch", make_torch)
