"""Who computes a product, what a device offers, and the one piece of a kernel that Triton's interpreter leaves out."""

from __future__ import annotations

import importlib.util
import re
import types

import pytest
import torch

import quire_triton
from quire.hardware import UnsupportedOnDevice
from quire.quantization import FORMATS, head_format
from tests.triton.conftest import needs_triton
from tests.triton.test_plugins import made

WEIGHT_ONLY = {"int8", "int4", "int4-64", "int4-128"}


@pytest.fixture
def opened(monkeypatch):
    """A backend opened on a pretended GPU: (plugin, properties) -> backend."""

    def make(name: str, **properties):
        found = types.SimpleNamespace(name="GPU", multi_processor_count=100, **properties)
        module = types.SimpleNamespace(
            is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: found,
            mem_get_info=lambda index: (1, 1), set_device=lambda index: None,
            get_arch_list=lambda: ["sm_75", "sm_80", "sm_90", "sm_100", "compute_100", "gfx90a", "gfx942", "gfx1100"],
        )  # fmt: skip
        monkeypatch.setattr(torch.version, "hip" if name == "rocm" else name, "99.9", raising=False)
        monkeypatch.setattr(torch, "xpu" if name == "xpu" else "cuda", module)
        if importlib.util.find_spec("triton"):
            import triton.backends

            monkeypatch.setitem(triton.backends.backends, "intel", None)  # as Intel's build has it
        from quire_triton import configs

        configs._architecture.cache_clear()
        backend = made(name)
        backend.open(0)
        return backend

    yield make
    from quire_triton import configs

    configs._architecture.cache_clear()


@pytest.mark.parametrize(
    ("name", "properties", "more"),
    [
        ("cuda", dict(major=8, minor=0), ("w8a8",)),
        ("cuda", dict(major=8, minor=6), ("w8a8",)),
        ("cuda", dict(major=8, minor=9), ("fp8", "w8a8")),
        ("cuda", dict(major=9, minor=0), ("fp8", "w8a8")),
        ("cuda", dict(major=10, minor=3), ("fp8", "w8a8")),
        ("rocm", dict(gcnArchName="gfx90a:sramecc+"), ("w8a8",)),
        ("rocm", dict(gcnArchName="gfx942"), ("fp8", "w8a8")),
        ("rocm", dict(gcnArchName="gfx1100"), ("w8a8",)),
        ("xpu", dict(max_compute_units=1), ()),
    ],
    ids=str,
)
@needs_triton
def test_what_an_architecture_offers(opened, name, properties, more):
    backend = opened(name, **properties)
    assert backend.capabilities.quantization == WEIGHT_ONLY | set(more)
    assert {head_format(format) for format in FORMATS} <= backend.capabilities.quantization
    for format in FORMATS.keys() - backend.capabilities.quantization:
        with pytest.raises(UnsupportedOnDevice, match=rf"pack_weight .*'{format}'.*instead: dense, int4"):
            backend.pack_weight({"weight": torch.randn(32, 32)}, format)


def test_without_triton_no_weight_is_rounded(opened, monkeypatch):
    """The references would round it and keep it as large as it was, which the memory plan does not know."""
    monkeypatch.setattr(quire_triton, "missing", lambda *_: "Triton cannot be imported")
    backend = opened("cuda", major=9, minor=0)
    assert not backend.capabilities.quantization
    with pytest.raises(UnsupportedOnDevice, match="'int8'"):
        backend.pack_weight({"weight": torch.randn(32, 32)}, "int8")


@needs_triton
def test_the_table_decides_who_multiplies(monkeypatch):
    from quire.reference import ops
    from quire_triton import configs, products, weights

    host = torch.device("cpu")
    raw = torch.randn(32, 64)
    fp8, w8a8, int4 = (weights.pack(raw, FORMATS[name], host) for name in ("fp8", "w8a8", "int4"))
    few, many = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(200, 64, dtype=torch.bfloat16)
    for arch in configs.SHARED_MEMORY:
        assert products.library(many, raw, arch) is ops.linear
        assert products.library(many, int4, arch) is None
        assert products.library(many, w8a8, arch) is None
        assert products.library(few, fp8, arch) is None
    assert products.library(many, fp8, "sm_90") is products.scaled_mm
    assert products.library(many, fp8, "sm_89") is None
    assert products.library(many.half(), fp8, "sm_90") is None
    odd = weights.pack(torch.randn(33, 64), FORMATS["fp8"], host)
    assert products.library(many, odd, "sm_90") is None
    monkeypatch.delattr(torch, "_scaled_mm")
    assert products.library(many, fp8, "sm_90") is None
    monkeypatch.setitem(configs._TRITON_ROWS, "sm_90", 8)
    assert products.library(few, raw, "sm_90") is None
    assert products.library(many, raw, "sm_90") is ops.linear


