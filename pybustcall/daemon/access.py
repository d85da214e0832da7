"""Who is let in, to which capability, and what is required of them.

This module decides three things, in this order: whether a request is for this daemon and from a permitted place (host,
origin), whether whoever sent it may use the capability that it asks for (public, protected, private), and whether the
client has what the daemon requires. It knows capabilities by name only. What they do, and what is advertised of them,
is `app`'s affair.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections import OrderedDict
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, final, get_args

from aiohttp import web

from pybustcall.capabilities import unmet
from pybustcall.errors import ConfigurationError
from pybustcall.faults import TABLE, FaultKind
from pybustcall.models import Access, Problem, Requirements

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from multidict import CIMultiDictProxy

    from pybustcall.models import CapabilityDocument

__all__ = [
    "DIGEST_HEADER",
    "Admission",
    "Clients",
    "Principal",
    "Refusal",
    "check_access",
    "check_meeting",
    "check_token",
    "ip_address",
    "is_loopback",
    "presentable",
    "said_binding",
    "tiers_of",
]

DIGEST_HEADER: Final = "Bustcall-Capabilities"
_VERSION_HEADER: Final = "Bustcall-Version"
_BINDING_HEADER: Final = "Bustcall-Binding"

_TIERS: Final[tuple[Access, ...]] = get_args(Access)
_PUBLIC: Final = frozenset({"daemon.capabilities"})
_MEETING: Final = "daemon.negotiate"
_FOLLOWERS: Final[Mapping[str, str]] = dict.fromkeys(
    (
        f"cache.bust.{name}"
        for name in ("all", "dry_run", "idempotent", "namespace", "prefix", "settle", "soft", "tag", "verify")
    ),
    "cache.bust",
)  # whose access is another's: they are fields and headers of its route

_OF_ALL_TENANTS: Final = frozenset({"cache.dependencies", "cache.hotswap"})

_REJECTED: Final = TABLE[FaultKind.REJECTED].stage
_DENIED: Final = TABLE[FaultKind.NOT_ALLOWED].stage
_INCOMPATIBLE: Final = TABLE[FaultKind.INCOMPATIBLE].stage

_VISIBLE: Final = re.compile(r"[!-~]+")
_HOST_HEADER: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\s]+)(?::[0-9]{1,5})?")
_BINDING_NAME: Final = re.compile(r"[A-Za-z0-9._+@/-]{1,64}")


# Settings


def check_token(token: str | None, setting: str) -> None:
    """Raise `ConfigurationError` if this cannot be a token. The text never shows it."""
    if token is not None and not _VISIBLE.fullmatch(token):
        name = setting.replace("_", " ")
        raise ConfigurationError(
            f"the {name} must be visible ASCII characters without spaces, and at least one", setting=setting
        )


def check_access(access: Mapping[str, str], capabilities: Collection[str]) -> None:
    """Raise `ConfigurationError` if this gives access to what there is not, or in a way that there is not."""
    settable = sorted(set(capabilities) - _FOLLOWERS.keys())
    for name, tier in access.items():
        if (leader := _FOLLOWERS.get(name)) is not None:
            raise ConfigurationError(f"the access of {name} is that of {leader}; set that", setting="access")
        if name not in settable:
            raise ConfigurationError(
                f"there is no capability {name!r} to give access to; there are {', '.join(settable)}", setting="access"
            )
        if tier not in _TIERS:
            raise ConfigurationError(
                f"the access of {name} must be one of {', '.join(_TIERS)}, not {tier!r}", setting="access"
            )


def check_meeting(requires: Requirements, access: Mapping[str, str], operator_token: str | None) -> None:
    """Raise `ConfigurationError` if clients must tell what they can do, and nobody may tell it."""
    if requires.capabilities and access.get(_MEETING) == "private" and operator_token is None:
        raise ConfigurationError(
            f"capabilities are required of clients, which tell theirs by {_MEETING}, and that is private: no client"
            " could do anything; leave it protected, require no capability, or set an operator token"
            " (BUSTCALL_OPERATOR_TOKEN)",
            setting="access",
        )


def tiers_of(capabilities: Iterable[str], access: Mapping[str, Access]) -> dict[str, Access]:
    """Tell the tier of each capability: what `access` says, or else public for the capabilities, protected for all."""

    def tier(name: str) -> Access:
        return access.get(name, "public" if name in _PUBLIC else "protected")

    return {name: tier(_FOLLOWERS.get(name, name)) for name in capabilities}


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach what listens on this host."""
    address = ip_address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an IP address; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


# Refusals


