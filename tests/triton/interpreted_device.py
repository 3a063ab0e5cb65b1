"""A device for tests: the Triton kernels under Triton's interpreter, on host memory.

It shows that the kernels compute what they should, and nothing of how a GPU runs them. Triton reads TRITON_INTERPRET
when it is imported, so this is used in a process of its own.

The interpreter hands a product of tiles to the host's BLAS, which sums the columns at a tile's edge in another order than the
rest, so that a row's bits would depend on its place in the tile. A matrix unit knows no such edge: here too each sum of
a tile goes through its factors in their order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import numpy as np
import torch

from quire.hardware import Capabilities, DeviceInfo, DeviceOptions, MemoryInfo
from quire.quantization import FORMATS
from quire_triton.backend import KV_DTYPES, LATENT_SIZES, TritonOps


def in_order(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """a [..., m, k] @ b [..., k, n], each sum from the first of k to the last, rounded to ``dtype`` at every step."""
    a, b = a.astype(dtype or a.dtype), b.astype(dtype or b.dtype)
    out = np.zeros((*a.shape[:-1], b.shape[-1]), dtype=a.dtype)
    for k in range(a.shape[-1]):
        out += a[..., k, None] * b[..., k, None, :]
    return out


@functools.cache
def sum_in_order() -> None:
    """Let the interpreter's products of tiles be those of :func:`in_order`."""
    from triton.runtime.interpreter import InterpreterBuilder

    theirs = InterpreterBuilder.create_dot

    def create_dot(self: Any, *arguments: Any) -> Any:
        with mock.patch.object(np, "matmul", in_order):
            return theirs(self, *arguments)

    InterpreterBuilder.create_dot = create_dot


class Interpreted(TritonOps):
    name = "interpreted"
    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        kv_dtypes=KV_DTYPES,
        latent_sizes=LATENT_SIZES,
        page_sizes=frozenset({8, 16, 32, 64, 128, 256}),
        head_sizes=(32, 256),
        quantization=frozenset(FORMATS),
    )

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        super().open(index, options)
        if self.without_kernels is None:
            sum_in_order()
        # The formats of every architecture, whatever host memory counts as.
        self.capabilities = dataclasses.replace(type(self).capabilities, batch_invariant=options.batch_invariant)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo(0, "Triton's interpreter")]

    def memory(self, index: int = 0) -> MemoryInfo:
        return MemoryInfo(1 << 30, 1 << 30)
