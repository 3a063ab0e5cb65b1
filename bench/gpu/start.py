"""Start-up on the shape of Llama-3.1-8B: from starting a process to its first token, the checkpoint in the disk's cache.

The checkpoint is written first (16 GB of random bf16 in ``--scratch``, removed at the end), which leaves it in memory.
Measured three times: with no compiled kernel kept, then twice with those that the first has left; the last is the row
that the goal is about. Where the server's packages are there, `quire serve` to the first streamed token is measured too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from gpu import shapes
from gpu.rows import Recorder, part_parser
from quire.hardware import UserError
from quire.plugins import load
from quire.weights.checkpoint import weight_bytes

FIRST = "start: first token"
SERVER = ("quire_server", "msgspec", "zmq", "tokenizers", "uvicorn", "pydantic")


def once(args: Namespace, folder: Path, cache: str) -> tuple[float, dict]:
    """(seconds from starting a process to its first token, what it says of them)."""
    command = [sys.executable, "-m", "gpu.first_token", str(folder), "--device", args.device]
    if args.smoke:
        command += ["--kv-cache-memory-bytes", str(64 << 20)]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": cache},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - begin
    _, errors = process.communicate(timeout=60)
    if not line or process.returncode:
        raise RuntimeError(f"no token came: {errors.strip().rpartition(chr(10))[2]}")
    return seconds, {k: v for k, v in json.loads(line).items() if k != "tokens"}


def server(args: Namespace, folder: Path, cache: str, out: Recorder) -> None:
    absent = [name for name in SERVER if importlib.util.find_spec(name) is None]
    if absent or not hasattr(__import__("msgspec"), "msgpack"):
        return out.missing(
            "start: quire serve to the first token", f"not installed here: {', '.join(absent) or 'msgspec'}"
        )
    os.environ["TRITON_CACHE_DIR"] = cache
    from startup import first_token_seconds

    flags = ["--device", args.device, "--max-model-len", "1024"]
    if args.smoke:
        flags += ["--kv-cache-memory-bytes", str(64 << 20)]
    healthy, first = first_token_seconds(str(folder), flags)
    return out.add("start: quire serve to the first token", first, healthy=round(healthy, 2))


def main(argv: list[str] | None = None) -> int:
    args = part_parser(__doc__).parse_args(argv)
    out = Recorder(args.rows)
    try:
        load().choose(args.device).devices()  # before 16 GB are written for it
    except UserError as error:
        out.missing(FIRST, str(error))
        return 2
    free = shapes.room(args.scratch)
    needed = weight_bytes(shapes.weights_of(shapes.write_config("8b", args.scratch, args.smoke)), "bfloat16") + (
        1 << 30
    )
    if free < needed:
        out.missing(FIRST, f"{args.scratch} has {free / 1e9:.1f} GB free, the checkpoint takes {needed / 1e9:.1f} GB")
        return 0
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        begin = time.perf_counter()
        folder, size = shapes.write_checkpoint("8b", Path(scratch), args.smoke)
        print(f"{size / 1e9:.1f} GB written in {time.perf_counter() - begin:.1f} s", flush=True)
        cache = str(Path(scratch) / "triton")
        for name in ("start: first token, nothing compiled before", "start: first token, second time", FIRST):
            if args.smoke and name != FIRST:
                continue
            try:
                seconds, detail = once(args, folder, cache)
            except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                out.missing(name, str(error))
                continue
            out.add(name, seconds, **detail)
        server(args, folder, cache, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
