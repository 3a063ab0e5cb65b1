"""The engine's flags, with vLLM's names, shared by every command that starts an engine."""

from __future__ import annotations

import argparse

from quire.config import CACHE_FIELDS, ENGINE_FIELDS, SCHEDULER_FIELDS, EngineConfig, SchedulerConfig, make_config
from quire.quantization import FORMATS


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("model and device")
    group.add_argument("--tokenizer", help="folder or name of the tokenizer, when it is not the model's own")
    group.add_argument("--skip-tokenizer-init", action="store_true", help="take and give token ids only")
    group.add_argument(
        "--device", default="auto", help="a device that a plugin registers, or NAME:INDEX (default: auto)"
    )
    group.add_argument(
        "--dtype", default="auto", help="auto (the checkpoint's, where the device has it), bfloat16, float16 or float32"
    )
    group.add_argument(
        "--quantization", "-q", choices=[*FORMATS], help="round a plain checkpoint's weights to this while loading"
    )
    group.add_argument(
        "--load-format", default="auto", choices=["auto", "safetensors", "dummy"], help="dummy: random weights"
    )
    group.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    group.add_argument("--threads", type=int, help="threads of a CPU device (default: the cores this process may use)")
    group.add_argument(
        "--isa", metavar="NAME", help="instruction set, where the device has several (default: the best)"
    )
    group.add_argument("--batch-invariant", action="store_true", help="refuse a device that cannot promise it")
    group.add_argument(
        "--attention-backend",
        metavar="NAME",
        help="an attention implementation that the device offers (default: it chooses; `quire doctor` shows them)",
    )
    group.add_argument("--enforce-eager", action="store_true", help="never capture decode steps")
    group.add_argument("--seed", type=int, default=0, help="seed of dummy weights")
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--max-model-len", type=length, help="most tokens of prompt and output (default: the model's, if it fits)"
    )
    group.add_argument("--gpu-memory-utilization", type=float, help="share of the device's memory to use")
    group.add_argument(
        "--kv-cache-memory-bytes", type=byte_size, help="KV cache size, e.g. 4G (default: by arithmetic)"
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help="auto (the model's), bf16, fp16, fp32, or fp8 or int8 (a scale for each token and head), as the device has them",
    )
    group.add_argument("--block-size", type=int, default=16, help="tokens in a page (default: 16)")
    group.add_argument(
        "--swap-space", type=float, default=1.0, help="GiB of host memory for swapped pages (default: 1)"
    )
    group.add_argument("--enable-prefix-caching", action=flag, default=True, help="reuse pages of equal prefixes")
    group = parser.add_argument_group("scheduling")
    group.add_argument("--max-num-seqs", type=int, default=256, help="sequences that run at once (default: 256)")
    group.add_argument("--max-num-batched-tokens", type=int, default=2048, help="new tokens in a step (default: 2048)")
    group.add_argument("--max-waiting", type=int, default=SchedulerConfig.max_waiting, help="requests that may wait")
    group.add_argument("--enable-chunked-prefill", action=flag, default=True, help="split long prompts over steps")
    group.add_argument(
        "--long-prefill-token-threshold", type=int, default=0, help="most prompt tokens of one request in a step"
    )
    group.add_argument("--scheduling-policy", default="fcfs", choices=["fcfs", "priority"])
    group.add_argument("--preemption-mode", default="auto", choices=["auto", "recompute", "swap"])
    group.add_argument("--async-scheduling", action=flag, default=True, help="plan a step while the one before runs")
    group = parser.add_argument_group("recovery")
    group.add_argument(
        "--step-timeout",
        type=float,
        default=EngineConfig.step_timeout,
        help="seconds after which an engine whose step does not end is replaced, five times as long for the first step of "
        "its size, which may compile kernels; loading has no limit; 0: never (%(default)g)",
    )
    group.add_argument(
        "--grammar-timeout",
        type=float,
        default=EngineConfig.grammar_timeout,
        help="seconds that compiling one request's grammar may take (%(default)g)",
    )
    group.add_argument(
        "--spare-process",
        action=flag,
        default=True,
        help="keep a process at hand that becomes the engine should it die; it holds no model, and 150 MB of host memory",
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The flags as a configuration. Raises ConfigError naming the flag."""
    return make_config(
        args.model,
        plugins=args.plugins,
        **{
            name: getattr(args, name) for name in ENGINE_FIELDS | SCHEDULER_FIELDS | CACHE_FIELDS if hasattr(args, name)
        },
    )


def byte_size(text: str) -> int:
    """``4G``, ``512M``, ``1.5GiB`` or plain bytes."""
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    number = text.lower().removesuffix("b").removesuffix("i")
    shift = units.get(number[-1:], 0)
    try:
        return int(float(number[:-1] if shift else number) * (1 << shift))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4G, 512M or 1073741824") from None


def length(text: str) -> int:
    """``4096``, ``32k`` or ``auto`` (0)."""
    if text == "auto":
        return 0
    try:
        return int(float(text[:-1]) * 1024) if text.lower().endswith("k") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 4096 or 32k") from None
