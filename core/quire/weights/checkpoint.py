"""A folder of safetensors: what is in it, by its headers, and its tensors, memory-mapped. Nothing else is ever read.

Format: 8 bytes with the header's length, the header (JSON: name to dtype, shape and place), then the data
(https://huggingface.co/docs/safetensors). Pickled weights (.bin, .pt) can run code when loaded and are refused.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ModelError
from quire.models.family import Part, WeightMap
from quire.quantization import FORMATS, format_of, head_format

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Written by some exporters, recomputed or unused by everyone.
_HARMLESS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "self_attn.bias", "self_attn.masked_bias")


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of ``file`` describes it; ``dtype`` is safetensors' name, ``start`` its byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int  # bytes


class Checkpoint:
    """The tensors of a folder. Use as a context manager: files stay mapped until it ends."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises ModelError for a folder without safetensors, or a damaged one."""
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        index = folder / INDEX
        if index.is_file():
            self._read_indexed(index)
        else:
            for file in _files(folder):
                self._add(read_header(file))
        self._maps: dict[Path, mmap.mmap] = {}

    def _add(self, stored: dict[str, Stored]) -> None:
        for name, tensor in stored.items():
            if name in self.tensors:
                raise ModelError(f"tensor {name} is in both {self.tensors[name].file.name} and {tensor.file.name}")
            self.tensors[name] = tensor

    def _read_indexed(self, index: Path) -> None:
        try:
            shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(shard_of.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} has no readable weight_map: {type(error).__name__}: {error}") from error
        for shard in shards:
            # The index is a stranger's file: a shard's name must not lead out of the folder.
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or any(c in shard for c in "/\\:\0"):
                raise ModelError(f"{index.name}: {shard!r} is not the plain name of a .safetensors file")
            if not (self.folder / shard).is_file():
                raise ModelError(
                    f"{index.name} names {shard}, which is not in {self.folder}: was the download complete?"
                )
            self._add({n: t for n, t in read_header(self.folder / shard).items() if shard_of.get(n) == shard})
        absent = [name for name in shard_of if name not in self.tensors]
        if absent:
            raise ModelError(f"{index.name} promises {_some(absent)} in {shard_of[absent[0]]}, which does not have it")

    def check(self, weights: Sequence[WeightMap], tied: bool) -> None:
        """Raise ModelError unless the folder holds exactly the tensors that ``weights`` names, in their shapes."""
        wanted = {part.name: part for weight in weights for part in weight.parts}
        missing = [f"{p.name} {list(p.shape)}" for p in wanted.values() if p.name not in self.tensors]
        if missing:
            hint = "; should config.json say tie_word_embeddings?" if missing[0].startswith("lm_head.weight") else ""
            raise ModelError(f"{self.folder} lacks {_some(missing)}{hint}")
        for part in wanted.values():
            self._check_part(part, self.tensors[part.name])
        harmless = (*_HARMLESS, "lm_head.weight") if tied else _HARMLESS
        extra = [name for name in self.tensors if name not in wanted and not name.endswith(harmless)]
        if extra:
            raise ModelError(f"{self.folder} has tensors that this architecture has no use for: {_some(extra)}")

    @staticmethod
    def _check_part(part: Part, stored: Stored) -> None:
        if stored.shape != part.shape:
            raise ModelError(
                f"{part.name} has the shape {list(stored.shape)}, expected by config.json: {list(part.shape)}"
            )
        if stored.dtype not in _FLOATS:
            known = ", ".join(_FLOATS)
            raise ModelError(f"{part.name} is stored as {stored.dtype}, which is not supported (supported: {known})")

    def bytes(self, dtype: str) -> int:
        """What all tensors take in ``dtype``."""
        return sum(math.prod(t.shape) for t in self.tensors.values()) * _ITEMSIZE[dtype]

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped from its file; copy what should outlive this object."""
        import torch

        stored = self.tensors[name]
        if stored.size == 0:
            return torch.empty(stored.shape, dtype=getattr(torch, _FLOATS[stored.dtype]))
        if stored.file not in self._maps:
            try:
                with stored.file.open("rb") as stream:
                    # Private and writable: torch takes no read-only memory, and nobody writes.
                    self._maps[stored.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ModelError(f"{stored.file} cannot be read: {error}") from error
        dtype = getattr(torch, _FLOATS[stored.dtype])
        count = stored.size // dtype.itemsize
        flat = torch.frombuffer(self._maps[stored.file], dtype=dtype, count=count, offset=stored.start)
        return flat.view(stored.shape)

    def release(self, name: str) -> None:
        """The tensor was copied: its pages no longer count as this process's memory (the file's cache keeps them)."""
        stored = self.tensors[name]
        if stored.file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            first = stored.start - stored.start % mmap.PAGESIZE
            self._maps[stored.file].madvise(mmap.MADV_DONTNEED, first, stored.start + stored.size - first)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()


def _files(folder: Path) -> list[Path]:
    """The safetensors of a folder without an index."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith(("consolidated", "adapter")))
    if found:
        return found
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when loaded: convert them to "
            "safetensors, for example with Transformers' save_pretrained"
        )
    raise ModelError(f"{folder} has no *.safetensors")


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file, by its header alone. Raises ModelError for what is not a whole safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            stream.seek(0)
            pointer = stream.read(40).startswith(b"version https://git-lfs")
            why = "a git-lfs pointer (run `git lfs pull`)" if pointer else "damaged or cut short"
            raise ModelError(f"{file} is not a whole safetensors file: it is {why}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, entry) for name, entry in header.items()}
        end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"{file} has no readable header: {type(error).__name__}: {error}") from error
    if 8 + length + end != size:
        raise ModelError(f"{file} is {size} bytes long, its header says {8 + length + end}: was the download complete?")
    return tensors


def _stored(file: Path, data: int, entry: Mapping[str, Any]) -> Stored:
    """An entry of a header. Raises ValueError where its bytes are not what dtype and shape say, or none of its own."""
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    itemsize = _ITEMSIZE.get(_FLOATS.get(dtype, ""))
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"offsets {begin} to {end}, shape {list(shape)}")
    if itemsize is not None and math.prod(shape) * itemsize != end - begin:
        raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
    return Stored(file, dtype, shape, data + begin, end - begin)


def weight_bytes(
    weights: Iterable[WeightMap], dtype: str, quantization: str | None = None, tied: bool = False,
    embed_formats: Container[str] = ("dense",),
) -> int:  # fmt: skip
    """What a model's weights take, by arithmetic: in ``dtype``, matrices in the format of ``quantization``. A tied head
    counts once if the device looks rows up in what it packs (``Capabilities.embed_formats``), else beside its table."""
    total = 0
    for weight in weights:
        plain = math.prod(weight.shape) * _ITEMSIZE[dtype]
        if tied and weight.field == "embedding":
            head = head_format(quantization) if quantization else "dense"
            total += FORMATS[head].bytes(weight.shape) if quantization else plain
            total += 0 if head in embed_formats else plain
        elif quantization is not None and weight.kind == "matrix":
            total += FORMATS[format_of(weight, quantization)].bytes(weight.shape)
        else:
            total += plain
    return total


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
