"""The engine process: it dies and nothing is lost, it stops with its parent, it never spins, it refuses by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from quire import AsyncLLM, SamplingParams
from quire.config import make_config
from quire.engine.outputs import merge
from quire.errors import EngineDead, QueueFull, RequestRefused

PROMPTS = [[5 + i, 17, 300, 42, 8, 99, 200] * (1 + i % 4) for i in range(12)]


def params(i: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0 if i % 2 else 1.0,
        seed=i,
        max_tokens=60 + i,
        ignore_eos=True,
        detokenize=False,
        n=1 + (i % 5 == 0),
    )


def with_engine(model, scenario, log_format="text", **options):
    """Run a coroutine function with a started AsyncLLM, and shut it down."""

    async def run():
        config = make_config(
            str(model), device="cpu", skip_tokenizer_init=True, kv_cache_memory_bytes=32 << 20, **options
        )
        llm = AsyncLLM(replace(config, log_format=log_format))
        await llm.start()
        try:
            return await asyncio.wait_for(scenario(llm), 120)
        finally:
            await llm.shutdown()

    return asyncio.run(run())


async def whole(llm, prompt, sampling, on_delta=None, **options):
    total = None
    async for delta in llm.generate(prompt, sampling, **options):
        total = merge(total, delta)
        if on_delta is not None:
            on_delta(delta)
    return total


def tokens(output):
    return [sample.token_ids for sample in output.outputs]


def test_killed_engines_are_replaced_and_streams_go_on(tiny):
    async def undisturbed(llm):
        return await asyncio.gather(*(whole(llm, p, params(i)) for i, p in enumerate(PROMPTS)))

    async def disturbed(llm):
        seen = 0

        def count(delta):
            nonlocal seen
            seen += 1

        async def killer():
            for threshold in (5, 60, 150):
                while seen < threshold:
                    await asyncio.sleep(0.005)
                os.kill(llm.engine._process.pid, signal.SIGKILL)
                await asyncio.sleep(0.3)

        task = asyncio.create_task(killer())
        outputs = await asyncio.gather(*(whole(llm, p, params(i), count) for i, p in enumerate(PROMPTS)))
        task.cancel()
        stats = await llm.stats()
        assert stats.running == stats.waiting == 0
        assert stats.pages_free == stats.pages_total
        return outputs, llm.engine.restarts

    expected = with_engine(tiny, undisturbed)
    outputs, restarts = with_engine(tiny, disturbed)
    assert restarts >= 2
    assert [tokens(o) for o in outputs] == [tokens(o) for o in expected]
    assert all(sample.finish_reason == "length" for o in outputs for sample in o.outputs)


def test_leaving_a_stream_frees_its_pages(tiny):
    async def scenario(llm):
        stream = llm.generate(PROMPTS[0], SamplingParams(max_tokens=400, ignore_eos=True, detokenize=False))
        async for _ in stream:
            break
        assert (await llm.stats()).running == 1
        await stream.aclose()
        for _ in range(100):
            stats = await llm.stats()
            if stats.pages_free == stats.pages_total:
                return stats.running
            await asyncio.sleep(0.01)
        return None

    assert with_engine(tiny, scenario) == 0


def test_an_idle_engine_sleeps(tiny):
    async def scenario(llm):
        await whole(llm, PROMPTS[0], params(1))
        process = psutil.Process(llm.engine._process.pid)
        await asyncio.sleep(0.3)
        before = process.cpu_times()
        await asyncio.sleep(1.0)
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system

    assert with_engine(tiny, scenario) < 0.2


def test_what_cannot_be_served_raises_before_or_after_it_is_sent(tiny):
    async def scenario(llm):
        with pytest.raises(RequestRefused, match="384 is not a token id"):
            await whole(llm, [384], params(1))
        with pytest.raises(RequestRefused, match="max_tokens = 600"):
            await whole(llm, PROMPTS[0], SamplingParams(max_tokens=600, detokenize=False))
        big = SamplingParams(max_tokens=400, detokenize=False)
        with pytest.raises(RequestRefused, match="pages"):
            await whole(llm, PROMPTS[0], big)
        results = await asyncio.gather(
            *(whole(llm, p, SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False)) for p in PROMPTS[:8]),
            return_exceptions=True,
        )
        full = [r for r in results if isinstance(r, QueueFull)]
        assert full
        assert all(len(tokens(r)[0]) == 20 for r in results if not isinstance(r, QueueFull))

    with_engine(tiny, scenario, num_pages=(8,), max_waiting=2, max_num_seqs=2, max_model_len=0)


def test_abort_by_id_ends_the_stream(tiny):
    async def scenario(llm):
        async def stop():
            await asyncio.sleep(0.2)
            await llm.abort("x")

        task = asyncio.create_task(stop())
        output = await whole(
            llm, PROMPTS[0], SamplingParams(max_tokens=480, ignore_eos=True, detokenize=False), request_id="x"
        )
        await task
        return output.outputs[0].finish_reason

    assert with_engine(tiny, scenario) in ("abort", "length")


def test_a_model_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["FancyForCausalLM"]}')

    async def nothing(llm):
        raise AssertionError("the engine should not have come up")

    with pytest.raises(EngineDead, match="FancyForCausalLM"):
        with_engine(tmp_path, nothing)


def test_the_engine_ends_with_its_parent(tiny):
    code = (
        "import asyncio, os, sys\n"
        "from quire import AsyncLLM\n"
        "from quire.config import make_config\n"
        "async def main():\n"
        "    llm = AsyncLLM(make_config(sys.argv[1], device='cpu', skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 24))\n"
        "    await llm.start()\n"
        "    print(llm.engine._process.pid, flush=True)\n"
        "    os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, timeout=100)
    pid = int(result.stdout)
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError(f"engine process {pid} is still there")


def test_the_engine_logs_in_the_format_it_is_told(tiny, capfd):
    async def scenario(llm):
        llm.engine._to.send_multipart([b"", b"\xc1"])  # no msgpack: the engine says that it drops it
        await llm.stats(timeout=30)

    with_engine(tiny, scenario, log_format="json")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (dropped,) = [line for line in lines if "does not decode" in line["message"]]
    assert (dropped["process"], dropped["logger"], dropped["level"]) == ("engine", "quire.engine", "ERROR")
