"""Who may ask: API keys with a name each, from flags and from a file. Only their hashes are held."""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

logger = logging.getLogger("quire.server")

API_KEY_VARIABLE = "QUIRE_API_KEY"
MAX_KEYS = 1024  # a candidate is compared with each of them
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OPTIONS = {"rpm": "requests_per_minute", "concurrent": "concurrent_requests"}


@dataclass(frozen=True)
class Key:
    """One key. A limit of None is the server's own (--max-requests-per-minute-per-key, ...)."""

    name: str
    digest: bytes  # SHA-256 of the key
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None


current_key: ContextVar[Key | None] = ContextVar("API key", default=None)
"""The key of the request that is being served; None where the server has no keys."""


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def new_key() -> str:
    """A key of 256 random bits."""
    return f"sk-quire-{secrets.token_urlsafe(32)}"


class ApiKeys:
    """The keys of a server. ``plain`` come from the command line, ``file`` is read again by :meth:`reload`."""

    def __init__(self, plain: tuple[str, ...] = (), file: Path | None = None) -> None:
        """Raises ConfigError."""
        self._fixed = [Key(f"api-key-{i}", digest_of(key.encode())) for i, key in enumerate(plain, 1)]
        self._file = file
        self._keys = _distinct([*self._fixed, *(read_keys(file) if file is not None else ())])
        self.guarded = file is not None or bool(plain)

    def __bool__(self) -> bool:
        """Whether a key is needed: with a file also when it holds none at the moment."""
        return self.guarded

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, candidate: bytes) -> Key | None:
        """The key that ``candidate`` is, compared with all of them, each in constant time."""
        given, found = digest_of(candidate), None
        for key in self._keys:
            if hmac.compare_digest(given, key.digest):
                found = key
        return found

    def named(self, name: str) -> Key:
        """The key of this name; one that is no longer in the file stays apart from all others."""
        gone = Key(name, digest_of(b"gone " + name.encode()))
        return next((key for key in self._keys if key.name == name), gone)

    def reload(self) -> None:
        """Read the file again. What cannot be read is logged and the keys stay as they are."""
        if self._file is None:
            return
        try:
            self._keys = _distinct([*self._fixed, *read_keys(self._file)])
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        logger.info("%d API keys", len(self._keys))


def read_keys(path: Path) -> list[Key]:
    """The keys of a file, one a line: ``NAME:KEY`` or ``NAME:SHA256``, then perhaps ``rpm=60`` and ``concurrent=4``.

    SHA256 is that of the key, 64 hexadecimal digits. Empty lines and what follows ``#`` are comments.
    Raises ConfigError with the line's number, never its text.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from None
    if os.name == "posix" and stat.S_IMODE(mode) & (stat.S_IROTH | stat.S_IWOTH):
        logger.warning("--api-key-file %s: every user of this machine can read or write it: chmod 600 %s", path, path)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            key = key_of_line(line)
        except ValueError as error:
            raise ConfigError(f"--api-key-file {path}, line {number}: {error}") from None
        if key is not None:
            keys.append(key)
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"--api-key-file {path}: {len(keys)} keys are more than {MAX_KEYS}")
    return keys


def key_of_line(line: str) -> Key | None:
    """None: the line holds no key. Raises ValueError."""
    fields = line.partition("#")[0].split()
    if not fields:
        return None
    name, colon, value = fields[0].partition(":")
    if not colon or not _NAME.fullmatch(name):
        raise ValueError("must be NAME:KEY or NAME:SHA256, with 1 to 64 letters, digits or ._@- as NAME")
    if len(value) < 8:
        raise ValueError(f"the key of {name} has less than 8 characters; `quire api-key {name}` makes one")
    digest = bytes.fromhex(value) if _SHA256.fullmatch(value) else digest_of(value.encode())
    options: dict[str, int] = {}
    for field in fields[1:]:
        option, _, number = field.partition("=")
        if option not in _OPTIONS or not number.isdecimal() or not 0 < int(number) < 2**31:
            raise ValueError(f"after the key of {name} may stand {', '.join(f'{o}=NUMBER' for o in _OPTIONS)}")
        options[_OPTIONS[option]] = int(number)
    return Key(name, digest, **options)


def _distinct(keys: list[Key]) -> list[Key]:
    """Raises ConfigError when two keys have one name, or are one key."""
    names: set[str] = set()
    digests: dict[bytes, str] = {}
    for key in keys:
        if key.name in names:
            raise ConfigError(f"--api-key-file: two keys are named {key.name}")
        if key.digest in digests:
            raise ConfigError(f"--api-key-file: {key.name} and {digests[key.digest]} are the same key")
        names.add(key.name)
        digests[key.digest] = key.name
    return keys


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("API keys")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"a key that requests must carry; give it again for more (default: the variable {API_KEY_VARIABLE})",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys with names, one NAME:KEY or NAME:SHA256 a line (`quire api-key NAME` makes them); SIGHUP reads it again",
    )
    group.add_argument(
        "--max-requests-per-minute-per-key",
        type=int,
        metavar="N",
        help="requests that one key may ask in a minute; rpm=N in the file says otherwise for a key (no limit)",
    )
    group.add_argument(
        "--max-concurrent-requests-per-key",
        type=int,
        metavar="N",
        help="requests that one key may have open; concurrent=N in the file says otherwise for a key (no limit)",
    )
    group.add_argument(
        "--isolate-cache",
        action="store_true",
        help="cached prefixes are shared only between requests with the same key",
    )


def keys_from(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags say. Raises ConfigError."""
    variable = os.environ.get(API_KEY_VARIABLE)
    file = Path(args.api_key_file) if args.api_key_file is not None else None
    plain = tuple(args.api_key if args.api_key is not None else [variable] if variable and file is None else [])
    if any(not key.strip() for key in plain):
        raise ConfigError("--api-key: a key must not be empty")
    if file is not None and not len(ApiKeys(plain, file)):
        raise ConfigError(f"--api-key-file {file}: it holds no key")
    settings: dict[str, Any] = {"api_keys": plain, "api_key_file": file}
    for name in ("max_requests_per_minute_per_key", "max_concurrent_requests_per_key", "isolate_cache"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value and not plain and file is None:
            raise ConfigError(
                f"{flag}: without API keys there is nobody to tell apart: give --api-key-file or --api-key"
            )
        if value is not None and value is not False and value <= 0:
            raise ConfigError(f"{flag} must be above 0, not {value}")
        settings[name] = value
    return settings