@final
class Refusal(Exception):
    """A request ends here: what to answer, and at which stage to remember it, or None not to.

    - `kind`: the problem's type, for those that have one
    - `binding`: who asked, as far as the body said
    - `denial`: whether somebody was not let in, rather than something asked wrongly
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        stage: int | None = _REJECTED,
        kind: str = "about:blank",
        field_name: str | None = None,
        supported: tuple[str, ...] | None = None,
        unmet: tuple[str, ...] | None = None,
        headers: Mapping[str, str] | None = None,
        binding: str = "unknown",
        denial: bool = False,
    ) -> None:
        super().__init__(detail)
        self.stage = stage
        self.binding = binding
        self.denial = denial
        self._headers = headers
        self._problem = Problem(
            type=kind,
            title=HTTPStatus(status).phrase,
            status=status,
            detail=detail,
            field=field_name,
            supported=supported,
            unmet=unmet,
        )

    def response(self) -> web.Response:
        """Make the answer: a problem of RFC 9457."""
        return web.Response(
            status=self._problem.status,
            body=self._problem.model_dump_json(exclude_none=True).encode(),
            headers=self._headers,
            content_type="application/problem+json",
        )


def presentable(said: object) -> str:
    """Tell the binding that somebody says to be, if it can be shown; "unknown" otherwise."""
    return said if isinstance(said, str) and _BINDING_NAME.fullmatch(said) else "unknown"


def said_binding(headers: CIMultiDictProxy[str]) -> str:
    """Tell the binding that a request's headers say, if it can be shown; "unknown" otherwise."""
    return presentable(_single(headers, _BINDING_HEADER))


def _single(headers: CIMultiDictProxy[str], name: str) -> str | None:
    """Tell a header's value; what is said twice is said by nobody."""
    given = headers.getall(name, [])
    return given[0] if len(given) == 1 else None


# Admission


@final
@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is: the name in the audit, and the only namespace that they may use; None is any."""

    name: str
    namespace: str | None = None

    def check(self, namespace: str, binding: str = "unknown") -> None:
        """Raise the refusal (403) of a namespace that is not theirs."""
        if self.namespace not in {None, namespace}:
            raise Refusal(
                403,
                f"this token is for the namespace {self.namespace} only, which the request must say",
                stage=_DENIED,
                field_name="namespace",
                binding=binding,
                denial=True,
            )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Whom the daemon lets in, to what.

    - `hosts`: names, beyond IP addresses and localhost, that a `Host` header may say
    - `token`: opens what is protected; without one, protected is open to all
    - `operator_token`: opens everything; without one, nobody may use what is private
    - `tenants`: tokens by namespace, each of which opens what is protected for that namespace only
    - `tiers`: of every capability

    With any token set, what is protected needs one of them.
    """

    hosts: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)
    operator_token: str | None = field(default=None, repr=False)
    tenants: Mapping[str, str] = field(default_factory=dict, repr=False)
    tiers: Mapping[str, Access] = field(default_factory=dict)

    @property
    def _is_open(self) -> bool:
        """Whether what is protected needs no token."""
        return self.token is None and self.operator_token is None and not self.tenants

    def is_usable(self, capability: str) -> bool:
        """Tell whether there is anybody who may use it."""
        return self.tiers[capability] != "private" or self.operator_token is not None

    def advertised(self) -> dict[str, Access]:
        """Tell the access of every capability as it is in effect: protected without any token is public."""
        return {
            name: "public" if tier == "protected" and self._is_open else tier
            for name, tier in sorted(self.tiers.items())
        }

    def credential(self, request: web.Request) -> str | None:
        """Tell which of the daemon's tokens the request has; None if none."""
        scheme, _, value = (_single(request.headers, "Authorization") or "").partition(" ")
        given = value.strip().encode("utf-8", "surrogateescape")
        # All are compared, and whole, so that the time tells nothing of any.
        found = [
            token
            for token in (self.operator_token, self.token, *self.tenants.values())
            if token is not None and hmac.compare_digest(given, token.encode())
        ]
        return found[0] if found and scheme.lower() == "bearer" else None

    def principal(self, request: web.Request) -> Principal:
        """Tell whose request it is."""
        credential = self.credential(request)
        if credential is None:
            return Principal("anonymous")
        if credential == self.operator_token:
            return Principal("operator")
        if credential == self.token:
            return Principal("token")
        namespace = next(name for name, token in self.tenants.items() if token == credential)
        return Principal(f"tenant {namespace}", namespace)

    def admit(self, request: web.Request, capability: str | None) -> None:
        """Raise the refusal of a request for another host, from another origin, or of nobody who may do this.

        `capability` is None where there is no such route: whether there is one is told to those who are let in.
        """
        denied = f"{capability or 'an unknown route'} is denied"
        listener = request.get_extra_info("socket")
        hosts = request.headers.getall("Host", [])
        if (listener is None or listener.family != socket.AF_UNIX) and not self._is_known_host(hosts):
            raise _denial(
                421,
                f"{denied}: this daemon does not answer for that host; its operator can add it to the allowed hosts",
            )
        if not _is_own_origin(request.headers, hosts):
            raise _denial(403, f"{denied}: pages of other origins may not call this daemon")
        match "protected" if capability is None else self.tiers[capability]:
            case "protected":
                self._admit_protected(request, capability, denied)
            case "private":
                self._admit_private(request, denied)

    def _admit_protected(self, request: web.Request, capability: str | None, denied: str) -> None:
        if self._is_open:
            return
        if self.credential(request) is None:
            raise _unknown(f"{denied}: this daemon wants its token, as Authorization: Bearer")
        namespace = self.principal(request).namespace
        if namespace is not None and capability in _OF_ALL_TENANTS:
            raise _denial(
                403, f"{denied}: it concerns all tenants, and this token is for the namespace {namespace} only"
            )

    def _admit_private(self, request: web.Request, denied: str) -> None:
        if self.operator_token is None:
            raise _denial(403, f"{denied}: it is private, and nobody may use it here")
        given = self.credential(request)
        if given is None:
            raise _unknown(f"{denied}: it is private, and wants the operator's token, as Authorization: Bearer")
        if given != self.operator_token:
            raise _denial(403, f"{denied}: it is private, and this token does not open it")

    def _is_known_host(self, hosts: list[str]) -> bool:
        found = _HOST_HEADER.fullmatch(hosts[0]) if len(hosts) == 1 else None
        name = found["name"].strip("[]").lower().removesuffix(".") if found else ""
        known = {"localhost", *(host.lower().removesuffix(".") for host in self.hosts)}
        return bool(name) and (name in known or ip_address(name) is not None)


