"""The native kernels on torch tensors.

Each function checks shapes and dtypes, and calls the extension with addresses. Importing this module raises ImportError
where the extension was not built. Bits are a function of a request's own data and of the instruction set: the bf16 dot
product of AVX512-BF16 flushes denormals, the portable one rounds each product. They do not depend on the threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.hardware import SamplingBatch
from quire_cpu import _native
from quire_cpu._native import isa, isas, set_isa, threads
from quire_cpu.placement import Placement, place

__all__ = [
    "PackedLinear", "QuantizedLinear", "argmax", "embed", "gated_act", "gated_linear", "isa", "isas", "layer_norm",
    "linear", "logprobs", "pack_integers", "pack_linear", "pack_quantized", "rms_norm", "sample", "set_isa", "set_threads",
    "threads",
]  # fmt: skip

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
GROUP_ROWS = 32  # of a weight, side by side in its packed form
NOTHING = (0, 0, 0)  # in place of rows
LARGE = 1 << 20  # bytes of a result


def set_threads(count: int, pin: bool = True, spin_us: int = 50) -> Placement:
    """Compute with ``count`` threads, the caller's included (1 to 256).

    ``pin`` binds each thread but the caller's to a core of its own, as :func:`quire_cpu.placement.place` chooses, and has
    new buffers take their memory from the nodes of those cores. Threads look for work for ``spin_us`` microseconds
    before they sleep.
    """
    placement = place(count) if pin else Placement((), ())
    _native.set_threads(count, list(placement.cores), spin_us)
    _native.set_nodes(list(placement.nodes))
    return placement


def borrow(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in memory that the caller keeps as long as the tensor."""
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def as_tensor(buffer: _native.Buffer, dtype: torch.dtype) -> Tensor:
    """The buffer's memory as a flat tensor. The caller keeps the buffer as long as the tensor."""
    return borrow(buffer.address, (buffer.size // dtype.itemsize,), dtype)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor for a result: while a step is recorded, in memory that stays the step's own. Large ones are pieces that
    are used again, too: malloc's heap grows to twice what a step of many tokens needs, and is cut up."""
    arena = _recording.arena
    if arena is None:
        if math.prod(shape) * dtype.itemsize < LARGE:
            return torch.empty(shape, dtype=dtype)
        arena = _large
    return arena.empty(shape, dtype)


class Arena:
    """Memory for results, of recorded steps above all. A piece is used again when nothing refers to its tensor any more,
    the smallest that fits; replays of a recording go through the same pieces in the same order. Recordings share it: one
    runs at a time, and what one returns is read before the next."""

    def __init__(self) -> None:
        self.free: dict[int, list[_native.Buffer]] = {}  # by size

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = 1 << max(12, (count * dtype.itemsize - 1).bit_length())  # few sizes, so that pieces fit again
        buffer = self._piece(size)
        memory = (ctypes.c_char * buffer.size).from_address(buffer.address)
        # The memory ends with the storage, that is with the last view.
        weakref.finalize(memory, self.free.setdefault(buffer.size, []).append, buffer)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)

    def _piece(self, size: int) -> _native.Buffer:
        for held in sorted(self.free):  # a copy: other threads return pieces meanwhile, and take them
            if held >= size:
                with contextlib.suppress(IndexError):
                    return self.free[held].pop()
        return _native.Buffer(size)


_large = Arena()


class _Recording(threading.local):
    arena: Arena | None = None


_recording = _Recording()


@contextlib.contextmanager
def recording(tape: _native.Tape, arena: Arena) -> Iterator[None]:
    """Within, this thread's native calls go on the tape too, and their results lie in the arena."""
    _recording.arena = arena
    _native.record_on(tape)
    try:
        yield
    finally:
        _native.record_on(None)
        _recording.arena = None


def dtype_code(name: str, tensor: Tensor) -> int:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, but the native kernels take float32 and bfloat16")
    return DTYPES[tensor.dtype]


def check_rows(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``tensor`` with contiguous rows (its last dimension), after a look at its shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor if tensor.stride(-1) == 1 or shape[-1] == 1 else tensor.contiguous()


def rows_of(name: str, tensor: Tensor) -> tuple[int, int, int]:
    """(address, dtype, elements from row to row), as the extension takes matrices (and vectors)."""
    return tensor.data_ptr(), dtype_code(name, tensor), tensor.stride(0)


def _activation(name: str) -> int:
    known = [other for other in ACTIVATIONS if other != "none"]
    if name not in known:
        raise ValueError(f"activation '{name}' is unknown (known: {', '.join(known)})")
    return ACTIVATIONS[name]


@dataclass
class PackedLinear:
    """A weight [n, k] as the kernels stream it (csrc/linear.h)."""

    n: int
    k: int
    dtype: torch.dtype
    buffer: _native.Buffer


def pack_linear(weight: Tensor) -> PackedLinear:
    """weight [n, k] float32 or bfloat16, copied into the kernels' layout."""
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [out, in]")
    n, k = weight.shape
    rows = rows_of("weight", check_rows("weight", weight, (n, k)))
    buffer = _native.Buffer(_native.packed_bytes(n, k, rows[1]))
    _native.pack_weight(rows, n, k, buffer.address)
    return PackedLinear(n, k, weight.dtype, buffer)


@dataclass
class QuantizedLinear:
    """A weight [n, k] of 4 or 8 bit integers with scales, as the kernels stream it (csrc/quant.h)."""

    n: int
    k: int
    bits: int
    group: int
    shape: _native.QuantShape
    buffer: _native.Buffer
    dtype: torch.dtype | None = None  # of the weight that was rounded, and of its rows as an embedding


def pack_integers(q: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> QuantizedLinear:
    """The weight (q - zeros) * scales: q uint8 [n, k] below 2**bits, scales float32 or bfloat16 and zeros uint8
    [n, k / group].

    ``zeros`` None: 2**(bits - 1) everywhere. The last group of a row may be short. Nothing is lost.
    """
    _check_format(bits, group)
    n, k = q.shape
    shape = (n, -(-k // group))
    dtype_code("scales", scales)
    for name, tensor, dtype, wanted in (
        ("q", q, torch.uint8, (n, k)), ("scales", scales, scales.dtype, shape), ("zeros", zeros, torch.uint8, shape),
    ):  # fmt: skip
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != wanted):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {wanted}")
    q, scales = q.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    native_shape = _native.QuantShape(n, k, bits, group, zeros is not None, DTYPES[scales.dtype])
    buffer = _native.Buffer(native_shape.bytes)
    _native.quant_pack_weight(
        native_shape, q.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(), buffer.address
    )
    return QuantizedLinear(n, k, bits, group, native_shape, buffer)


def _check_format(bits: int, group: int) -> None:
    if bits not in (4, 8) or group not in (32, 64, 128):
        raise ValueError(f"bits and group are {bits} and {group}, but can be 4 or 8 and 32, 64 or 128")


def pack_quantized(weight: Tensor, bits: int, group: int) -> QuantizedLinear:
    """weight [n, k] rounded as the contract's ``reference.quantize`` says, and packed; group by group, so that no memory
    is needed beside the result."""
    _check_format(bits, group)
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [out, in]")
    n, k = weight.shape
    shape = _native.QuantShape(n, k, bits, group, False, DTYPES[torch.bfloat16])
    buffer = _native.Buffer(shape.bytes)
    _native.quant_pack_rounded(shape, rows_of("weight", check_rows("weight", weight, (n, k))), buffer.address)
    return QuantizedLinear(n, k, bits, group, shape, buffer, weight.dtype)


def linear(
    x: Tensor,
    weight: PackedLinear | QuantizedLinear,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, k] @ weight.T + bias [n] + residual [T, n] -> [T, n] in x's dtype (or ``out_dtype``), float32 inside.

    Against a bfloat16 weight x is rounded to bfloat16, against integers to 8 bits with a scale a row and group of
    columns. The result is rounded once, at the end.
    """
    return _linear(x, weight, bias, residual, ACTIVATIONS["none"], out_dtype or x.dtype)


def gated_linear(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None = None,
    *,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """act(gate) * up [T, n / 2] of [gate, up] = x @ weight.T + bias, for a weight of rows [gate; up]; rounded once."""
    code = _activation(activation)
    if weight.n % 2:
        raise ValueError(f"weight has {weight.n} rows, but gate and up rows must be equally many")
    if weight.n % (2 * GROUP_ROWS) == 0:
        return _linear(x, weight, bias, None, code, out_dtype or x.dtype)
    both = _linear(x, weight, bias, None, ACTIVATIONS["none"], torch.float32)
    return gated_act(both, activation, out_dtype or x.dtype)


def _linear(
    x: Tensor,
    weight: PackedLinear | QuantizedLinear,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    dtype: torch.dtype,
) -> Tensor:
    rows = x.shape[0]
    x = check_rows("x", x, (rows, weight.k))
    out = empty((rows, weight.n // 2 if activation else weight.n), dtype)
    bias_rows = residual_rows = NOTHING
    if bias is not None:
        bias = check_rows("bias", bias, (weight.n,))
        bias_rows = rows_of("bias", bias)
    if residual is not None:
        residual = check_rows("residual", residual, tuple(out.shape))
        residual_rows = rows_of("residual", residual)
    if not rows:
        return out
    if isinstance(weight, QuantizedLinear):
        _native.quant_linear(
            weight.shape, rows_of("x", x), rows, weight.buffer.address, activation, bias_rows, residual_rows,
            rows_of("out", out),
        )  # fmt: skip
    else:
        _native.linear(
            rows_of("x", x), rows, weight.k, weight.n, weight.buffer.address, DTYPES[weight.dtype], activation, bias_rows,
            residual_rows, rows_of("out", out),
        )  # fmt: skip
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(s / rms(s) * (weight + offset), s) with s = x + residual in x's dtype; x, residual [..., C], weight [C]."""
    return _norm(x, weight, None, eps, offset, residual, False)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """((s - mean(s)) / sqrt(var(s) + eps) * (weight + offset) + bias, s) with s = x + residual in x's dtype."""
    return _norm(x, weight, bias, eps, offset, residual, True)


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float, residual: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    flat = check_rows("x", x.reshape(-1, columns), (x.numel() // columns, columns))
    weight = check_rows("weight", weight, (columns,))
    if bias is not None:
        bias = check_rows("bias", bias, (columns,)).to(weight.dtype)
    out = empty(flat.shape, x.dtype)
    added, residual_rows, sum_rows = x, NOTHING, NOTHING
    if residual is not None:
        if residual.dtype != x.dtype:
            raise ValueError(f"residual has dtype {residual.dtype}, but x has {x.dtype}")
        residual = check_rows("residual", residual.reshape(-1, columns), tuple(flat.shape))
        added = empty(flat.shape, x.dtype)
        residual_rows, sum_rows = rows_of("residual", residual), rows_of("sum", added)
    _native.norm(
        rows_of("x", flat), residual_rows, sum_rows, rows_of("out", out), rows_of("weight", weight),
        0 if bias is None else bias.data_ptr(), flat.shape[0], columns, eps, offset, centred,
    )  # fmt: skip
    return out.view(x.shape), added.view(x.shape)


def gated_act(x: Tensor, activation: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """act(x[:, :I]) * x[:, I:] for x [T, 2 I] -> [T, I] in x's dtype (or ``out_dtype``); float32 inside."""
    rows, both = x.shape
    x = check_rows("x", x, (rows, both))
    if both % 2:
        raise ValueError(f"x has {both} columns, but gates and values must be equally many")
    out = empty((rows, both // 2), out_dtype or x.dtype)
    _native.gated_act(rows_of("x", x), rows_of("out", out), rows, both // 2, _activation(activation))
    return out


def embed(ids: Tensor, table: Tensor | PackedLinear | QuantizedLinear) -> Tensor:
    """Rows of table [V, C] for ids int64 [T] -> [T, C] in the table's dtype. IndexError for an id that is not in it.

    A packed table gives the rows that were packed, or what rounding left of them.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids must be int64 [T], got {ids.dtype} {tuple(ids.shape)}")
    ids = ids.contiguous()
    where = ids.data_ptr(), len(ids)
    if isinstance(table, Tensor):
        vocabulary, columns = table.shape
        table = check_rows("table", table, (vocabulary, columns))
        out = empty((len(ids), columns), table.dtype)
        _native.embed(rows_of("table", table), vocabulary, columns, *where, rows_of("out", out))
        return out
    if table.dtype is None:
        raise ValueError("the table was packed from integers, so its rows have no dtype")
    out = empty((len(ids), table.k), table.dtype)
    address, rows = table.buffer.address, rows_of("out", out)
    if isinstance(table, QuantizedLinear):
        _native.embed_quantized(table.shape, address, *where, rows)
    else:
        _native.embed_packed(address, table.n, table.k, DTYPES[table.dtype], *where, rows)
    return out


def argmax(logits: Tensor) -> Tensor:
    """The first column with the largest value of each row of logits float32 [N, V] -> int64 [N].

    -1 for a row in which that value is not finite, or that has a NaN.
    """
    logits = _logits(logits)
    out = empty((len(logits),), torch.int64)
    _native.argmax(rows_of("logits", logits), len(logits), logits.shape[1], out.data_ptr())
    return out


def sample(logits: Tensor, settings: SamplingBatch) -> Tensor:
    """One token a row of logits float32 [N, V] -> int64 [N], as the contract's ``sample``; -1 for a row that has none.

    Reads a row once, and once more for V exponentials unless top-k says what is kept (csrc/sampling.h); no sort.
    """
    logits = _logits(logits)
    rows = len(logits)
    columns = {
        "temperature": (settings.temperature, torch.float32), "top_k": (settings.top_k, torch.int32),
        "top_p": (settings.top_p, torch.float32), "min_p": (settings.min_p, torch.float32),
        "uniform": (settings.uniform, torch.float64),
    }  # fmt: skip
    for name, (column, dtype) in columns.items():
        if column.shape != (rows,) or column.dtype != dtype or not column.is_contiguous():
            raise ValueError(f"{name} is {column.dtype} {tuple(column.shape)}, expected {dtype} ({rows},), contiguous")
    out = torch.empty(rows, dtype=torch.int64)
    addresses = [column.data_ptr() for column, _ in columns.values()]
    _native.sample(rows_of("logits", logits), rows, logits.shape[1], *addresses, out.data_ptr())
    return out


def logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int64 [N, 1 + count], log-probabilities float32 of them, ranks int64 [N]), as the contract's ``logprobs``."""
    logits = _logits(logits)
    rows, vocabulary = logits.shape
    if chosen.shape != (rows,) or chosen.dtype != torch.int64 or not 0 <= count <= vocabulary:
        raise ValueError(f"chosen is {chosen.dtype} {tuple(chosen.shape)} and count {count} of {vocabulary}")
    if rows and not 0 <= int(chosen.min()) <= int(chosen.max()) < vocabulary:
        raise IndexError(f"a chosen token is not in a vocabulary of {vocabulary}")
    ids = torch.empty(rows, 1 + count, dtype=torch.int64)
    values, ranks = torch.empty(ids.shape), torch.empty(rows, dtype=torch.int64)
    _native.logprobs(
        rows_of("logits", logits), rows, vocabulary, chosen.contiguous().data_ptr(), count, ids.data_ptr(),
        values.data_ptr(), ranks.data_ptr(),
    )  # fmt: skip
    return ids, values, ranks


def _logits(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be float32 [N, V], got {logits.dtype} {tuple(logits.shape)}")
    return check_rows("logits", logits, tuple(logits.shape))
