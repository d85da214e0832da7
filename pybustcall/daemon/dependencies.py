"""Cache dependencies: what their announcements, their resolution and their swaps come to.

This module decides, by values alone: what a dependency is after an announcement, which version a spec means, and
whether a swap may be. Where dependencies are kept is `registry`'s, how a swap is carried out `swaps`' to know.

Versions are kept in canonical form, so that two spellings of one version are one version.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, final

from pybustcall.errors import InvalidVersion
from pybustcall.semverx import SemverX, SemverXRange, Spec, can_hot_swap

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from pybustcall.models import AnnounceRequest, HotSwapRequest, SwapItem

__all__ = [
    "MOST_DEPENDENCIES",
    "MOST_VERSIONS",
    "Change",
    "Dependency",
    "InUse",
    "NotCurrent",
    "RegistryFull",
    "SwapRefused",
    "Unreadable",
    "Unresolved",
    "announced",
    "judged",
    "named",
    "resolved",
    "restored",
    "with_version",
]

MOST_DEPENDENCIES: Final = 10_000
MOST_VERSIONS: Final = 256
"""How many versions of one dependency may be known; a new one takes the place of the lowest that can go."""

_SHOWN: Final = 20  # versions that a refusal lists, the highest
_ANY: Final = SemverXRange.parse("*")


class Unreadable(ValueError):
    """A field is no version, spec or name, or lists too many. `field` names the field; the text is not repeated."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field} is not {what}")
        self.field = field


class RegistryFull(Exception):
    """There is as much as may be, and this would be more."""


class InUse(Exception):
    """The dependency cannot be forgotten: something still goes by it, which the text tells."""


class NotCurrent(Exception):
    """An announcement says that another version is current."""

    def __init__(self, current: str) -> None:
        super().__init__(f"the current version is {current}; only a hot swap changes it")


class Unresolved(Exception):
    """No known version is meant by the spec. The text names those that are known."""


class SwapRefused(Exception):
    """The swap may not be. `unmet` tells why, one sentence each."""

    def __init__(self, unmet: tuple[str, ...]) -> None:
        more = f" (and {len(unmet) - 1} more)" if unmet[1:] else ""
        super().__init__(f"the swap is refused, and nothing was changed: {unmet[0]}{more}")
        self.unmet = unmet


@final
@dataclass(frozen=True, slots=True)
class Dependency:
    """One dependency: the version in use, and all that are known, in ascending order."""

    name: str
    current: str
    versions: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class Change:
    """One dependency of a swap: its version before and after it."""

    name: str
    before: str
    after: str


def announced(asked: AnnounceRequest, known: Dependency | None, count: int, spared: Collection[str] = ()) -> Dependency:
    """Tell what a dependency is after an announcement; `known` is what it was before, `count` how many there are.

    Raises `Unreadable`, `RegistryFull`, and `NotCurrent` if it says that another version is current than is. `spared`
    is as for `with_version`.
    """
    named(asked.name, "name")
    told = [_canonical(text, f"versions.{number}") for number, text in enumerate(asked.versions)]
    current = None if asked.current is None else _canonical(asked.current, "current")
    if known is None:
        if count >= MOST_DEPENDENCIES:
            raise RegistryFull(f"the registry is full: it has the most dependencies that it may have, {count}")
        known = Dependency(asked.name, current or str(_ANY.best(told)), ())
    if current not in {None, known.current}:
        raise NotCurrent(known.current)
    if len({known.current, *told}) > MOST_VERSIONS:
        raise Unreadable("versions", f"a list of at most {MOST_VERSIONS} versions, the current one counted in")
    return with_version(known, known.current, *told, spared=spared)


