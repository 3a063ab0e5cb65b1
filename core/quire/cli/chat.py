"""``quire chat``: a conversation in the terminal, with a model loaded here or with any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from quire.cli.engine_args import add_engine_arguments, engine_config
from quire.cli.http import API_KEY_VARIABLE, ServerAddress, ServerError
from quire.errors import EngineDead, QueueFull, UserError

HELP = "chat in the terminal, with a local model or a server"
COMMANDS = """\
/reset            begin anew (the system prompt stays)
/model [NAME]     what the server serves; talk to another (the conversation stays)
/system TEXT      set the system prompt and begin anew
/retry            take the last answer back and ask again
/help             show this
/exit             leave; so does Ctrl-D
A line that ends with \\ goes on in the next; lines between two lines of \"\"\" are one message. Ctrl-C stops an answer."""

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, registered or hub name (demo); of a server, its name"
    )
    group = parser.add_argument_group("chat")
    group.add_argument("--base-url", metavar="URL", help="talk to this server instead of loading a model")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"the server's API key (default: the variable {API_KEY_VARIABLE})"
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument("--temperature", type=float, help="default: the model's")
    group.add_argument("--top-p", type=float, help="default: the model's")
    group.add_argument("--max-tokens", type=int, help="most tokens of an answer (default: what fits)")
    group.add_argument("--sampling-seed", type=int, metavar="SEED", help="the same answers again")
    add_engine_arguments(parser)


class Model(Protocol):
    name: str

    def others(self) -> list[str]:
        """Names that ``name`` can be."""
        ...

    def answer(self, messages: list[Message], say: Callable[[str], None]) -> None:
        """Generate; ``say`` gets the text piece by piece. KeyboardInterrupt, raised meanwhile, ends the request."""
        ...

    def close(self) -> None: ...


def run(args: argparse.Namespace) -> int:
    asked = {
        name: value
        for name, value in (
            ("temperature", args.temperature), ("top_p", args.top_p), ("max_tokens", args.max_tokens),
            ("seed", args.sampling_seed),
        )
        if value is not None
    }  # fmt: skip
    model: Model = Remote(args, asked) if args.base_url else Local(args, asked)
    try:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() gains history and editing)
            print(f"{model.name}. /help lists commands.")
        return Chat(model, args.system).loop()
    finally:
        model.close()


class Remote:
    """A server at an address."""

    def __init__(self, args: argparse.Namespace, asked: dict[str, Any]) -> None:
        self.address, self.asked = ServerAddress(args.base_url, args.api_key, timeout=300.0), asked
        if args.model is not None:
            self.name = args.model
            return
        models = self.address.json("/v1/models").get("data") or []
        if not models:
            raise ServerError(f"{self.address.root} serves no model: name one")
        self.name = models[0]["id"]

    def others(self) -> list[str]:
        """All names that the server knows. Raises ServerError."""
        return [model["id"] for model in self.address.json("/v1/models").get("data") or []]

    def answer(self, messages: list[Message], say: Callable[[str], None]) -> None:
        body = {"model": self.name, "messages": messages, "stream": True, **self.asked}
        with contextlib.closing(self.address.events("/v1/chat/completions", body)) as events:  # type: ignore[type-var]
            for event in events:
                for choice in event.get("choices") or []:
                    say(choice["delta"].get("content") or "")

    def close(self) -> None:
        pass


class Local:
    """A model in an engine process of its own, which an interrupt of this one leaves whole."""

    def __init__(self, args: argparse.Namespace, asked: dict[str, Any]) -> None:
        from quire.engine.async_llm import AsyncLLM

        self.name = args.model = args.model or "demo"
        self.asked = asked
        self.llm = AsyncLLM(engine_config(args))
        self.runner = asyncio.Runner()
        try:
            self.runner.run(self.llm.start())
            if self.llm.text is None:
                raise UserError("--skip-tokenizer-init: a chat needs the tokenizer")
        except EngineDead as error:
            self.close()
            raise UserError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def others(self) -> list[str]:
        return [self.name]

    def answer(self, messages: list[Message], say: Callable[[str], None]) -> None:
        try:
            self.runner.run(self._answer(messages, say))
        except EngineDead as error:
            raise UserError(f"the engine is gone: {error}") from None

    async def _answer(self, messages: list[Message], say: Callable[[str], None]) -> None:
        import msgspec

        assert self.llm.text is not None
        text = self.llm.text.render_chat(messages)
        ids = self.llm.text.tokenizer.encode(text, add_special_tokens=False)
        room = self.llm.info.max_model_len - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids)} tokens; the context holds {self.llm.info.max_model_len}: /reset"
            )
        asked = {"max_tokens": room, **self.asked}
        sampling = msgspec.structs.replace(self.llm.text.default_sampling(), **asked)
        prompt: Any = {"prompt": text, "prompt_token_ids": ids}
        async with contextlib.aclosing(self.llm.generate(prompt, sampling)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                for output in delta.outputs:
                    say(output.text)
                if delta.error:
                    raise UserError(delta.error)

    def close(self) -> None:
        self.runner.run(self.llm.shutdown())
        self.runner.close()


class Chat:
    """The conversation. Reads standard input, writes answers to standard output."""

    def __init__(self, model: Model, system: str | None) -> None:
        self.model, self.system = model, system
        self.messages: list[Message] = []
        self.status = 0
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def loop(self) -> int:
        for text in read_messages():
            if text.startswith("/") and "\n" not in text:
                if not self.command(text):
                    break
            elif text.strip():
                self.messages.append({"role": "user", "content": text})
                self.respond()
        return 0 if sys.stdin.isatty() else self.status

    def command(self, text: str) -> bool:
        """False: leave."""
        name, _, rest = text.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.reset()
        elif name == "/model":
            self.choose(rest.strip())
        elif name == "/system":
            self.system = rest.strip() or None
            self.reset()
        elif name == "/retry":
            if self.messages and self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if self.messages and self.messages[-1]["role"] == "user":
                self.respond()
        elif name == "/help":
            print(COMMANDS)
        else:
            print(f"no such command: {name}; /help lists them", file=sys.stderr)
        return True

    def choose(self, name: str) -> None:
        try:
            names = self.model.others()
        except UserError as error:
            print(f"quire chat: {error}", file=sys.stderr)
            return
        if name and name not in names:
            print(f"no such model: {name}", file=sys.stderr)
        elif name:
            self.model.name = name
        print("\n".join(("* " if one == self.model.name else "  ") + one for one in names))

    def respond(self) -> None:
        """One answer. What was said before an interrupt or an error stays in the conversation."""
        said: list[str] = []

        def say(piece: str) -> None:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        try:
            self.model.answer(self.messages, say)
        except KeyboardInterrupt:
            sys.stdout.write(" [stopped]")
        except (UserError, QueueFull) as error:
            self.status = 1
            sys.stdout.flush()
            print(f"quire chat: {error}", file=sys.stderr)
        print()
        if said:
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()  # a question without an answer would be followed by another


def read_messages() -> Iterator[str]:
    """Messages from standard input until it ends. Ctrl-C throws away what was typed."""
    while True:
        try:
            line = _line("> ")
            if line.strip() == '"""':
                lines = []
                while (line := _line("... ")).strip() != '"""':
                    lines.append(line)
                line = "\n".join(lines)
            else:
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + _line("... ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line


def _line(prompt: str) -> str:
    """A line; the prompt is shown to a person only."""
    if sys.stdin.isatty():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
