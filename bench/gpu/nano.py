"""nano-vllm's benchmark through ``LLM`` (https://github.com/GeeeekExplorer/nano-vllm, bench.py): the shape of Qwen3-0.6B,
256 sequences, 100 to 1024 tokens in and out, seed 0, temperature 0.6.

Tokens a second of output, and, in a second run, the share of a window in which the device computes. ``--peer
transformers`` and ``--peer vllm`` do the same work with Transformers' continuous batching and with vLLM, if they are
importable.
"""

from __future__ import annotations

import importlib.util
import random
import threading
import time
from argparse import Namespace
from typing import Any

from gpu import busy, shapes
from gpu.rows import Recorder, part_parser
from quire.hardware import UserError

Work = list[tuple[list[int], int]]
ROW = "0.6b: nano-vllm's benchmark"


def workload(sequences: int = 256, longest: int = 1024, shortest: int = 100) -> Work:
    """(prompt, tokens to produce) of each sequence: the very ones that nano-vllm's bench.py draws."""
    source = random.Random(0)
    prompts = [[source.randint(0, 10000) for _ in range(source.randint(shortest, longest))] for _ in range(sequences)]
    return [(prompt, source.randint(shortest, longest)) for prompt in prompts]


def ours(args: Namespace, work: Work, out: Recorder) -> None:
    from quire.llm import LLM
    from quire.plugins import load
    from quire.sampling.params import SamplingParams

    folder = shapes.write_config("0.6b", args.scratch, args.smoke)
    small: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20} if args.smoke else {}
    try:
        llm = LLM(
            str(folder), device=args.device, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True,
            max_model_len=512 if args.smoke else 4096, max_num_seqs=256, swap_space=0.0, enable_prefix_caching=False,
            max_num_batched_tokens=512 if args.smoke else 16384, **small,
        )  # fmt: skip
    except UserError as error:
        return out.missing(f"{ROW}, Quire", str(error))
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens) for _, tokens in work]
    prompts = [prompt for prompt, _ in work]

    def run() -> None:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        produced = [len(output.outputs[0].token_ids) for output in outputs]
        if produced != [tokens for _, tokens in work]:
            raise RuntimeError(f"{sum(produced)} tokens came, {sum(tokens for _, tokens in work)} were asked for")

    warm = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=8)] * len(work)
    llm.generate(prompts, warm, use_tqdm=False)  # compiles, and records the largest batch
    llm.generate(prompts[0], warm[0], use_tqdm=False)
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    out.add(f"{ROW}, Quire", sum(tokens for _, tokens in work) / seconds, "tokens/s", seconds=round(seconds, 2))
    device = load().choose(args.device)
    device.open(0)
    again = threading.Thread(target=run, daemon=True)
    again.start()
    time.sleep(0.4 * seconds)  # all sequences run by then, and most still do
    intervals, why = busy.watch(device.device, min(2.0, 0.3 * seconds))
    again.join()
    share = busy.share(intervals)
    if share is None:
        out.missing("0.6b: device busy", why)
    else:
        out.add("0.6b: device busy", share, "of the time", kernels=len(intervals))
    llm.shutdown()
    return None


def transformers(args: Namespace, work: Work) -> tuple[float, str]:
    """(seconds, version) of Transformers' continuous batching, what ``generate_batch`` runs, with each sequence's own
    length."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    kept = {k: v for k, v in shapes.config_of("0.6b", args.smoke).items() if k not in ("architectures", "model_type")}
    kind = {"rocm": "cuda", "cpu-torch": "cpu"}.get(args.device, args.device)
    with torch.device(kind):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**{**kept, "dtype": torch.bfloat16}), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    settings = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0,
        max_new_tokens=max(tokens for _, tokens in work),
    )  # fmt: skip

    def run(requests: Work) -> None:
        with model.continuous_batching_context_manager(generation_config=settings, block=True, timeout=10) as manager:
            for prompt, tokens in requests:
                manager.add_request(prompt, max_new_tokens=tokens)
            left = len(requests)
            while left:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    left -= 1
                elif result is None and not manager.is_running():
                    raise RuntimeError("the manager ended before its requests")

    run(work[:1])
    begin = time.perf_counter()
    run(work)
    return time.perf_counter() - begin, transformers.__version__


def vllm(args: Namespace, work: Work) -> tuple[float, str]:
    """(seconds, version) of vLLM with random weights of the same shape."""
    import vllm

    folder = shapes.write_config("0.6b", args.scratch, args.smoke)
    llm = vllm.LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096,
        max_num_seqs=256, enable_prefix_caching=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in work]
    params = [
        vllm.SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens, detokenize=False) for _, tokens in work
    ]
    llm.generate(prompts[:1], params[0], use_tqdm=False)
    begin = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin, vllm.__version__


PEERS = {"transformers": transformers, "vllm": vllm}


def main(argv: list[str] | None = None) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--peer", choices=sorted(PEERS))
    args = parser.parse_args(argv)
    out = Recorder(args.rows)
    work = workload(6, 24, 8) if args.smoke else workload()
    if args.peer is None:
        ours(args, work, out)
        return 0
    name = f"{ROW}, {args.peer}"
    if importlib.util.find_spec(args.peer) is None:
        out.missing(name, f"{args.peer} is not installed here")
        return 0
    try:
        seconds, version = PEERS[args.peer](args, work)
    except Exception as error:  # whatever a peer of another version does is no fault of ours
        out.missing(name, f"{type(error).__name__}: {error}")
        return 0
    out.add(name, sum(tokens for _, tokens in work) / seconds, "tokens/s", version=version, seconds=round(seconds, 2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
