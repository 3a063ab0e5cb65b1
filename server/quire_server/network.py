"""What the server is to the network: certificates, which hosts and origins may ask, and bounds on connections."""

from __future__ import annotations

import argparse
import ipaddress
import json
import ssl
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError

LOOPBACK_NAMES = ("localhost", "*.localhost", "127.0.0.1", "::1")
"""What a server on loopback answers to. A page elsewhere whose name was made to point here has another (DNS rebinding)."""


@dataclass(frozen=True)
class Network:
    """See the flags of the same names."""

    host: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("GET", "POST")
    allowed_headers: tuple[str, ...] = ("authorization", "content-type", "x-api-key", "x-request-id")
    allow_credentials: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    timeout_keep_alive: int = 5
    max_connections: int = 8192
    max_header_bytes: int = 32768
    header_timeout: float = 20.0
    write_timeout: float = 300.0

    @property
    def scheme(self) -> str:
        return "https" if self.ssl_certfile else "http"

    def hosts(self, listening: str) -> tuple[str, ...]:
        """The Host headers that a server on this address answers to."""
        return self.allowed_hosts or (LOOPBACK_NAMES if is_loopback(listening) else ("*",))

    def uvicorn(self) -> dict[str, Any]:
        """The options that uvicorn.Config has for these."""
        return {
            "timeout_keep_alive": self.timeout_keep_alive,
            "ssl_certfile": self.ssl_certfile,
            "ssl_keyfile": self.ssl_keyfile,
            "ssl_keyfile_password": self.ssl_keyfile_password,
            "ssl_ca_certs": self.ssl_ca_certs,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.ssl_ca_certs else ssl.CERT_NONE,
        }

    def check(self) -> None:
        """Raises ConfigError: what cannot work is said before a model is loaded."""
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"--{name.replace('_', '-')} needs --ssl-certfile")
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                # A function, because OpenSSL would ask the terminal for a password that it is not given.
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, lambda: self.ssl_keyfile_password or "")
                if self.ssl_ca_certs is not None:
                    context.load_verify_locations(self.ssl_ca_certs)
            except (OSError, ValueError) as error:  # SSLError is an OSError
                raise ConfigError(f"--ssl-certfile, --ssl-keyfile, --ssl-ca-certs: {error}") from None
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("--allow-credentials: not with --allowed-origins '*': name the origins")
        for host in self.allowed_hosts:
            if "*" in host[1:] or (host.startswith("*") and host != "*" and not host.startswith("*.")):
                raise ConfigError(f"--allowed-hosts: {host!r} must be a name, an address, *.DOMAIN or *")
        for name in ("max_connections", "max_header_bytes", "header_timeout", "write_timeout", "timeout_keep_alive"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")


def allow_open_files(connections: int) -> None:
    """Let this process have a file for each connection, as far as its user may."""
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_allowed(header: str, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header names one of ``allowed``, whatever its port."""
    if "*" in allowed:
        return True
    host = header.lower().removesuffix(".")
    if host.startswith("["):
        host, bracket, port = host[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return False
    else:
        host = host.partition(":")[0].removesuffix(".")
    return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in map(str.lower, allowed))


def _names(text: str) -> list[str]:
    """One name, or vLLM's form: a JSON list of them."""
    if not text.startswith("["):
        return [text]
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON list of strings")
    return names


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    default = Network()

    def names(flag: str, text: str) -> None:
        group.add_argument(f"--{flag}", nargs="+", type=_names, metavar="NAME", help=text)

    names("allowed-hosts", f"Host headers to answer to; * is any (on loopback: {' '.join(LOOPBACK_NAMES)}; else any)")
    names("allowed-origins", "web pages of these origins may ask (CORS); * is any (none)")
    names("allowed-methods", f"what they may send ({' '.join(default.allowed_methods)})")
    names("allowed-headers", f"with these headers ({' '.join(default.allowed_headers)})")
    group.add_argument("--allow-credentials", action="store_true", help="they may send cookies and the like")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate chain (PEM)")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, if that is not in the same file")
    group.add_argument("--ssl-keyfile-password", metavar="TEXT", help="what the private key is encrypted with")
    group.add_argument(
        "--ssl-ca-certs", metavar="FILE", help="clients must show a certificate that one of these has signed"
    )
    group.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="serve /metrics there and not on --port; 0 for any free one"
    )
    group.add_argument("--metrics-host", default=default.metrics_host, help="address of --metrics-port (%(default)s)")
    for flag, kind, text in (
        ("timeout-keep-alive", int, "seconds that a connection may idle between requests"),
        ("max-connections", int, "connections at once"),
        ("max-header-bytes", int, "bytes of a request's line and headers"),
        ("header-timeout", float, "seconds in which they must have arrived"),
        ("write-timeout", float, "seconds after which a client that takes nothing of its answer is cut off"),
    ):
        group.add_argument(
            f"--{flag}", type=kind, default=getattr(default, flag.replace("-", "_")), help=f"{text} (%(default)s)"
        )


def network_from(args: argparse.Namespace) -> Network:
    """Raises ConfigError."""
    given: dict[str, Any] = {}
    for name in Network.__dataclass_fields__:
        value = getattr(args, name)
        if isinstance(value, list):
            value = tuple(name for names in value for name in names)
        if value is not None:
            given[name] = value
    network = Network(**given)
    network.check()
    return network
