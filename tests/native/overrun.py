"""What a sanitized build must catch (sanitize.sh runs it): a product that reads more weights than there are."""

import torch

from quire_cpu import native

assert native._native.sanitized(), f"{native._native.__file__} is not a sanitized build"
native.set_threads(1, pin=False)
weight = native.pack_linear(torch.randn(32, 64))
weight.n = 64
native.linear(torch.randn(1, 64), weight)
