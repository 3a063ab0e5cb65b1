"""Weights for the graph: each tensor is read once, converted, and handed to the device, which keeps its own layout."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.errors import ModelError
from quire.hardware import Backend
from quire.layers.rotary import rotary_table
from quire.models.family import WeightMap
from quire.quantization import format_of, head_format
from quire.reference import torch_dtype
from quire.spec import (
    AttentionWeights,
    LayerWeights,
    MlpWeights,
    ModelSpec,
    ModelWeights,
    RotarySpec,
)
from quire.weights.checkpoint import Checkpoint, weight_bytes

Read = Callable[[WeightMap], Tensor]
STAGING = 64 << 20  # bytes that are kept from one weight to the next, however small it is
COPIED_AT_ONCE = 16 << 20  # bytes of a file that are in memory beside their copy, about
DUMMY_BLOCK = 1_048_573
"""Random numbers that are drawn for one dummy weight; a larger one repeats them. A prime, so that rows differ."""


def load_weights(
    folder: Path | None,
    weights: Sequence[WeightMap],
    spec: ModelSpec,
    backend: Backend,
    dtype: str,
    max_model_len: int,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
    quantization: str | None = None,
) -> ModelWeights:
    """Read ``weights`` (a family's map) from ``folder`` into ``dtype`` and pack them on the backend's device.

    ``load_format`` ``dummy`` makes small random weights from ``seed`` on the device instead and needs no folder; ``auto``
    and ``safetensors`` read files. ``progress``: show a bar; None: when standard error is a terminal. ``quantization``: a
    name of ``quire.quantization.FORMATS`` that matrices are rounded to. At any time there is at most one weight more in
    memory than the device keeps. A tied table is held once where the device looks rows up in what it packed, which is
    the rounded table with ``quantization``. Raises ModelError, naming the tensor.
    """
    if load_format not in ("auto", "safetensors", "dummy"):
        raise ModelError(f"load_format = {load_format!r}: must be auto, safetensors or dummy")
    torch_type = torch_dtype(dtype)
    with contextlib.ExitStack() as stack:
        if load_format == "dummy":
            read: Read = lambda weight: dummy_tensor(weight, torch_type, seed, backend.device)  # noqa: E731
        elif folder is None:
            raise ModelError(f"load_format = {load_format!r} needs a folder")
        else:
            checkpoint = stack.enter_context(Checkpoint(folder))
            checkpoint.check(weights, spec.tied_embeddings)
            read = Reader(checkpoint, torch_type)
        advance = stack.enter_context(_bar(weight_bytes(weights, dtype), progress))
        return _assemble(weights, spec, backend, read, advance, max_model_len, quantization)


def _assemble(
    weights: Sequence[WeightMap], spec: ModelSpec, backend: Backend, read: Read, advance: Callable[[int], None],
    max_model_len: int, quantization: str | None,
) -> ModelWeights:  # fmt: skip
    fields: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for weight in weights:
        tensor = read(weight)
        advance(tensor.nbytes)
        if spec.tied_embeddings and weight.field == "embedding":
            format = head_format(quantization) if quantization else "dense"
            head = fields["model", -1]["head"] = backend.pack_weight({"weight": tensor}, format)
            if format in backend.capabilities.embed_formats:
                fields["model", -1]["embedding"] = head
                continue
        fields[weight.owner, weight.layer][weight.field] = (
            backend.pack_weight({"weight": tensor}, format_of(weight, quantization))
            if weight.kind == "matrix"
            else tensor.to(backend.device, copy=True)
        )
        del tensor
    tables: dict[RotarySpec, Tensor] = {}
    layers = []
    for index, layer in enumerate(spec.layers):
        rotary = layer.attention.rotary
        if rotary is not None and rotary not in tables:
            tables[rotary] = rotary_table(rotary, max_model_len).to(backend.device)
        attention = AttentionWeights(**fields["attention", index], cos_sin=None if rotary is None else tables[rotary])
        layers.append(LayerWeights(attention, MlpWeights(**fields["mlp", index])))
    return ModelWeights(**fields["model", -1], layers=layers)


class Reader:
    """Reads a checkpoint's weights in ``dtype``, each only until the next one is read: the device copies what it keeps. A
    checkpoint that is overwritten while it serves therefore does not reach the model.

    A weight that is stored as it is wanted is the file's own memory. Others, of several parts or of another dtype, are put
    together in one piece of memory that is used again: fresh memory for each, which the system clears first, takes as
    long as the copy. The file's pages are given back as the copy goes on, so that a part is never in memory twice.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self._mapped: str | None = None  # the tensor whose pages the last weight was
        self._staging = torch.empty(0, dtype=torch.uint8)

    def __call__(self, weight: WeightMap) -> Tensor:
        if self._mapped is not None:
            self.checkpoint.release(self._mapped)
            self._mapped = None
        if len(weight.parts) == 1:
            stored = self.checkpoint.tensor(weight.parts[0].name)
            if stored.dtype == self.dtype and stored.data_ptr() % self.dtype.itemsize == 0:
                self._mapped = weight.parts[0].name
                return stored
        joined = self._staged(weight.shape)
        row = 0
        for part in weight.parts:
            stored = self.checkpoint.tensor(part.name)
            rows = max(1, COPIED_AT_ONCE // max(1, stored[:1].nbytes))
            for piece in stored.split(rows):
                joined[row : row + len(piece)] = piece
                self.checkpoint.release(part.name)
                row += len(piece)
        return joined

    def _staged(self, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * self.dtype.itemsize
        if not size <= len(self._staging) <= max(STAGING, 8 * size):
            # Large enough for malloc to give it back when it is let go. What is never touched costs nothing.
            self._staging = torch.empty(max(STAGING, size), dtype=torch.uint8)
        return self._staging[:size].view(self.dtype).view(tuple(shape))


def dummy_tensor(weight: WeightMap, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A random weight, a function of (seed, name) alone on every device: norms near one, matrices uniform with deviation
    0.02. At most ``DUMMY_BLOCK`` numbers are drawn, on the host; the device repeats them, so that billions take a moment."""
    digest = hashlib.blake2b(f"{seed}/{weight.parts[0].name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    spread = 0.02 * 3**0.5
    tensor = torch.empty(weight.shape, dtype=dtype, device=device)
    flat = tensor.view(-1)
    drawn = torch.empty(min(len(flat), DUMMY_BLOCK), dtype=dtype).uniform_(-spread, spread, generator=generator)
    block = drawn.to(device)
    for start in range(0, len(flat), DUMMY_BLOCK):
        flat[start : start + DUMMY_BLOCK] = block[: len(flat) - start]
    return tensor + 1 if weight.kind == "norm" else tensor


@contextlib.contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, when wanted; yields what to call with the bytes done."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("loading weights"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