def with_version(known: Dependency, *versions: str, spared: Collection[str] = ()) -> Dependency:
    """Tell what a dependency is once it is known to have these versions too.

    If there are too many, the lowest are forgotten, but neither the current one nor these; those that are `spared`, for
    an unfinished swap names them, go last.
    """
    union = {*known.versions, *versions}
    if len(union) == len(known.versions):
        return known
    others = sorted(union.difference(versions, [known.current]), key=lambda it: (it in spared, _rank(it)))
    kept = union.difference(others[: max(0, len(union) - MOST_VERSIONS)])
    return replace(known, versions=tuple(sorted(kept, key=_rank)))


def restored(name: str, current: str, versions: Iterable[str]) -> Dependency:
    """Make a dependency of what was written down of it. Raises `Unreadable` for what cannot have been."""
    known = Dependency(named(name, "name"), _canonical(current, "current"), ())
    return with_version(known, known.current, *(_canonical(text, "versions") for text in versions))


def resolved(text: str, known: Mapping[str, Dependency]) -> tuple[Spec, SemverX]:
    """Tell what a spec says, and which known version it means. Raises `Unreadable` and `Unresolved`."""
    try:
        spec = Spec.parse(text)
    except InvalidVersion:
        raise Unreadable("spec", "name@range, as in pricing-model@^2.0.0") from None
    found = known.get(spec.name)
    if found is None:
        raise Unresolved("no dependency of that name was announced, so no version of it is known")
    best = spec.range.best(found.versions)
    if best is None:
        raise Unresolved(f"no known version is in that range; known are {_listed(found.versions)}")
    return spec, best


def judged(asked: HotSwapRequest, known: Mapping[str, Dependency]) -> tuple[Change, ...]:
    """Tell what a swap changes. Raises `Unreadable`, and `SwapRefused` with every reason against it."""
    names = Counter(named(item.name, f"swaps.{number}.name") for number, item in enumerate(asked.swaps))
    changes = []
    unmet = [f"{name}: is named {times} times" for name, times in names.items() if times > 1]
    for number, item in enumerate(asked.swaps):
        to = _canonical(item.to, f"swaps.{number}.to")
        since = None if item.from_ is None else _canonical(item.from_, f"swaps.{number}.from")
        found = known.get(item.name)
        if found is None:
            unmet.append(f"{item.name}: was not announced")
            continue
        if since not in {None, found.current}:
            unmet.append(f"{item.name}: the current version is {found.current}, not {since}")
            continue
        unmet += _broken_rules(item, found, to)
        changes.append(Change(item.name, found.current, to))
    if unmet:
        raise SwapRefused(tuple(dict.fromkeys(unmet)))
    return tuple(changes)


def _broken_rules(item: SwapItem, found: Dependency, to: str) -> Iterable[str]:
    verdict = can_hot_swap(
        found.current,
        to,
        allow_experimental=item.allow_experimental,
        validated=item.validated,
        migrate=item.migrate,
        rollback=item.rollback,
    )
    parts: dict[str, list[str]] = {}  # by what is wrong with them, which is often the same
    for part, reason in zip(verdict.failed, verdict.reasons, strict=False):  # if none failed, the reasons are others
        parts.setdefault(reason.removeprefix(f"{part}: "), []).append(part)
    return [f"{item.name}: {', '.join(some)}: {why}" for why, some in parts.items()]


def named(name: str, field: str) -> str:
    """Return a dependency's name if it can be one. Raises `Unreadable`."""
    try:
        return Spec(name, _ANY).name
    except InvalidVersion:
        raise Unreadable(field, "a name: visible text without spaces, with an @ only before a scope") from None


def _canonical(text: str, field: str) -> str:
    try:
        return str(SemverX.parse(text))
    except InvalidVersion:
        raise Unreadable(field, "a SemVer or SemverX version, as in 1.2.3") from None


def _rank(version: str) -> tuple[SemverX, str]:
    return SemverX.parse(version), version  # of versions that are equal, the text decides


def _listed(versions: tuple[str, ...]) -> str:
    shown = ", ".join(versions[-_SHOWN:])
    return shown if len(versions) <= _SHOWN else f"{shown} and {len(versions) - _SHOWN} lower ones"
