"""The errors a caller meets, all in one place. Each says what was asked, what the limit is and what to do instead."""

from __future__ import annotations

from quire.hardware import DeviceUnavailable, UnsupportedOnDevice, UserError

__all__ = [
    "ConfigError", "DeviceUnavailable", "DoesNotFit", "EngineDead", "EngineRestarting", "ModelError", "QueueFull",
    "RequestRefused", "UnsupportedOnDevice", "UserError",
]  # fmt: skip


class ConfigError(UserError, ValueError):
    """A setting that cannot be honoured: the message names the field, its value and the limit."""


class RequestRefused(UserError, ValueError):
    """A request that can never be served as it stands. ``field`` is the parameter at fault."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueueFull(UserError):
    """As many requests wait as the configuration allows; try again later."""


class DoesNotFit(UserError):
    """The model, or one request of full length, does not fit the memory. The message shows the arithmetic."""


class ModelError(UserError, ValueError):
    """A checkpoint that cannot be served: unknown architecture, missing or mis-shaped tensor, unsupported setting."""


class EngineDead(RuntimeError):
    """The engine process has ended, or never came up. The message carries its last words."""


class EngineRestarting(EngineDead):
    """The engine process has ended and another one is starting; open requests will go on in it."""