def _unknown(detail: str) -> Refusal:
    return _denial(401, detail, {"WWW-Authenticate": "Bearer"})


def _denial(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Refusal:
    return Refusal(status, detail, stage=_DENIED, headers=headers, denial=True)


def _is_own_origin(headers: CIMultiDictProxy[str], hosts: list[str]) -> bool:
    own = {f"{scheme}://{host.lower()}" for host in hosts for scheme in ("http", "https")}
    origins = headers.getall("Origin", [])
    sites = headers.getall("Sec-Fetch-Site", [])
    return all(origin.lower() in own for origin in origins) and all(
        site.lower() in {"same-origin", "none"} for site in sites
    )


# Requirements


@final
class Clients:
    """Whether clients have what is required of them, as far as they have advertised themselves.

    The last `limit` digests are remembered, each with those of the required capabilities that its document names. Who
    was forgotten is asked to advertise itself again.
    """

    def __init__(self, requires: Requirements, limit: int = 256) -> None:
        self._requires = requires
        self._limit = limit
        self._is_open = not unmet(requires, None, ())  # even somebody who says nothing fits
        self._known: OrderedDict[str, frozenset[str]] = OrderedDict()

    def check(self, headers: CIMultiDictProxy[str]) -> None:
        """Raise the refusal of a client that does not fit (426), or of one that has yet to say what it can do (428)."""
        if self._is_open:
            return
        version = _single(headers, _VERSION_HEADER)
        digest = _single(headers, DIGEST_HEADER)
        if not self._requires.capabilities:
            self._judge(self._requires, version, frozenset())
        elif digest is not None and digest in self._known:
            self._known.move_to_end(digest)
            self._judge(self._requires, version, self._known[digest])
        else:
            self._judge(Requirements(semverx=self._requires.semverx), version, frozenset())
            raise Refusal(
                428,
                "this daemon requires capabilities of its clients: send your capability document to POST"
                f" /api/v1/capabilities and its digest in the header {DIGEST_HEADER}, then repeat the request",
                stage=None,  # no fault: so begin two that meet for the first time
                kind="urn:bustcall:problem:advertise",
            )

    def meet(self, digest: str, document: CapabilityDocument) -> None:
        """Remember what a client advertises. Raises its refusal (426) if it does not fit."""
        has = frozenset(self._requires.capabilities) & frozenset(document.capabilities)
        self._known[digest] = has
        self._known.move_to_end(digest)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)
        self._judge(self._requires, document.semverx, has, presentable(document.binding))

    def _judge(
        self, requires: Requirements, version: str | None, has: frozenset[str], binding: str = "unknown"
    ) -> None:
        if lacking := unmet(requires, version, has):
            raise Refusal(
                426,
                f"this client does not fit the daemon's requirements: {'; '.join(lacking)}",
                stage=_INCOMPATIBLE,
                kind="urn:bustcall:problem:incompatible",
                unmet=lacking,
                headers={"Upgrade": "bustcall/1", "Connection": "Upgrade"},
                binding=binding,
            )
