"""Kernels in Triton for Quire's device plugins. It registers no device: a plugin's backend inherits
:class:`quire_triton.backend.TritonOps`, and each operation that has a kernel here is then computed by it.

Importing this touches neither torch nor Triton.
"""

from __future__ import annotations

MINIMUM = (3, 6)


def missing(maker: str | None = None) -> str | None:
    """Why the kernels cannot be used here, in one line; None where they can. ``maker``: whose GPU it is to compile for, by
    the name of Triton's backend (nvidia, amd, intel); each build of Triton has some of them."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install the one that this torch was built for"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < MINIMUM or found[0] != MINIMUM[0]:
        return f"Triton {triton.__version__} is installed; the kernels need {MINIMUM[0]}.{MINIMUM[1]} or a later 3.x"
    if maker is not None:
        from triton.backends import backends

        if maker not in backends:
            has = f"compiles for {' and '.join(sorted(backends))}" if backends else "compiles for no GPU"
            return f"Triton {triton.__version__} {has}, not for {maker}: install the one that this torch was built for"
    return None
