"""Tensors to the device and back, order of work, page sizes in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.conformance.world import Shape
from quire.reference import torch_dtype
from quire.spec import KVGroupSpec


@pytest.mark.parametrize("dtype_name", ["int32", "int64", "float32", "float64", "bool"])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5)])
def test_to_device(backend, dtype_name, shape):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype_name)
    there = backend.to_device(array)
    assert there.device.type == backend.device.type
    assert there.shape == shape
    np.testing.assert_array_equal(there.cpu().numpy(), array)
    assert there.cpu().numpy().dtype == array.dtype


def test_to_device_is_a_copy(backend):
    array = np.arange(1000)
    there = backend.to_device(array)
    array[:] = -1
    backend.synchronize()
    assert torch.equal(there.cpu(), torch.arange(1000)), "the caller wrote to its array and the device saw it"


def test_work_is_ordered_by_streams_and_events(backend):
    x = torch.ones(512, 512, device=backend.device)
    backend.synchronize()
    with backend.stream():
        for _ in range(20):
            x = x @ x / 512
        event = backend.event()
    event.synchronize()
    assert torch.equal(x.cpu(), torch.ones(512, 512))
    backend.synchronize()


def test_page_bytes_cover_what_a_page_holds(backend, page_size, kv_dtype):
    def group(layers: int, size: int = page_size, heads: int = 2) -> KVGroupSpec:
        return KVGroupSpec(tuple(range(layers)), heads, 64, kv_dtype, size)

    one = backend.page_bytes(group(1))
    raw = 2 * page_size * 2 * 64 * torch_dtype(kv_dtype).itemsize
    assert raw <= one <= 2 * raw, f"a page of {raw} bytes of keys and values is said to take {one}"
    assert backend.page_bytes(group(3)) >= 3 * raw
    assert backend.page_bytes(group(1, heads=4)) >= 2 * raw


def test_pools_on_the_device_and_in_host_memory(backend, primary_kv, size):
    spec = Shape(page_size=size, kv_dtype=primary_kv).kv()
    assert backend.allocate_kv(spec, [4]) is not None
    assert backend.allocate_kv(spec, [1], host=True) is not None


def test_pages_are_named_for_every_group(backend, primary_kv, size):
    spec = Shape(page_size=size, kv_dtype=primary_kv).kv()
    with pytest.raises((ValueError, IndexError)):
        backend.allocate_kv(spec, [])
