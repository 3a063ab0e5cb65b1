"""A whole model of random weights in the real engine: decode steps by batch size, and prefill, beside the roofline.

Wall-clock time of steps, host work included: what a user gets. A decode step's limit is the time to read the matrices and
the caches or to compute, whichever is longer (bench/model_cost.py).
"""

from __future__ import annotations

import random
import statistics
import time
from argparse import Namespace
from pathlib import Path

from gpu import shapes
from gpu.rows import COPY, MATRIX, Recorder, part_parser
from model_cost import Workload
from quire.config import make_config
from quire.engine.build import Engine, build_engine
from quire.engine.inputs import InputProcessor
from quire.hardware import UserError
from quire.sampling.params import SamplingParams

CONTEXT, PROMPT, STEPS, WARM = 1024, 8192, 48, 6


class Session:
    """An engine without checkpoint or tokenizer, and the requests it is given."""

    def __init__(self, args: Namespace, folder: Path, batch: int) -> None:
        self.context, self.prompt = (24, 64) if args.smoke else (CONTEXT, PROMPT)
        small = {"kv_cache_memory_bytes": 64 << 20} if args.smoke else {}
        config = make_config(
            str(folder), device=args.device, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True,
            quantization=args.quantization, batch_invariant=args.batch_invariant, enable_prefix_caching=False,
            max_model_len=self.prompt + 128, max_num_seqs=max(batch, 1), max_num_batched_tokens=self.prompt,
            swap_space=0.0, **small,
        )  # fmt: skip
        begin = time.perf_counter()
        self.engine: Engine = build_engine(config)
        self.seconds = time.perf_counter() - begin
        spec = self.engine.spec
        self.inputs = InputProcessor(None, self.engine.memory.max_model_len, spec.vocab_size, max(batch, 1))
        self.random, self.made = random.Random(0), 0

    def ask(self, tokens: int, output: int) -> str:
        """Queue a request of random tokens, greedy, which goes on after an end-of-sequence token."""
        prompt = [self.random.randrange(self.inputs.vocab_size) for _ in range(tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        self.made += 1
        _, message = self.inputs.request(prompt, params, str(self.made))
        self.engine.core.add(message)
        return message.request_id

    def decode(self, batch: int, steps: int) -> tuple[float, float]:
        """(seconds of a decode step of ``batch`` sequences, their mean context meanwhile)."""
        core = self.engine.core
        chunks = -(-batch * self.context // self.prompt)
        names = [self.ask(self.context, chunks + steps + 4 * WARM) for _ in range(batch)]
        produced = dict.fromkeys(names, 0)

        def step() -> None:
            for output in core.step():
                if output.error:
                    raise RuntimeError(f"a request failed: {output.error}")
                produced[output.request_id] += len(output.token_ids)

        while not all(produced.values()):
            step()
        for _ in range(WARM):  # the first steps of a batch size compile and record
            step()
        before, begin = sum(produced.values()), time.perf_counter()
        for _ in range(steps):
            step()
        seconds = (time.perf_counter() - begin) / steps
        after = sum(produced.values())
        if after - before != batch * steps:
            raise RuntimeError(f"{after - before} tokens came of {steps} steps of {batch} sequences")
        core.abort(names)
        while core.has_work():
            core.step()
        return seconds, self.context + (before + after) / 2 / batch

    def prefill(self, repeats: int) -> float:
        """Median seconds from queueing a prompt to its first token; the first one does not count."""
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            self.ask(self.prompt, 1)
            while self.engine.core.has_work():
                self.engine.core.step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])


def title(args: Namespace) -> str:
    return f"{args.shape} {args.quantization or 'bf16'}{' batch-invariant' if args.batch_invariant else ''}"


def measure(args: Namespace, out: Recorder) -> None:
    batches = [int(n) for n in args.decode.split(",") if n]
    wanted = [f"decode of {n}" for n in batches] + ["prefill of 8k"] * args.prefill
    folder = shapes.write_config(args.shape, args.scratch, args.smoke)
    try:
        session = Session(args, folder, min(max(batches, default=1), 4) if args.smoke else max(batches, default=1))
    except UserError as error:
        for name in wanted:
            out.missing(f"{title(args)}: {name}", str(error))
        return
    out.add(f"{title(args)}: from config to ready", session.seconds)
    print(session.engine.memory.report(), flush=True)
    model = shapes.cost(folder)
    read = shapes.matrix_bytes(folder, args.quantization)
    if args.prefill:
        seconds = session.prefill(1 if args.smoke else 3)
        copy, matrix = out.ceiling(COPY), out.ceiling(MATRIX)
        least = copy and matrix and model.seconds(Workload(1, session.prompt, 1), copy, matrix)
        out.add(f"{title(args)}: prefill of 8k", seconds, limit=least, tokens_s=round(session.prompt / seconds))
    for batch in batches:
        size = min(batch, 4) if args.smoke else batch
        try:
            seconds, context = session.decode(size, 4 if args.smoke else STEPS)
        except Exception as error:
            out.missing(f"{title(args)}: decode of {batch}", f"{type(error).__name__}: {error}")
            raise
        least = out.least(*model.decode_step(size, context, read))
        out.add(f"{title(args)}: decode of {batch}", seconds, limit=least, tokens_s=round(size / seconds))
    session.engine.close()


def main(argv: list[str] | None = None) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="8b")
    parser.add_argument("--quantization", help="as of the engine's flag of that name")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--decode", default="", metavar="N,N", help="batch sizes, at 1k of context")
    parser.add_argument("--prefill", action="store_true", help="a prompt of 8k tokens")
    args = parser.parse_args(argv)
    measure(args, Recorder(args.rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
