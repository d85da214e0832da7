"""Which daemons there are, and in what order they are asked: the hub first (star), or its peers (ring).

Addresses are parsed and checked here, once, so that every other room can take a `DaemonAddress` as sound. The order of
the ring differs from client to client, so that a thousand clients do not all fall on one peer when the hub fails; and
`StarRing` decides when calls leave the hub, and when and how they return to it. Which daemon is well is `fleet`'s
to know.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, final
from urllib.parse import urlsplit

from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pybustcall.policies import Failback

__all__ = ["DEFAULT_URL", "STAR_RING", "DaemonAddress", "Route", "RouteSignal", "StarRing", "Topology", "ring_order"]

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
    def parse(cls, url: object, peers: object = ()) -> Topology:
        """Read the hub's URL and its peers'; raise `ConfigurationError` for a bad one or one named twice."""
        if isinstance(peers, str | bytes) or not isinstance(peers, Iterable):
            told = "one string" if isinstance(peers, str | bytes) else type(peers).__name__
            raise ConfigurationError(f"peers must be a list of URLs, not {told}", setting="peers")
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


def ring_order(client_id: str, peers: Sequence[str]) -> list[int]:
    """Tell in what order this client asks its peers: by rendezvous hash, the highest SHA-256 of client and peer first.

    Each client has an order of its own, which does not change when others come and go; over many clients the peers
    share the first place evenly, and the second place of those whose first has failed too (Thaler and Ravishankar,
    1998).
    """

    def weight(index: int) -> bytes:
        return hashlib.sha256(f"{client_id}\n{peers[index]}".encode()).digest()

    return sorted(range(len(peers)), key=weight, reverse=True)


class Route(StrEnum):
    """Where calls go first."""

    STAR = "star"  # to the hub
    RING = "ring"  # to the peers: the hub is down, or not yet good for long enough
    WAITING = "waiting"  # to the peers: the hub has been good for long enough, and our turn to return comes
    RETURNING = "returning"  # a growing share to the hub


class RouteSignal(StrEnum):
    """What happens to the route."""

    HUB_DOWN = "the hub is down"
    HUB_POOR = "the hub met a fault, or a probe missed it"
    HUB_STEADY = "the hub has been good for the hold"
    TURN_CAME = "our turn to return came"
    RAMP_OVER = "the ramp is over"
    RESET = "the user said so"


STAR_RING: Final[Mapping[tuple[Route, RouteSignal], Route]] = MappingProxyType(
    {
        (Route.STAR, RouteSignal.HUB_DOWN): Route.RING,
        (Route.RING, RouteSignal.HUB_STEADY): Route.WAITING,
        (Route.WAITING, RouteSignal.HUB_POOR): Route.RING,
        (Route.WAITING, RouteSignal.HUB_DOWN): Route.RING,
        (Route.WAITING, RouteSignal.TURN_CAME): Route.RETURNING,
        (Route.RETURNING, RouteSignal.HUB_DOWN): Route.RING,
        (Route.RETURNING, RouteSignal.RAMP_OVER): Route.STAR,
        (Route.RING, RouteSignal.RESET): Route.STAR,
        (Route.WAITING, RouteSignal.RESET): Route.STAR,
        (Route.RETURNING, RouteSignal.RESET): Route.STAR,
    }
)
"""The route as a table; a pair that is not in it changes nothing."""

_RAMP: Final = (0.05, 0.25, 0.5)


@final
class StarRing:
    """Decides whether calls go to the hub or to the ring: failover at once, failback late, spread and little by little.

    Theory of operation. When the hub is down the route is RING. There it must be good for `hold` seconds with enough
    evidence, any fault or missed probe beginning that anew; then a random wait spreads the clients; then 5, 25 and 50 %
    of the calls go to the hub, and at last all. If it goes down before it has served for as long as the hold was, that
    is a relapse, and the next hold is twice as long. So a hub that flaps is left once and not returned to.
    """

    def __init__(self, policy: Failback | None) -> None:
        self._policy = policy
        self.route = Route.STAR
        self._hold = policy.hold if policy is not None else math.inf
        self._good_since = math.inf
        self._evidence = 0
        self._turn = math.inf
        self._ramp_begun = math.inf
        self._returned = -math.inf

    def hub_down(self, now: float) -> bool:
        """Take in that the hub is down; tell whether calls leave it by that."""
        before = self.route
        relapse = before is Route.RETURNING or now - self._returned < self._hold
        moved = self._move(RouteSignal.HUB_DOWN)
        if moved and self._policy is not None and before is not Route.WAITING:
            self._hold = min(self._policy.cap, self._hold * 2) if relapse else self._policy.hold
        self._begin_anew()
        return moved and before is not Route.WAITING

    def hub_poor(self) -> None:
        """Take in a fault of the hub's, or a missed probe: it has to be good from the beginning."""
        self._move(RouteSignal.HUB_POOR)
        self._begin_anew()

    def hub_good(self, now: float) -> None:
        """Take in a good probe or answer of the hub."""
        self._good_since = min(self._good_since, now)
        self._evidence += 1

    def advance(self, now: float, random: Callable[[], float]) -> Route:
        """Let time work; tell the route now."""
        policy = self._policy
        if policy is not None:
            steady = now - self._good_since >= self._hold and self._evidence >= policy.evidence
            if steady and self._move(RouteSignal.HUB_STEADY):
                self._turn = now + random() * policy.spread
            if now >= self._turn and self._move(RouteSignal.TURN_CAME):
                self._ramp_begun, self._turn = now, math.inf
            if now >= self._ramp_begun + policy.ramp and self._move(RouteSignal.RAMP_OVER):
                self._returned, self._ramp_begun = now, math.inf
        return self.route

    def share(self, now: float) -> float:
        """Tell which share of the calls goes to the hub first."""
        if self.route is not Route.RETURNING or self._policy is None:
            return 1.0 if self.route is Route.STAR else 0.0
        # A ramp of no length is over in the moment it begins: `advance` never leaves the route RETURNING then.
        step = int((now - self._ramp_begun) / self._policy.ramp * len(_RAMP))
        return _RAMP[min(step, len(_RAMP) - 1)]

    def reset(self) -> None:
        """Return to the hub at once, as if nothing had been."""
        self._move(RouteSignal.RESET)
        self._hold = self._policy.hold if self._policy is not None else math.inf
        self._returned = -math.inf
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._good_since, self._evidence = math.inf, 0
        if self.route is not Route.RETURNING:
            self._turn = self._ramp_begun = math.inf

    def _move(self, signal: RouteSignal) -> bool:
        before = self.route
        self.route = STAR_RING.get((before, signal), before)
        return self.route is not before


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _public(url: str) -> str:
    """Show a URL without the credentials it may hold."""
    return re.sub(r"//.*@", "//***@", url)
