"""What this machine allows: reading memory (GB/s) and multiplying matrices (GFLOP/s), with all usable cores.

    python bench/limits.py [--threads N] [--json]

Both move when the machine is shared: measure them in the run that is compared with them. Reading is timed by a small C
loop (prefetch, huge pages), compiled on the spot where there is a compiler, and by torch.mv, which reads a matrix
once; the better of the two is the limit. Decoding reads every weight once a step, so this is what bounds it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

READER = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef float vec __attribute__((vector_size(64)));
typedef struct { char *data; size_t bytes; int passes, ahead; pthread_barrier_t *start; double begin, end; float sum; } Job;

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }

static void *work(void *argument) {
    Job *job = argument;
    memset(job->data, 0, job->bytes); /* the thread that reads a page is the one that first touched it */
    pthread_barrier_wait(job->start);
    job->begin = now();
    vec sum[8] = {0};
    for (int pass = 0; pass < job->passes; pass++)
        for (size_t at = 0; at + 512 <= job->bytes; at += 512)
            for (int i = 0; i < 8; i++) {
                const char *line = job->data + at + 64 * i;
                __builtin_prefetch(line + job->ahead, 0, 3);
                sum[i] += *(const vec *)line;
            }
    job->end = now();
    for (int i = 0; i < 8; i++) job->sum += sum[i][0];
    return NULL;
}

/* bytes per second of `threads` threads that each read `bytes` (a multiple of 2 MiB) `passes` times, fetching
   `ahead` bytes before they are used; 0 on failure */
double read_rate(int threads, size_t bytes, int passes, int ahead) {
    pthread_t ids[threads]; Job jobs[threads]; pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, threads);
    for (int i = 0; i < threads; i++) {
        char *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) return 0;
        madvise(data, bytes, MADV_HUGEPAGE);
        jobs[i] = (Job){data, bytes, passes, ahead, &start, 0, 0, 0};
    }
    for (int i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, work, &jobs[i])) return 0;
    double begin = 1e300, end = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        if (jobs[i].begin < begin) begin = jobs[i].begin;
        if (jobs[i].end > end) end = jobs[i].end;
        munmap(jobs[i].data, bytes);
    }
    return (double)threads * bytes * passes / (end - begin);
}
"""


AHEAD = (512, 1024, 4096)
"""Bytes. Processors differ: a prefetch near its use joins the hardware's own stream, a far one hides more latency."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_reader() -> Callable[[int, int, int, int], float] | None:
    """The C loop as a function of (threads, bytes per thread, passes, bytes ahead); None without a working compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "reader.c"), Path(folder, "reader.so")
        source.write_text(READER, encoding="utf-8")
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        function = ctypes.CDLL(str(library)).read_rate
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    return function


def rates(work: Callable[[], float], seconds: float, least: int = 3) -> list[float]:
    """Results of repeated calls of ``work`` for about ``seconds``."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < end:
        found.append(work())
    return found


def read_c(threads: int, seconds: float, mebibytes: int = 256) -> list[float]:
    """GB/s of the C loop over ``mebibytes`` a thread, at the distance ahead that is best here; empty without a compiler."""
    reader = compile_reader()
    if reader is None:
        return []

    def at(ahead: int) -> list[float]:
        found = rates(lambda: reader(threads, mebibytes << 20, 4, ahead), seconds / len(AHEAD))
        return [rate / 1e9 for rate in found if rate]

    return max(map(at, AHEAD), key=lambda found: statistics.median(found) if found else 0.0)


def read_torch(threads: int, seconds: float, mebibytes: int = 512) -> list[float]:
    """GB/s of torch.mv over a float32 matrix of ``mebibytes``."""
    import torch

    torch.set_num_threads(threads)
    matrix, vector = torch.ones(mebibytes * 64, 4096), torch.ones(4096)

    def once() -> float:
        start = time.perf_counter()
        torch.mv(matrix, vector)
        return matrix.numel() * 4 / (time.perf_counter() - start) / 1e9

    once()
    return rates(once, seconds)


def matmul(dtype_name: str, threads: int, seconds: float, size: int = 2048) -> list[float]:
    """GFLOP/s of a ``size``-cubed product, the weight packed ahead where torch offers that (as engines do)."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    x, weight = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)

    def once() -> float:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return 2 * size**3 / (time.perf_counter() - start) / 1e9

    with torch.inference_mode():
        once()
        return rates(once, seconds)


def matmul_int8(threads: int, seconds: float, size: int = 2048) -> list[float]:
    """10^9 operations/s of a ``size``-cubed product of 8-bit integers; empty where torch has none."""
    import torch

    torch.set_num_threads(threads)
    x, weight = (torch.randint(-127, 128, (size, size), dtype=torch.int8) for _ in range(2))

    def once() -> float:
        start = time.perf_counter()
        torch._int_mm(x, weight.t())
        return 2 * size**3 / (time.perf_counter() - start) / 1e9

    try:
        once()
    except (RuntimeError, NotImplementedError):
        return []
    return rates(once, seconds)


def measure(threads: int | None = None, seconds: float = 1.5) -> dict[str, float]:
    """Medians: ``read_gb_s`` (the better of the two ways), ``bf16_gflop_s``, ``float32_gflop_s`` and ``int8_gop_s``, and
    what each way of reading gave. About ``seconds`` for each of the five measurements."""
    threads = threads or usable_cores()
    found: dict[str, float] = {"threads": threads}
    for name, values in (
        ("read_c_gb_s", read_c(threads, seconds)),
        ("read_torch_gb_s", read_torch(threads, seconds)),
        ("bf16_gflop_s", matmul("bfloat16", threads, seconds)),
        ("float32_gflop_s", matmul("float32", threads, seconds)),
        ("int8_gop_s", matmul_int8(threads, seconds)),
    ):
        if values:
            found[name] = round(statistics.median(values), 1)
            found[f"{name}_best"] = round(max(values), 1)
    found["read_gb_s"] = max(found.get("read_c_gb_s", 0.0), found["read_torch_gb_s"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: the cores this process may use")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each measurement (default: 1.5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    found = measure(args.threads, args.seconds)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['threads']:.0f} threads; median (best)")
    for name, text in (
        ("read_c_gb_s", "reading, C loop       GB/s"),
        ("read_torch_gb_s", "reading, torch.mv     GB/s"),
        ("bf16_gflop_s", "bf16 product     GFLOP/s"),
        ("float32_gflop_s", "float32 product  GFLOP/s"),
        ("int8_gop_s", "int8 product       GOP/s"),
    ):
        if name in found:
            print(f"{text:<28} {found[name]:>8,.1f} ({found[name + '_best']:,.1f})")


if __name__ == "__main__":
    main()
