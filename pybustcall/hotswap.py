"""Cache dependencies and hot swaps: what a caller says of them, at which daemon it is done, and what it came to.

A registry of dependencies is each daemon's own, and a swap must be done at one, once. So unlike a bust it is never sent
to a second daemon while the first may have done it: it is repeated there, with its idempotency key, which the daemon's
registry answers by. The rules, the busts and the all-or-none are the daemon's (docs/explanation/contract.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from pybustcall.dispatcher import Daemon, dispatch
from pybustcall.errors import InvalidRequest, InvalidVersion
from pybustcall.faults import TABLE, Fault, FaultKind, Outcome
from pybustcall.fleet import Fleet, Policies
from pybustcall.models import (
    MAX_LISTED,
    MAX_SWAPS,
    AnnounceRequest,
    HotSwapRequest,
    RegisterRequest,
    SwapItem,
    cache_key_of,
    check_namespace,
    check_target,
)
from pybustcall.results import applied_of, stage_of
from pybustcall.semverx import SemverX, SemverXRange, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pybustcall.dispatcher import Ask, Receipt
    from pybustcall.models import DependencyReply, HotSwapReply, RegisterReply, ResolveReply, ResolveRequest
    from pybustcall.policies import Retry

__all__ = [
    "Dependency",
    "Resolution",
    "Swap",
    "SwapResult",
    "announce_request",
    "at_one",
    "check_name",
    "check_spec",
    "check_version",
    "register_request",
    "swap_request",
]

_Daemon = TypeVar("_Daemon", bound=Daemon)
_Reply = TypeVar("_Reply")


@final
@dataclass(frozen=True, slots=True)
class Swap:
    """One cache dependency to be replaced.

    - `name`: the dependency; `to`: the version that is to be current
    - `from_`: the version that must be current before; None for whatever is
    - `allow_experimental`: opts in to an experimental version
    - `validated`: says that an experimental version passed its validation, and may become stable
    - `migrate`: says that what depends on a legacy version is ready for a stable one
    - `rollback`: says that this is a way back, which alone may lead to a legacy version
    """

    name: str
    to: str
    from_: str | None = None
    allow_experimental: bool = False
    validated: bool = False
    migrate: bool = False
    rollback: bool = False


@final
@dataclass(frozen=True, slots=True)
class SwapResult:
    """What a hot swap that was committed came to.

    - `swaps`: what was replaced, each with the version that was current before in `from_`
    - `busted`: how many entries that depended on them went
    - `daemon`: URL of the daemon that did it; `stage`: 12 (clean) down to 9 (after faults); `causes`: those
    - `elapsed`: seconds; `key`: the idempotency key that it carried
    """

    swaps: tuple[Swap, ...]
    busted: int
    daemon: str
    stage: int
    causes: tuple[Fault, ...] = ()
    elapsed: float = 0.0
    key: str = ""

    @classmethod
    def of(
        cls,
        request: HotSwapRequest,
        reply: HotSwapReply,
        daemon: str,
        causes: tuple[Fault, ...],
        elapsed: float,
        key: str,
    ) -> SwapResult:
        """Make the result of what was asked and what a daemon answered."""
        before = {swapped.name: swapped.from_ for swapped in reply.swaps}
        return cls(
            swaps=tuple(
                Swap(item.name, item.to, before.get(item.name, item.from_), *(getattr(item, flag) for flag in _FLAGS))
                for item in request.swaps
            ),
            busted=reply.busted,
            daemon=daemon,
            stage=stage_of(Outcome.ACKNOWLEDGED, causes),
            causes=causes,
            elapsed=elapsed,
            key=key,
        )


@final
@dataclass(frozen=True, slots=True)
class Dependency:
    """One cache dependency, as a daemon knows it.

    - `current`: the version in use; `versions`: all that are known, in ascending order
    - `daemon`: URL of the daemon whose registry says so
    """

    name: str
    current: str
    versions: tuple[str, ...]
    daemon: str

    @classmethod
    def of(cls, reply: DependencyReply, daemon: str) -> Dependency:
        """Make it of what a daemon answered."""
        return cls(reply.name, reply.current, reply.versions, daemon)


@final
@dataclass(frozen=True, slots=True)
class Resolution:
    """What `name@range` was resolved to.

    - `resolved`: name@version
    - `version`: the best known version that matches; `state`: stable, legacy or experimental
    - `daemon`: URL of the daemon whose registry says so
    """

    spec: str
    resolved: str
    version: SemverX
    state: str
    daemon: str


def check_name(name: object, field: str) -> str:
    """Return the name of a dependency if it can be one; raise `InvalidRequest` otherwise."""
    try:
        return Spec(name, SemverXRange.parse("*")).name  # type: ignore[arg-type]  # it says what is wrong
    except InvalidVersion as error:
        raise InvalidRequest(f"{field} is no dependency's name: {error}; nothing was sent", field=field) from None


def check_version(version: object, field: str) -> str:
    """Return the text of a version if it is one; raise `InvalidRequest` otherwise."""
    try:
        SemverX.parse(str(version) if isinstance(version, SemverX) else version)
    except InvalidVersion as error:
        raise InvalidRequest(f"{field} is no version: {error}; nothing was sent", field=field) from None
    return str(version)


def check_spec(spec: object) -> str:
    """Return `name@range` if it is that; raise `InvalidRequest` otherwise."""
    try:
        Spec.parse(spec)
    except InvalidVersion as error:
        raise InvalidRequest(f"spec is not name@range: {error}; nothing was sent", field="spec") from None
    return str(spec)


def announce_request(name: object, versions: object, current: object) -> AnnounceRequest:
    """Make the request of a checked announcement; raise `InvalidRequest` before anything is sent if it cannot be sent.

    A lone version may stand for a list of one.
    """
    listed = _listed([versions] if isinstance(versions, str | SemverX) else versions, "versions", least=1)
    return AnnounceRequest(
        name=check_name(name, "name"),
        versions=tuple(check_version(version, f"versions[{number}]") for number, version in enumerate(listed)),
        current=None if current is None else check_version(current, "current"),
    )


def register_request(
    key: object, depends_on: object, *, tags: object = (), ttl: object = None, namespace: object = None
) -> RegisterRequest:
    """Make the request of a checked registration; raise `InvalidRequest` before anything is sent if it is none.

    It says only what is given, so that a daemon that knows no more is asked just what it knows.
    """
    said: dict[str, Any] = {"key": check_target(key, "key"), "depends_on": _names(depends_on, "depends_on")}
    if named := _names(tags, "tags"):
        said["tags"] = named
    if namespace is not None:
        said["namespace"] = check_namespace(namespace)
    if ttl is not None:
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= _LONGEST_TTL:
            raise InvalidRequest(f"ttl must be seconds above 0, or None, not {ttl!r}; nothing was sent", field="ttl")
        said["ttl"] = float(ttl)
    return RegisterRequest(**said)


_LONGEST_TTL: Final = 1e10


def _names(given: object, field: str) -> tuple[str, ...]:
    if isinstance(given, str):
        raise InvalidRequest(f"{field} must be a list of names, not one; nothing was sent", field=field)
    return tuple(check_target(name, f"{field}[{number}]") for number, name in enumerate(_listed(given, field)))


def _listed(given: object, field: str, *, least: int = 0, most: int = MAX_LISTED) -> tuple[object, ...]:
    if not isinstance(given, Iterable):
        what = f"{field} must be a list, not {type(given).__name__}"
        raise InvalidRequest(f"{what}; nothing was sent", field=field)
    listed = tuple(given)
    if not least <= len(listed) <= most:
        raise InvalidRequest(
            f"{field} must be {least} to {most} together, not {len(listed)}; nothing was sent", field=field
        )
    return listed


def doubt_swap(request: HotSwapRequest, reply: HotSwapReply) -> str:
    """Say why a reply does not tell that just this was committed; an empty text if it does."""
    if not reply.committed:
        return "it says that nothing was committed"
    asked = {item.name: item.to for item in request.swaps}
    told = {swapped.name: swapped.to for swapped in reply.swaps}
    if told and (asked.keys() != told.keys() or any(not _same(asked[name], told[name]) for name in asked)):
        return "it tells of other swaps"
    return ""


def doubt_resolution(request: ResolveRequest, reply: ResolveReply) -> str:
    """Say why a reply does not resolve just this spec; an empty text if it does."""
    spec = Spec.parse(request.spec)
    try:
        resolved = reply.resolved == f"{spec.name}@{reply.version}" and spec.range.matches(reply.version)
    except InvalidVersion:
        return "its version is none"
    return "" if resolved else "it resolves another spec"


def doubt_dependency(request: AnnounceRequest, reply: DependencyReply) -> str:
    """Say why a reply does not tell of just this dependency; an empty text if it does."""
    try:
        known = {SemverX.parse(version) for version in (*reply.versions, reply.current)}
    except InvalidVersion:
        return "one of its versions is none"
    told = reply.name == request.name and known >= {SemverX.parse(version) for version in request.versions}
    return "" if told else "it tells of another dependency"


def doubt_registration(request: RegisterRequest, reply: RegisterReply) -> str:
    """Say why a reply does not tell of just this entry; an empty text if it does."""
    return "" if reply.cache_key == cache_key_of(request.key) else "it tells of another key"


def _same(asked: str, told: str) -> bool:
    """Tell whether two texts say the same version, in whichever spelling."""
    try:
        return SemverX.parse(asked).identical(SemverX.parse(told))
    except InvalidVersion:
        return False


def swap_request(swaps: Iterable[Swap]) -> HotSwapRequest:
    """Make the request of checked swaps; raise `InvalidRequest` before anything is sent if one cannot be sent."""
    listed = _listed(swaps, "swaps", least=1, most=MAX_SWAPS)
    items = [_item(swap, f"swaps[{number}]") for number, swap in enumerate(listed)]
    names = [item.name for item in items]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"swaps names {twice!r} twice; nothing was sent", field="swaps")
    return HotSwapRequest(swaps=tuple(items))


_FLAGS: Final = ("allow_experimental", "validated", "migrate", "rollback")


def _item(swap: object, where: str) -> SwapItem:
    if not isinstance(swap, Swap):
        raise InvalidRequest(f"{where} must be a Swap, not {type(swap).__name__}; nothing was sent", field=where)
    for flag in _FLAGS:
        if type(getattr(swap, flag)) is not bool:
            raise InvalidRequest(f"{where}.{flag} must be true or false; nothing was sent", field=f"{where}.{flag}")
    return SwapItem(
        name=check_name(swap.name, f"{where}.name"),
        to=check_version(swap.to, f"{where}.to"),
        from_=None if swap.from_ is None else check_version(swap.from_, f"{where}.from_"),
        **{flag: getattr(swap, flag) for flag in _FLAGS},
    )


async def at_one(
    ask: Ask[_Daemon, _Reply],
    daemons: Sequence[_Daemon],
    *,
    client_id: str,
    deadline: float,
    retry: Retry | None,
    random: Callable[[], float],
) -> tuple[Receipt[_Daemon, _Reply], tuple[Fault, ...]]:
    """Have something done at one daemon, once: the hub, or the next that can be reached if it surely was not done.

    Return the last receipt, and the faults of all. Each daemon but the last has half of the time that is left; a fault
    that forbids going on ends it.
    """
    loop = asyncio.get_running_loop()
    fleet = Fleet([daemon.url for daemon in daemons], Policies(), client_id=client_id, now=loop.time(), random=random)
    order = fleet.order(loop.time())
    causes: tuple[Fault, ...] = ()
    while True:
        index = order.pop(0)
        left = deadline - loop.time()
        end = deadline - left / 2 if order else deadline
        receipt = await dispatch(ask, daemons, fleet, deadline=end, retry=retry, random=random, only=index)
        causes += receipt.causes
        surely_not = applied_of(causes) == "no"
        if receipt.reply is not None or not order or not surely_not or not _next_may(receipt.causes):
            return receipt, causes


def _next_may(causes: Iterable[Fault]) -> bool:
    """Tell whether another daemon could do better."""
    return all(TABLE[cause.kind].next or cause.kind is FaultKind.NO_SLOT for cause in causes)
