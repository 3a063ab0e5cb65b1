"""What a kernel must know of an architecture that its instruction set fixes: lanes, the kind of fp8, matrix instruction.

Sources: NVIDIA's CUDA C++ programming guide and PTX ISA (mma, wgmma, tcgen05); AMD's instruction set references for
CDNA 2, 3 and 4 and RDNA 3 and 4, and the HIP documentation of low-precision types (FNUZ on CDNA 3, OCP from CDNA 4 and
RDNA 4 on). ``configs.py`` has the numbers that were chosen; here are those that were not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """``wave``: lanes that run together (a warp, a wavefront). ``fp8``: the torch dtype of e4m3 numbers whose products
    the hardware computes, None where it has none. ``matrix``: the family of its matrix instructions, "" unknown."""

    name: str
    wave: int
    fp8: str | None
    matrix: str

    def multiplies(self, dtype: str) -> bool:
        """Whether the hardware has products of this dtype: of 8-bit floats it has one kind at most. The two e4m3 differ in
        bias and in NaN, so that bytes of one read as the other are wrong by a factor of two. (A cache may still hold
        bytes that a kernel makes and reads by arithmetic.)"""
        return not dtype.startswith("float8_e4m3") or dtype == self.fp8

    def describe(self) -> str:
        """One line for ``quire doctor``."""
        return (
            f"{self.name}: {self.wave} lanes, fp8 {self.fp8 or 'none'}, {self.matrix or 'unknown'} matrix instructions"
        )


FN, FNUZ = "float8_e4m3fn", "float8_e4m3fnuz"
ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("sm_75", 32, None, "mma"),
        Architecture("sm_80", 32, None, "mma"),
        Architecture("sm_86", 32, None, "mma"),
        Architecture("sm_87", 32, None, "mma"),
        Architecture("sm_89", 32, FN, "mma"),
        Architecture("sm_90", 32, FN, "wgmma"),
        Architecture("sm_100", 32, FN, "tcgen05"),
        Architecture("sm_103", 32, FN, "tcgen05"),
        Architecture("sm_120", 32, FN, "mma"),
        Architecture("sm_121", 32, FN, "mma"),
        Architecture("gfx90a", 64, None, "mfma"),  # CDNA 2, MI200
        Architecture("gfx942", 64, FNUZ, "mfma"),  # CDNA 3, MI300
        Architecture("gfx950", 64, FN, "mfma"),  # CDNA 4, MI350
        Architecture("gfx1100", 32, None, "wmma"),  # RDNA 3
        Architecture("gfx1101", 32, None, "wmma"),
        Architecture("gfx1102", 32, None, "wmma"),
        Architecture("gfx1200", 32, FN, "wmma"),  # RDNA 4
        Architecture("gfx1201", 32, FN, "wmma"),
    )
}


def of(kind: str, properties: Any, hip: bool = False) -> Architecture:
    """The architecture of a device, from torch's properties of it. One that has no row is taken to have no fp8, and
    the lanes that torch tells (``warp_size``), else 32."""
    if kind == "cuda" and hip:
        name = properties.gcnArchName.partition(":")[0]
    elif kind == "cuda":
        name = f"sm_{properties.major}{properties.minor}"
    else:  # XPU: one row for all, of which the properties tell what matters
        lanes = max(getattr(properties, "sub_group_sizes", None) or [32])
        engine = "xmx" if getattr(properties, "has_subgroup_matrix_multiply_accumulate", False) else ""
        return Architecture(kind, lanes, None, engine)
    return ARCHITECTURES.get(name) or Architecture(name, getattr(properties, "warp_size", 32), None, "")
