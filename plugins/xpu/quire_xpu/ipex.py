"""intel-extension-for-pytorch: whether it can be used here, and its operations under the names of its release 2.8.

Its last release is 2.8 and works with torch 2.8 alone: imported beside another torch it prints an error and fails, so
the versions are compared before it is imported. The package index has its CPU build under the same name; the build for
GPUs comes from Intel and says ``+xpu`` in its version.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

DISTRIBUTION = "intel-extension-for-pytorch"
OPERATIONS = (
    "PagedAttention.flash_attn_varlen_func",
    "PagedAttention.reshape_and_cache_flash",
    "functional.rms_norm",
    "functional.silu_mul",
    "functional.gelu_mul",
)
"""What is called, below ``intel_extension_for_pytorch.llm``; tests compare names and parameters with the release."""


def missing() -> str | None:
    """Why it cannot be used, in one line; None where it can. Imports it only where it is the right one."""
    if importlib.util.find_spec("intel_extension_for_pytorch") is None:
        return "intel-extension-for-pytorch is not installed"
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return f"a module intel_extension_for_pytorch is there, but no distribution {DISTRIBUTION}"
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"{DISTRIBUTION} {version} works with torch {'.'.join(version.split('.')[:2])}, not {torch.__version__}"
    if "+xpu" not in version:
        return f"{DISTRIBUTION} {version} is the build for CPUs; Intel's own index has the one for GPUs (+xpu)"
    try:
        load()
    except Exception as error:  # a stranger's import: it may fail in any way, and none of them is the user's trace
        return f"{DISTRIBUTION} {version} cannot be used: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def load() -> tuple[Any, Any]:
    """(PagedAttention, the module of fused functions). Raises ImportError or AttributeError where a name is not there."""
    import intel_extension_for_pytorch as ipex

    paged, functional = ipex.llm.modules.PagedAttention, ipex.llm.functional
    for operation in OPERATIONS:
        owner, _, name = operation.partition(".")
        getattr(paged if owner == "PagedAttention" else functional, name)
    return paged, functional