@needs_triton
def test_torch_s_product_of_e4m3_is_asked_as_it_wants(monkeypatch):
    """torch._scaled_mm on a host takes one scale a side; what it would be given per row is multiplied here instead."""
    from quire.conformance.world import close
    from quire.reference import quantize
    from quire_triton import products, weights

    asked = []

    def scaled(a, b, scale_a, scale_b, out_dtype):
        assert a.is_contiguous()
        assert b.stride() == (1, b.shape[0]), "the second factor must lie column by column"
        assert scale_a.shape == (len(a), 1)
        assert scale_b.shape == (1, b.shape[1])
        assert scale_a.dtype == scale_b.dtype == torch.float32
        asked.append(a.dtype)
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    monkeypatch.setattr(products, "quantize_rows", lambda x, dtype: quantize.quantize_rows(x, "e4m3"))
    x, raw, bias = torch.randn(70, 64).bfloat16(), torch.randn(32, 64), torch.randn(32).bfloat16()
    weight = weights.pack(raw, FORMATS["fp8"], torch.device("cpu"))
    given = products.scaled_mm(x, weight, bias)
    true = quantize.rounded_rows(x.double(), "e4m3") @ quantize.rounded(raw.double(), FORMATS["fp8"]).T + bias.double()
    close(given, true, "bfloat16", 2)
    assert asked == [torch.float8_e4m3fn]


def run_ptx(text: str, word: int) -> list[int]:
    """The two output words of a few instructions, of which each is done here by its definition."""
    values = {"$2": word}

    def value(operand: str) -> int:
        return values[operand] if operand in values else int(operand, 0)

    def floats(word: int, kind: str) -> torch.Tensor:
        dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float16
        return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16).view(dtype).double()

    for line in filter(None, (line.strip(" {}") for line in text.split(";"))):
        name, _, rest = line.partition(" ")
        operation, *kinds = name.split(".")
        operands = [part.strip() for part in rest.split(",")]
        if operation == "":  # .reg
            continue
        into, (first, *others) = operands[0], map(value, operands[1:])
        if operation == "mov":
            out = first
        elif operation == "shr":
            out = first >> others[0]
        elif operation == "prmt":  # byte i of the result is the one of b:a that digit i of the selector names
            data = others[0] << 32 | first
            out = sum((data >> 8 * (others[1] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
        elif operation == "lop3":
            assert others[2] == 0xEA, "the table of (a & b) | c"
            out = first & others[0] | others[1]
        else:
            kind = kinds[-1]
            a, b = floats(first, kind), floats(others[0], kind)
            assert operation in ("fma", "sub")
            exact = a * b + floats(others[1], kind) if operation == "fma" else a - b
            bits = exact.to(torch.bfloat16 if kind == "bf16x2" else torch.float16).view(torch.uint16).tolist()
            out = bits[1] << 16 | bits[0]
        values[into] = out & 0xFFFFFFFF
    return [values["$0"], values["$1"]]


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("take_off", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
@needs_triton
def test_half_bytes_become_numbers(high, take_off, bfloat16):
    """The instructions that the interpreter cannot run, carried out one by one for every byte in every place."""
    from quire_triton.kernels.integers import halves

    text = halves(high, take_off, bfloat16)
    assert not re.findall(r"\$[3-9]", text)
    for first in range(0, 256, 4):
        given = [first, 255 - first, first + 2 & 255, first + 3]
        words = run_ptx(text, sum(byte << 8 * i for i, byte in enumerate(given)))
        bits = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        dtype = torch.bfloat16 if bfloat16 else torch.float16
        numbers = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(dtype).float()
        expected = [(byte >> 4 if high else byte & 15) - (8 if take_off else 0) for byte in given]
        assert numbers.tolist() == expected
