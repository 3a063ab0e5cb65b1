"""The formats of tool calls that the server knows, one file each. ``docs/tool-calling.md`` has the table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

BUILT_IN = {
    "hermes": "hermes.Hermes",
    "qwen": "hermes.Hermes",
    "llama3_json": "llama3_json.Llama3Json",
    "llama4_json": "llama3_json.Llama3Json",
    "pythonic": "pythonic.Pythonic",
    "llama4_pythonic": "pythonic.Pythonic",
    "mistral": "mistral.Mistral",
    "deepseek_v3": "deepseek.DeepSeek",
    "deepseek_v31": "deepseek.DeepSeekV31",
    "kimi_k2": "kimi_k2.KimiK2",
    "glm45": "glm45.Glm45",
    "qwen3_coder": "qwen3_coder.Qwen3Coder",
    "openai": "harmony.Harmony",
    "granite": "granite.Granite",
}
"""Names as ``--tool-call-parser`` has them in vLLM, and the class of each."""


def register(add: Callable[[str, Callable[[], Any]], None]) -> None:
    for name, place in BUILT_IN.items():
        add(name, partial(load, place))


def load(place: str) -> Any:
    module, _, name = place.partition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)
