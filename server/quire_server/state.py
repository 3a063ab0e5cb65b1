"""What the routes share: one object, made when the server starts, found at ``request.app.state.server``."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from quire import __version__
from quire_server.batch_settings import BatchSettings
from quire_server.engine import EngineClient
from quire_server.errors import ApiError, refuse
from quire_server.keys import ApiKeys, current_key
from quire_server.lifecycle import Lifecycle
from quire_server.limits import Limits
from quire_server.metrics import Metrics
from quire_server.model import Model, ModelSettings
from quire_server.network import Network
from quire_server.openai.base import LONG
from quire_server.openai.responses_background import Background
from quire_server.openai.responses_store import ResponseStore, StoreSettings
from quire_server.tracing import Tracing

if TYPE_CHECKING:
    from quire_server.batch_runner import Batches

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How this server was told to behave."""

    models: tuple[ModelSettings, ...] = (ModelSettings(),)
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    max_requests_per_minute_per_key: int | None = None
    max_concurrent_requests_per_key: int | None = None
    isolate_cache: bool = False
    limits: Limits = field(default_factory=Limits)
    store: StoreSettings = field(default_factory=StoreSettings)
    batches: BatchSettings = field(default_factory=BatchSettings)
    network: Network = field(default_factory=Network)
    trust_request_chat_template: bool = False
    health_timeout: float = 5.0
    access_log: bool = True
    otlp_traces_endpoint: str | None = None
    log_requests: bool = False
    max_log_len: int = 1000


@dataclass
class Server:
    """``engines``: one for each model of the settings, in their order."""

    engines: Sequence[EngineClient]
    settings: Settings = field(default_factory=Settings)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    batches: Batches = field(init=False)  # made with the application, whose routes they run

    def __post_init__(self) -> None:
        self.metrics = Metrics([model.names[0] for model in self.settings.models])
        pairs = zip(self.engines, self.settings.models, strict=True)
        self.models = [Model(self, engine, settings) for engine, settings in pairs]
        self._by_name = {name: model for model in self.models for name in model.settings.names}
        self.responses = ResponseStore(self.settings.store)
        self.background = Background(self.settings.store.max_background)
        endpoint = self.settings.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint)
        self.keys = ApiKeys(self.settings.api_keys, self.settings.api_key_file)
        self.settings = replace(self.settings, api_keys=())  # only their hashes stay
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="request")
        self._cache_secret = secrets.token_bytes(32)
        self.created = int(time.time())
        self.fingerprint = f"quire-{__version__}"

    @property
    def limits(self) -> Limits:
        return self.settings.limits

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """``work`` on something of this size: what takes milliseconds is done off the event loop."""
        if size < LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def cache_salt(self, given: str | None) -> str | None:
        """What a request's prefix cache is separated by: what it gave itself and, with --isolate-cache, its API key."""
        key = current_key.get()
        if not self.settings.isolate_cache or key is None:
            return given
        # A keyed hash, so that nobody who knows or guesses a key can name its part of the cache.
        tenant = blake2b(key.digest, digest_size=16, key=self._cache_secret).hexdigest()
        return tenant if given is None else f"{tenant}:{given}"

    def model(self, name: str | None) -> Model:
        """The model of this name or alias; without one, the only model. Raises 404 for one that is not served."""
        if name is None:
            if len(self.models) > 1:
                message = f"missing required parameter: model; served: {', '.join(self._by_name)}"
                raise refuse("model", message, "missing_required_parameter")
            return self.models[0]
        found = self._by_name.get(name)
        if found is None:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; served: {', '.join(self._by_name)}",
                param="model",
                code="model_not_found",
            )
        return found


async def server_of(request: Request) -> Server:
    """The dependency of every route: a coroutine, because FastAPI calls a plain function in a thread."""
    server: Any = request.app.state.server
    return server
