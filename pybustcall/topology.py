"""Which daemons there are, and in what order they are asked: the hub first (star), then its peers (ring).

Addresses are parsed and checked here, once, so that every other room can take a `DaemonAddress` as sound.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, final
from urllib.parse import urlsplit

from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["DEFAULT_URL", "DaemonAddress", "Topology"]

DEFAULT_URL = "http://127.0.0.1:8989"

_DEFAULT_PORT = {"http": 80, "https": 443}
_MAX_SOCKET_PATH = 107  # bytes: sun_path of Linux is 108 with its closing NUL
_SAFE = re.compile(r"[!-~]+")
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?")


@final
@dataclass(frozen=True, slots=True)
class DaemonAddress:
    """Where one daemon listens, in normal form, so that equal addresses are equal values.

    - `url`: the normal form: lower-case host, no default port, no slash at the end
    - `scheme`: "http", "https" or "unix"
    - `base`: what routes are appended to; for a Unix socket `http://localhost`
    - `socket_path`: path of the Unix socket, or None
    - `host`: name or IP address without brackets; "localhost" for a Unix socket
    """

    url: str
    scheme: str
    base: str
    host: str
    socket_path: str | None = None

    @classmethod
    def parse(cls, url: object, *, setting: str = "url") -> DaemonAddress:
        """Read `http://host[:port][/base]`, `https://...` or `unix:///path/of/socket`.

        Raises `ConfigurationError`, naming `setting`, for anything else: other schemes, no host, a bad port,
        credentials, a query or a fragment, characters that do not belong into a URL.
        """
        if not isinstance(url, str):
            raise ConfigurationError(f"{setting} must be a string, not {type(url).__name__}", setting=setting)
        if not _SAFE.fullmatch(url):
            why = "has characters that no URL has; write it in ASCII, without spaces" if url else "is empty"
            raise ConfigurationError(f"{setting} {_public(url)!r} {why}", setting=setting)
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigurationError(f"{setting} {_public(url)!r} is not a URL: {error}", setting=setting) from None

        def refuse(why: str) -> ConfigurationError:
            return ConfigurationError(f"{setting} {_public(url)!r} {why}", setting=setting)

        if parts.username is not None or parts.password is not None:
            raise refuse("holds credentials; give them as token instead")
        if parts.query or parts.fragment or url.endswith(("?", "#")):
            raise refuse("has a query or a fragment; a daemon's address has neither")
        match parts.scheme:
            case "unix":
                return cls._parse_unix(parts.netloc, parts.path, refuse("must be written unix:///path/of/the.sock"))
            case "http" | "https":
                host = parts.hostname
            case _:
                raise refuse("must begin with http://, https:// or unix:///, as in http://127.0.0.1:8989")
        if not host:
            raise refuse("names no host")
        if not _is_ip(host) and not _NAME.fullmatch(host):
            raise refuse("names a host that is neither a name nor an IP address")
        if port == 0:
            raise refuse("has port 0, which nobody can listen on")
        shown = f"[{host}]" if ":" in host else host
        if port is not None and port != _DEFAULT_PORT[parts.scheme]:
            shown = f"{shown}:{port}"
        normal = f"{parts.scheme}://{shown}{parts.path.rstrip('/')}"
        return cls(url=normal, scheme=parts.scheme, base=normal, host=host)

    @classmethod
    def _parse_unix(cls, netloc: str, path: str, refusal: ConfigurationError) -> DaemonAddress:
        if netloc or not path.startswith("/") or len(path) < 2 or path.endswith("/"):
            raise refusal
        if len(path.encode()) > _MAX_SOCKET_PATH:
            raise ConfigurationError(
                f"the socket path {path!r} is longer than {_MAX_SOCKET_PATH} bytes, the most that the system takes",
                setting=refusal.setting,
            )
        return cls(url=f"unix://{path}", scheme="unix", base="http://localhost", host="localhost", socket_path=path)

    @property
    def is_local(self) -> bool:
        """Whether what is sent there stays on this machine: a Unix socket, localhost or a loopback address."""
        return self.host == "localhost" or (_is_ip(self.host) and ipaddress.ip_address(self.host).is_loopback)

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS protects the way there."""
        return self.scheme == "https"

    def __str__(self) -> str:
        return self.url


@final
@dataclass(frozen=True, slots=True)
class Topology:
    """The hub and its peers, each named once, in the order in which they are asked."""

    hub: DaemonAddress
    peers: tuple[DaemonAddress, ...] = ()

    @classmethod
    def parse(cls, url: object, peers: Iterable[object] = ()) -> Topology:
        """Read the hub's URL and its peers'; raise `ConfigurationError` for a bad one or one named twice."""
        if isinstance(peers, str | bytes):
            raise ConfigurationError("peers must be a list of URLs, not one string", setting="peers")
        hub = DaemonAddress.parse(url)
        seen: dict[DaemonAddress, str] = {hub: "the hub"}
        ring: list[DaemonAddress] = []
        for number, peer in enumerate(peers, start=1):
            address = DaemonAddress.parse(peer, setting=f"peers[{number - 1}]")
            if other := seen.get(address):
                raise ConfigurationError(
                    f"peer {number}, {address}, is the same daemon as {other}; name each daemon once", setting="peers"
                )
            seen[address] = f"peer {number}"
            ring.append(address)
        return cls(hub, tuple(ring))

    def __iter__(self) -> Iterator[DaemonAddress]:
        yield self.hub
        yield from self.peers


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _public(url: str) -> str:
    """Show a URL without the credentials it may hold."""
    return re.sub(r"//.*@", "//***@", url)
