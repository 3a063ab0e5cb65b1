"""Other operations on Llama-3.1-8B's shapes, through the plugin: products in each format, norms, activation, rotary.

They have no goal of their own; where a whole model falls short, they say why.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu.rows import Recorder, part_parser
from gpu.timing import Clock, open_backend
from quire.hardware import UserError
from quire.quantization import FORMATS
from quire.spec import NormSpec


def products(backend: Any, clock: Clock, out: Recorder, smoke: bool, kind: str) -> None:
    """The largest product of a layer, in bf16 and each format that the device declares."""
    n, k = (256, 128) if smoke else (28672, 4096)
    dense = torch.randn(n, k, dtype=torch.bfloat16, device=backend.device)
    formats = ["dense"] if kind else ["dense", *sorted(backend.capabilities.quantization & set(FORMATS))]
    for name in formats:
        weight = backend.pack_weight({"weight": dense}, name)
        size = 2 * n * k if name == "dense" else FORMATS[name].bytes((n, k))
        for rows in (1, 16, 64, 256) if smoke else (1, 16, 64, 256, 8192):
            x = torch.randn(rows, k, dtype=torch.bfloat16, device=backend.device)
            seconds = clock(lambda x=x, weight=weight: backend.linear(x, weight))
            out.add(f"product of {rows} rows, {name}{kind}", seconds, limit=out.least(size, 2 * rows * n * k))
        del weight


def pointwise(backend: Any, clock: Clock, out: Recorder, smoke: bool) -> None:
    tokens, hidden, heads = (16, 128, 1) if smoke else (8192, 4096, 32)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=backend.device)
    weight = x[0].clone()
    seconds = clock(lambda: backend.rms_norm(x, weight, NormSpec(), x))
    out.add(f"residual and RMS norm {tokens} x {hidden}", seconds, limit=out.least(4 * x.nbytes))
    gates = torch.randn(tokens, 7 * hidden, dtype=torch.bfloat16, device=backend.device)[:, : 7 * hidden // 2 * 2]
    seconds = clock(lambda: backend.gated_act(gates, "silu"))
    out.add(f"silu gate {tokens} x {gates.shape[1] // 2}", seconds, limit=out.least(1.5 * gates.nbytes))
    q, k = x.view(tokens, heads, 128), x[:, : max(128, hidden // 4)].contiguous().view(tokens, -1, 128)
    positions = torch.arange(tokens, device=backend.device)
    table = torch.randn(tokens, 128, device=backend.device)
    seconds = clock(lambda: backend.rotary(q, k, positions, table))
    out.add(f"rotary of {tokens} tokens", seconds, limit=out.least(2 * (q.nbytes + k.nbytes) + table.nbytes))


def main(argv: list[str] | None = None) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--batch-invariant", action="store_true", help="products with fixed sums only")
    args = parser.parse_args(argv)
    out = Recorder(args.rows)
    kind = ", batch-invariant" if args.batch_invariant else ""
    try:
        backend = open_backend(args.device, args.batch_invariant)
        clock = Clock(backend, args.smoke)
        products(backend, clock, out, args.smoke, kind)
    except UserError as error:
        print(error)
        return 2
    if not args.batch_invariant:
        pointwise(backend, clock, out, args.smoke)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
