"""Grammars are checked in a process that may be killed.

llguidance counts its steps, so most of what is too large ends in an error. But a few thousand rules that refer to one
another overflow its stack, which ends a process, and some schemas take it seconds. Neither may happen to a server or an
engine: a grammar is first compiled here, and refused by name when that takes too long or goes wrong.

:class:`GrammarChecker` is the server's side. ``python -m quire.sampling.grammar_worker`` is the other: it reads a
:class:`Start` and then StructuredOutputs, each as msgpack behind its length (4 bytes, big-endian), and answers each with
a :class:`Verdict` in the same way.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import IO

import msgspec

from quire.config import EngineConfig
from quire.sampling.grammar import GrammarCompiler, GrammarError, refusal
from quire.sampling.params import InvalidParameter, StructuredOutputs

REMEMBERED = 1024  # verdicts
START_TIMEOUT = 60.0  # seconds to read the tokenizer, once
MEMORY = 4 << 30  # bytes of address space that a worker may use
STACK = 1 << 20  # bytes; less than any thread of the engine has: what fits here fits there


class Start(msgspec.Struct):
    config: EngineConfig
    vocab_size: int
    eos_token_ids: list[int]


class Verdict(msgspec.Struct, omit_defaults=True):
    error: str | None = None


class GrammarChecker:
    """Compiles grammars in a process of its own, which starts with the first one. Any thread may call it."""

    def __init__(self, config: EngineConfig, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._start = Start(config, vocab_size, eos_token_ids)
        self._timeout = config.grammar_timeout
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    def check(self, spec: StructuredOutputs) -> None:
        """Return when the grammar compiles within its time, else raise InvalidParameter with the reason."""
        key = msgspec.msgpack.encode(spec)
        error = self.known(key, spec)
        if error is not None:
            raise error
        if key in self._known:
            return
        with self._lock:
            if key not in self._known:  # another thread may have asked the same meanwhile
                self._known[key] = self._ask(key)
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        error = self.known(key, spec)
        if error is not None:
            raise error

    def known(self, key: bytes, spec: StructuredOutputs) -> InvalidParameter | None:
        """The refusal of a grammar that was refused before."""
        reason = self._known.get(key)
        return None if reason is None else refusal(spec, reason)

    def _ask(self, frame: bytes) -> str | None:
        """Why the grammar is refused, or None. Whatever happens, the next grammar finds a worker."""
        if self._closed:
            return "the engine is shutting down"
        if self._process is None or self._process.poll() is not None:
            self._spawn()
            self._answer(START_TIMEOUT, "reading the tokenizer")
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            write(self._process.stdin, frame)
        return self._answer(self._timeout, "compiling it")

    def _answer(self, seconds: float, what: str) -> str | None:
        try:
            verdict = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._kill()
            return f"{what} takes longer than {seconds:g} s (--grammar-timeout)"
        if verdict is None:
            self._kill()
            return f"{what} needs more memory or stack than it may have"
        return verdict.error

    def _spawn(self) -> None:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "quire.sampling.grammar_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        answers: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        self._answers = answers
        assert process.stdin is not None
        assert process.stdout is not None
        stdout = process.stdout

        def listen() -> None:
            while frame := read(stdout):
                answers.put(msgspec.msgpack.decode(frame, type=Verdict))
            answers.put(None)

        threading.Thread(target=listen, daemon=True, name="quire-grammar-answers").start()
        with contextlib.suppress(OSError):
            write(process.stdin, msgspec.msgpack.encode(self._start))

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()

    def close(self) -> None:
        """End the worker, if there is one; a check that is under way is refused."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._kill()


def write(stream: IO[bytes], frame: bytes) -> None:
    stream.write(len(frame).to_bytes(4, "big") + frame)
    stream.flush()


def read(stream: IO[bytes]) -> bytes:
    """The next frame; empty at the end."""
    head = stream.read(4)
    return stream.read(int.from_bytes(head, "big")) if len(head) == 4 else b""


def main() -> None:
    from quire.text.checkpoint import open_text

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent, whose pipe closes
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    start = msgspec.msgpack.decode(read(requests), type=Start)
    compiler = GrammarCompiler(lambda: open_text(start.config).tokenizer, start.vocab_size, start.eos_token_ids)

    def verdict(spec: StructuredOutputs) -> Verdict:
        try:
            compiler.matcher(spec)
        except GrammarError as error:
            return Verdict(str(error))
        return Verdict()

    def serve() -> None:
        verdict(StructuredOutputs(choice=["a"]))  # reads the tokenizer
        write(answers, msgspec.msgpack.encode(Verdict()))
        while frame := read(requests):
            write(answers, msgspec.msgpack.encode(verdict(msgspec.msgpack.decode(frame, type=StructuredOutputs))))

    threading.stack_size(STACK)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
