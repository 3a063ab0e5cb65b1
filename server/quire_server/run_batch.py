"""``quire run-batch``: the lines of a batch, as /v1/batches takes them, from a file to a file without HTTP."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from quire.cli.engine_args import add_engine_arguments
from quire.errors import ConfigError, EngineDead, UserError
from quire_server.cli import add_trust_argument, answer_settings, in_loop
from quire_server.limits import add_limit_arguments
from quire_server.model_args import add_answer_arguments, add_model_arguments, each_model, engine_configs

if TYPE_CHECKING:
    from quire_server.batch_calls import Caller, Room
    from quire_server.batch_lines import Input, Line
    from quire_server.engine import EngineClient
    from quire_server.state import Settings

SHOWN_ERRORS = 20


class RunBatchError(UserError):
    """The run cannot begin, or could not come to its end: the message says why and how to go on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("batch")
    group.add_argument(
        "-i", "--input-file", required=True, metavar="FILE", help="JSON lines: custom_id, method, url and body"
    )
    group.add_argument(
        "-o", "--output-file", required=True, metavar="FILE", help="where each answer is written when it is there"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with an output file that is there: run what it does not have"
    )
    group.add_argument(
        "--batch-concurrency",
        type=int,
        metavar="N",
        help="sequences that the engines have at once, waiting ones included (default: twice --max-num-seqs)",
    )
    add_answer_arguments(group)
    add_trust_argument(group)
    add_limit_arguments(parser)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check, then load, then run. Returns the exit status: 0 when every line has its answer, be it a refusal."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    models = each_model(args)
    settings = answer_settings(args, models)
    concurrency = args.batch_concurrency
    if concurrency is None:
        concurrency = sum(2 * model.max_num_seqs for model in models)
    if concurrency < 1:
        raise ConfigError(f"--batch-concurrency must be above 0, not {concurrency}")
    from quire.engine.async_llm import AsyncLLM

    configs, _ = engine_configs(models)
    engines = [AsyncLLM(config, settings.limits.of_engine()) for config in configs]
    return in_loop(run_batch(engines, settings, args.input_file, args.output_file, concurrency, args.resume))


async def run_batch(
    engines: Sequence[EngineClient],
    settings: Settings,
    source: str,
    target: str,
    concurrency: int,
    resume: bool = False,
) -> int:
    """Run the lines of ``source`` that ``target`` has no answers to, over engines that are started here and ended."""
    from quire.cli.progress import line_progress
    from quire_server.app import create_app
    from quire_server.batch_calls import Caller
    from quire_server.batch_lines import Input
    from quire_server.serve import start
    from quire_server.state import Server

    server = Server(engines, settings)
    caller = Caller(server, create_app(server))
    lines = Input(Path(source), caller.endpoints, settings.limits)
    try:
        errors = lines.check()
        if errors:
            told = [f"line {error.line}: {error}" if error.line else str(error) for error in errors[:SHOWN_ERRORS]]
            more = [f"and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
            raise RunBatchError("\n  ".join([f"{source}: nothing was run", *told, *more]))
        done = _answers(Path(target), resume)
        left = [index for index in range(len(lines)) if not done or lines.line(index).custom_id not in done]
        if len(lines) - len(left) != len(done):
            raise RunBatchError(f"--resume: {target} has answers to requests that are not in {source}")
        with open(target, "ab") as output:
            if not left:
                return 0
            await start(server.models)
            with line_progress(len(lines), len(done)) as advance:
                failed = await _run(caller, lines, left, output, concurrency, advance)
    except (OSError, EngineDead) as error:
        raise RunBatchError(f"{error} (what {target} has is kept: --resume goes on)") from None
    finally:
        await asyncio.gather(*(engine.shutdown() for engine in engines))
    print(f"{len(left)} requests run, {failed} of them refused or failed: {target}", file=sys.stderr)
    return 0


def _answers(target: Path, resume: bool) -> set[str]:
    """The custom ids that an earlier run has answered; what it was writing when it ended is cut off."""
    if not target.exists() or target.stat().st_size == 0:
        return set()
    if not resume:
        raise RunBatchError(f"{target} is there: go on with it (--resume), or name another (-o)")
    done: set[str] = set()
    with target.open("r+b") as file:
        end = 0
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                break
            try:
                done.add(msgspec.json.decode(raw, type=_Answered).custom_id)
            except msgspec.MsgspecError:
                raise RunBatchError(f"--resume: line {number} of {target} is no answer of a batch") from None
            end += len(raw)
        file.truncate(end)
    return done


class _Answered(msgspec.Struct):
    custom_id: str


async def _run(
    caller: Caller, lines: Input, left: list[int], output: BinaryIO, concurrency: int, advance: Callable[[], None]
) -> int:
    """How many were not answered with success."""
    from quire_server.batch_calls import Room
    from quire_server.batch_lines import answered

    failed = 0
    room = Room(concurrency)

    async def one(line: Line) -> None:
        nonlocal failed
        answer = await caller.run(line, None)
        output.write(answered(line.custom_id, answer.status, answer.request_id, answer.body))
        output.flush()
        failed += not answer.good
        advance()

    try:
        async with asyncio.TaskGroup() as tasks:
            for index in left:
                line = lines.line(index)
                taken = await room.take(line.sequences)
                tasks.create_task(one(line)).add_done_callback(partial(_give_back, room, taken))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        output.flush()
        os.fsync(output.fileno())
    return failed


def _give_back(room: Room, taken: int, task: asyncio.Task[None]) -> None:
    room.give(taken)
