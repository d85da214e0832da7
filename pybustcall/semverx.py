"""Versions: how they are written, which is higher, which ones a range takes, and which may replace which at run time.

A SemverX version is a SemVer 2.0 version whose three numbers each bear a state: stable, legacy or experimental. This
module decides by texts and values alone; what has which version, and how one is put in another's place, is told and
done elsewhere. docs/reference/semverx.md says the same to programs in other languages, and tests/vectors holds examples
of every rule.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import total_ordering
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

from packaging.version import InvalidVersion as NotPep440
from packaging.version import Version

from pybustcall.errors import InvalidRequest, InvalidVersion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "HOT_SWAP",
    "MAX_ALTERNATIVES",
    "MAX_NAME_BYTES",
    "MAX_NUMBER",
    "MAX_RANGE_CHARACTERS",
    "MAX_VERSION_CHARACTERS",
    "SemverX",
    "SemverXRange",
    "Spec",
    "State",
    "SwapVerdict",
    "can_hot_swap",
    "installed",
]

MAX_NUMBER: Final = 2**53 - 1
"""The highest number of a version: the highest integer that languages whose numbers are doubles hold exactly."""
MAX_VERSION_CHARACTERS: Final = 256
MAX_RANGE_CHARACTERS: Final = 1024
MAX_ALTERNATIVES: Final = 32
"""Most alternatives, divided by `||`, of one range."""
MAX_NAME_BYTES: Final = 256

_PATTERNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "version": r"[0-9A-Za-z.+-]*",
        "number": r"0|[1-9][0-9]*",
        "identifier": r"[0-9A-Za-z-]+",
        "range": r"[ -~]*",
        "term": r"[ ]*(?:([<>]=?|[=^~])[ ]*)?([^ ]+)",
        "name": r"[^\x00-\x20@\x7f-\xa0\xad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ud800-\udfff"
        r"\ufeff\ufff9-\ufffb]+",
    }
)
"""What texts are made of. No pattern repeats a repetition, and texts are measured before anything looks at them."""

_VERSION, _NUMBER, _IDENTIFIER, _RANGE, _TERM, _NAME = (re.compile(pattern) for pattern in _PATTERNS.values())
_VISIBLE: Final = re.compile(r"[!-~]*")
_PARTS: Final = ("major", "minor", "patch")
_WILDCARDS: Final = frozenset("xX*")


class State(StrEnum):
    """How far one of a version's numbers is to be trusted, the most trusted first."""

    STABLE = "stable"
    LEGACY = "legacy"
    EXPERIMENTAL = "experimental"


_STATES: Final[Mapping[str, State]] = MappingProxyType({state.value: state for state in State})

_Prerelease: TypeAlias = tuple[str | int, ...]
_Fields: TypeAlias = tuple[int, int, int, State, State, State, _Prerelease, str]


@final
@total_ordering
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SemverX:
    """One version: three numbers, the state of each, and SemVer's pre-release and build.

    - `prerelease`: its identifiers, numeric ones as integers; empty if it has none
    - `build`: the text after "+"; empty if it has none

    Versions are ordered by SemVer's precedence, in which states and build have no part; `==` and `hash` go with it, so
    that the order is total. `identical` compares everything. Fields that no text can say are refused with
    `InvalidVersion`: states other than those that a pre-release or build goes with, above all.
    """

    major: int
    minor: int
    patch: int
    major_state: State = State.STABLE
    minor_state: State = State.STABLE
    patch_state: State = State.STABLE
    prerelease: _Prerelease = ()
    build: str = ""

    def __post_init__(self) -> None:
        _check_fields(self)
        if _read_version(str(self)) != _fields(self):
            raise InvalidVersion(f"no text says {_fields(self)!r}: a pre-release or build implies the three states")

    @classmethod
    def parse(cls, text: object) -> SemverX:
        """Read `1.2.3-rc.1+build`, with "v" before it or not, or `1.stable.2.experimental.3.legacy`.

        In the first spelling a pre-release named after a state (`-legacy`, `-stable.2`) gives it to all three numbers,
        any other pre-release means experimental, and none means stable. Raises `InvalidVersion` for anything else.
        """
        return cls(*_read_version(text))

    @classmethod
    def from_pep440(cls, text: object) -> SemverX:
        """Say a Python version: `1.2a3` is `1.2.0-alpha.3`, `1.2.dev3` is `1.2.0-0.dev.3`.

        The order stays, as far as SemVer can tell versions apart: what it has no place for (post-releases, development
        versions of pre-releases, local versions) becomes build, and is then equal to the version beside it. Raises
        `InvalidVersion` for text that is no Python version, for an epoch, and for a fourth number other than 0.
        """
        checked = _check_text(text, "PEP 440 version", MAX_VERSION_CHARACTERS, _VISIBLE)
        refuse = _refusal("PEP 440 version", checked)
        try:
            version = Version(checked)
        except NotPep440:
            raise refuse("is not written as PEP 440 says") from None
        if version.epoch:
            raise refuse("has an epoch, for which SemVer has no place")
        if any(version.release[3:]):
            raise refuse("has more than three numbers, and SemVer has three")
        numbers = (version.major, version.minor, version.micro)
        if version.pre is None and version.post is not None and version.dev is not None:
            return cls(*numbers, *_thrice(State.EXPERIMENTAL))  # the one case in which the text after it is lost
        prerelease: _Prerelease = ()
        extras = [("post", version.post), ("dev", version.dev)]
        if version.pre is not None:
            letter, number = version.pre
            prerelease = ({"a": "alpha", "b": "beta"}.get(letter, letter), number)
        elif version.dev is not None:
            prerelease = (0, "dev", version.dev)  # a number is lower than any word, so lower than alpha
            extras = []
        build = [f"{word}.{number}" for word, number in extras if number is not None]
        build += [version.local] if version.local is not None else []
        return cls(*numbers, *_thrice(_implied(prerelease)), prerelease, ".".join(build))

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Major, minor and patch number."""
        return (self.major, self.minor, self.patch)

    @property
    def states(self) -> tuple[State, State, State]:
        """The states of major, minor and patch number."""
        return (self.major_state, self.minor_state, self.patch_state)

    @property
    def state(self) -> State:
        """The state of the whole: experimental if any part is, else legacy if any is, else stable."""
        return max(self.states, key=list(State).index)

    def six_parts(self) -> str:
        """Write numbers and states, `1.stable.2.stable.3.stable`. Pre-release and build are not said by that."""
        return ".".join(f"{number}.{state}" for number, state in zip(self.numbers, self.states, strict=True))

    def identical(self, other: SemverX) -> bool:
        """Tell whether everything is the same: states and build too, which `==` leaves out."""
        return _fields(self) == _fields(other)

    def __str__(self) -> str:
        """Write the one canonical form: SemVer's where it says everything, else six parts."""
        if self.states != _thrice(_implied(self.prerelease)):
            return self.six_parts()
        return _semver(self.numbers, self.prerelease) + (f"+{self.build}" if self.build else "")

    def __repr__(self) -> str:
        return f"SemverX.parse({str(self)!r})"

    def __hash__(self) -> int:
        return hash(_rank(self))

    def __eq__(self, other: object) -> bool:
        return _rank(self) == _rank(other) if isinstance(other, SemverX) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return _rank(self) < _rank(other) if isinstance(other, SemverX) else NotImplemented


def installed(distribution: str) -> SemverX:
    """Tell the version of an installed Python distribution, as `SemverX.from_pep440` says it.

    Raises `InvalidVersion` if it is not installed, or if SemverX cannot say its version.
    """
    name = _check_name(distribution, "distribution")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise InvalidVersion(f"no distribution {_shown(name)} is installed, so it has no version", text=name) from None
    return SemverX.from_pep440(found)


_HOLDS: Final[Mapping[str, Callable[[Any, Any], bool]]] = MappingProxyType(
    {
        "=": operator.eq,
        ">": operator.gt,
        ">=": operator.ge,
        "<": operator.lt,
        "<=": operator.le,
        "^": operator.ge,
        "~": operator.ge,
    }
)
_KEPT: Final[Mapping[str, int]] = MappingProxyType({"^": 1, "~": 2})
"""How many of the first numbers must be the same besides."""


@final
@dataclass(frozen=True, slots=True)
class _Term:
    """One condition: an operator and a version, of which the last numbers may be missing; or a state pattern.

    Each of a pattern's `states` is those allowed, in order, or empty where any is.
    """

    operator: str
    numbers: tuple[int, ...]
    prerelease: _Prerelease = ()
    states: tuple[tuple[State, ...], ...] = ()

    def matches(self, version: SemverX) -> bool:
        length = len(self.numbers)
        if self.states:
            allowed = zip(version.states, self.states, strict=True)
            return version.numbers[:length] == self.numbers and all(
                not some or state in some for state, some in allowed
            )
        # A version that lacks numbers is compared by those that it has: the rest of the other then has no part.
        theirs, ours = (
            (_rank(version), _precedence(self.numbers, self.prerelease))
            if length == len(_PARTS)
            else (version.numbers[:length], self.numbers)
        )
        kept = min(_KEPT.get(self.operator, 0), length)
        return _HOLDS[self.operator](theirs, ours) and version.numbers[:kept] == self.numbers[:kept]

    @property
    def named(self) -> frozenset[State]:
        """The states that are asked for by name; a pre-release after `<` is what is left out, so it asks for none."""
        if self.prerelease and self.operator != "<":
            return frozenset({_implied(self.prerelease)})
        return frozenset(state for some in self.states for state in some)

    def __str__(self) -> str:
        numbers = [*map(str, self.numbers), "*", "*", "*"][:3]
        if self.states:
            states = [f"{{{'|'.join(some)}}}" if some[1:] else "".join(some) or "*" for some in self.states]
            return ".".join(f"{number}.{state}" for number, state in zip(numbers, states, strict=True))
        if not self.numbers:
            return "*"
        text = _semver(self.numbers, self.prerelease)
        if self.operator != "=":
            return self.operator + text
        return text if len(self.numbers) == len(_PARTS) else f"{text}.x"


@final
@dataclass(frozen=True, slots=True)
class SemverXRange:
    """A set of versions. Make it with `parse`; equal ranges are written alike in canonical form, which `str` gives."""

    alternatives: tuple[tuple[_Term, ...], ...]

    @classmethod
    def parse(cls, text: object) -> SemverXRange:
        """Read `^1.2.0`, `>=1.0.0, <2.0.0 || 3.x`, `2.{stable|legacy}.*.stable.*.*` and the like.

        Terms beside each other, with a space or comma between, must all match, and of alternatives divided by `||` one.
        Raises `InvalidVersion` for anything else.
        """
        checked = _check_text(text, "range", MAX_RANGE_CHARACTERS, _RANGE)
        refuse = _refusal("range", checked)
        alternatives = checked.split("||")
        if len(alternatives) > MAX_ALTERNATIVES:
            raise refuse(f"has {len(alternatives)} alternatives, which is more than {MAX_ALTERNATIVES}")
        try:
            return cls(tuple(_read_terms(alternative) for alternative in alternatives))
        except ValueError as flaw:
            raise refuse(f"cannot be read: {flaw}") from None

    def matches(self, version: SemverX | str) -> bool:
        """Tell whether the version is in the range. Pre-releases are treated like any other version."""
        parsed = _as_version(version)
        return any(all(term.matches(parsed) for term in terms) for terms in self.alternatives)

    def best(self, versions: Iterable[SemverX | str]) -> SemverX | None:
        """Pick the highest match, or None: of the stable ones, else the legacy ones, else the experimental ones.

        A state that the range names, in a state pattern or by a pre-release, counts as much as stable. Of versions that
        are equal, the most trusted is picked, and then the first.
        """
        named = frozenset(state for terms in self.alternatives for term in terms for state in term.named)
        trust = {state: -index for index, state in enumerate(State)}

        def merit(version: SemverX) -> tuple[int, SemverX, int]:
            own = trust[version.state]
            return (0 if version.state in named else own, version, own)

        return max(filter(self.matches, map(_as_version, versions)), key=merit, default=None)

    def __str__(self) -> str:
        return " || ".join(" ".join(map(str, terms)) for terms in self.alternatives)


@final
@dataclass(frozen=True, slots=True)
class Spec:
    """What is asked for: a name, and the range of versions that will do."""

    name: str
    range: SemverXRange

    def __post_init__(self) -> None:
        _check_name(self.name, "name")

    @classmethod
    def parse(cls, text: object) -> Spec:
        """Read `name@range` or `@scope/name@range`; without a range, any version will do.

        A name is 1 to 256 bytes of visible text without spaces; it has an "@" only where it begins with a scope.
        Raises `InvalidVersion` for anything else.
        """
        checked = _check_text(text, "spec", MAX_NAME_BYTES + 1 + MAX_RANGE_CHARACTERS, None)
        at = checked.rfind("@")
        name, wanted = (checked[:at], checked[at + 1 :]) if at > 0 else (checked, "*")
        return cls(name, SemverXRange.parse(wanted))

    def __str__(self) -> str:
        return f"{self.name}@{self.range}"


HOT_SWAP: Final[Mapping[tuple[State, State], tuple[str, ...]]] = MappingProxyType(
    {
        (State.STABLE, State.STABLE): ("same_major",),
        (State.LEGACY, State.STABLE): ("migrate",),
        (State.EXPERIMENTAL, State.STABLE): ("same_major", "validated"),
        (State.STABLE, State.LEGACY): ("rollback",),
        (State.LEGACY, State.LEGACY): ("rollback",),
        (State.EXPERIMENTAL, State.LEGACY): ("rollback",),
        (State.STABLE, State.EXPERIMENTAL): ("allow_experimental",),
        (State.LEGACY, State.EXPERIMENTAL): ("allow_experimental",),
        (State.EXPERIMENTAL, State.EXPERIMENTAL): ("allow_experimental",),
    }
)
"""What it takes that a part of a version goes from one state to another while the program runs."""


@final
@dataclass(frozen=True, slots=True)
class SwapVerdict:
    """Whether one version may take another's place; true if it may.

    - `reasons`: if it may, one for each part; if not, one for each part that failed, with what it would take
    - `failed`: the parts that failed, of "major", "minor" and "patch"
    """

    reasons: tuple[str, ...]
    failed: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether no part failed."""
        return not self.failed

    def __bool__(self) -> bool:
        return self.allowed


def can_hot_swap(
    current: SemverX | str,
    candidate: SemverX | str,
    *,
    allow_experimental: bool = False,
    validated: bool = False,
    migrate: bool = False,
    rollback: bool = False,
) -> SwapVerdict:
    """Judge, by the table `HOT_SWAP`, whether the candidate may replace the current version at run time.

    Each of the three parts is judged by its states, and all must pass. Which of the two is higher has no part in it.

    - `allow_experimental`: the caller takes experimental parts
    - `validated`: the candidate was tried in place of the experimental version
    - `migrate`: what depends on the legacy version is moved along
    - `rollback`: the caller goes back to a legacy version on purpose

    Raises `InvalidRequest`, which names the `field`, for one of these that is neither true nor false: "no" would count
    as yes. Raises `InvalidVersion` for what is no version.
    """
    old, new = _as_version(current), _as_version(candidate)
    flags = {
        "allow_experimental": allow_experimental,
        "validated": validated,
        "migrate": migrate,
        "rollback": rollback,
    }
    for flag, value in flags.items():
        if type(value) is not bool:
            raise InvalidRequest(f"{flag} must be true or false, not {type(value).__name__}", field=flag)
    given = {"same_major": old.major == new.major} | flags
    met = {need: f"with {need}" for need in given} | {"same_major": f"within major {old.major}"}
    taken = {need: need for need in given} | {"same_major": f"a candidate of major {old.major}"}
    passed: dict[str, str] = {}
    failed: dict[str, str] = {}
    for part, before, after in zip(_PARTS, old.states, new.states, strict=True):
        needs = HOT_SWAP[before, after]
        if missing := [taken[need] for need in needs if not given[need]]:
            failed[part] = f"{part}: {before} to {after} takes {' and '.join(missing)}"
        else:
            passed[part] = f"{part}: {before} to {after} {' '.join(met[need] for need in needs)}"
    return SwapVerdict(tuple((failed or passed).values()), tuple(failed))


def _as_version(version: SemverX | str) -> SemverX:
    return version if isinstance(version, SemverX) else SemverX.parse(version)


def _check_fields(version: SemverX) -> None:
    """Refuse fields that could not even be written: of other types, or with numbers beyond their bounds."""
    kinds = {"prerelease": tuple, "build": str, **dict.fromkeys(_PARTS, int)}
    kinds |= {f"{part}_state": str for part in _PARTS}
    for name, kind in kinds.items():
        if not isinstance(value := getattr(version, name), kind):
            raise InvalidVersion(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    identifiers = [("pre-release", one) for one in version.prerelease]
    for name, one in [*zip(_PARTS, version.numbers, strict=True), *identifiers]:
        if not isinstance(one, int | str):
            raise InvalidVersion(f"a {name} identifier must be text or an integer, not {type(one).__name__}")
        if isinstance(one, int) and not 0 <= one <= MAX_NUMBER:
            why = "below 0" if one < 0 else "above 2^53-1, more than every language can hold"
            raise InvalidVersion(f"fields have a {name} number {why}")


def _fields(version: SemverX) -> _Fields:
    return (*version.numbers, *version.states, version.prerelease, version.build)


def _thrice(state: State) -> tuple[State, State, State]:
    return (state, state, state)


def _implied(prerelease: _Prerelease) -> State:
    """Tell the state that SemVer's spelling gives to all three numbers."""
    return _STATES.get(str(prerelease[0]).lower(), State.EXPERIMENTAL) if prerelease else State.STABLE


def _precedence(numbers: tuple[int, ...], prerelease: _Prerelease) -> tuple[Any, ...]:
    """Make of SemVer's section 11 a tuple that orders so: numbers below words, some identifiers below none."""
    identifiers = tuple((1, 0, one) if isinstance(one, str) else (0, one, "") for one in prerelease)
    return (numbers, not prerelease, identifiers)


def _rank(version: SemverX) -> tuple[Any, ...]:
    return _precedence(version.numbers, version.prerelease)


def _semver(numbers: Iterable[int], prerelease: _Prerelease) -> str:
    text = ".".join(map(str, numbers))
    return f"{text}-{'.'.join(map(str, prerelease))}" if prerelease else text


# Reading. These functions are given checked text, and raise ValueError with what is wrong with it; `_read_version` and
# `SemverXRange.parse`, which face the caller, make of that the refusal of the whole.


def _read_version(text: object) -> _Fields:
    checked = _check_text(text, "version", MAX_VERSION_CHARACTERS, _VERSION)
    try:
        return _read_fields(checked)
    except ValueError as flaw:
        raise _refusal("version", checked)(str(flaw)) from None


def _read_fields(text: str) -> _Fields:
    if len(text) > MAX_VERSION_CHARACTERS:
        raise ValueError(f"has {len(text)} characters, which is more than {MAX_VERSION_CHARACTERS}")
    parts, prerelease, build = _divide(text)
    if len(parts) == 3:
        major, minor, patch = map(_number, parts, _PARTS)
        return (major, minor, patch, *_thrice(_implied(prerelease)), prerelease, build)
    if len(parts) != 6:
        raise ValueError(f"has {_count(parts)}; write three numbers, as in 1.2.0, or six parts with states")
    major, minor, patch = map(_number, parts[::2], _PARTS)
    major_state, minor_state, patch_state = map(_state, parts[1::2])
    return (major, minor, patch, major_state, minor_state, patch_state, (), "")


def _divide(text: str) -> tuple[list[str], _Prerelease, str]:
    """Divide a version, or what stands for one in a range, into its parts, its pre-release and its build."""
    body = text[1:] if text[0] in "vV" and text[1:2].isdigit() else text
    core, plus, build = body.partition("+")
    core, dash, prerelease = core.partition("-")
    parts = core.split(".")
    if (dash or plus) and len(parts) == 6:
        raise ValueError("has six parts, and these take neither pre-release nor build")
    identifiers = [_identifier(word) for word in prerelease.split(".")] if dash else []
    read = tuple(_number(word, "pre-release") if word.isdigit() else word for word in identifiers)
    if plus:
        build = ".".join(_identifier(word) for word in build.split("."))
    return parts, read, build


def _count(parts: list[str]) -> str:
    return f"{len(parts)} part{'s' if len(parts) > 1 else ''}"


def _number(word: str, what: str) -> int:
    if not _NUMBER.fullmatch(word):
        why = "with a leading zero" if word.isdigit() else "which is none"
        raise ValueError(f"has {_shown(word)} as its {what} number, {why}")
    if (number := int(word)) > MAX_NUMBER:
        raise ValueError(f"has a {what} number above 2^53-1, more than every language can hold")
    return number


def _identifier(word: str) -> str:
    if not _IDENTIFIER.fullmatch(word):
        raise ValueError(f"has {_shown(word)} as an identifier, and these are ASCII letters, digits and hyphens")
    return word


def _state(word: str) -> State:
    if (state := _STATES.get(word.lower())) is None:
        raise ValueError(f"has {_shown(word)} as a state, and these are {', '.join(State)}")
    return state


def _read_terms(text: str) -> tuple[_Term, ...]:
    pieces = [piece.strip(" ") for piece in text.split(",")]
    if "" in pieces:
        raise ValueError("a term is missing beside a comma or ||")
    return tuple(_read_term(found[1] or "", found[2]) for piece in pieces for found in _TERM.finditer(piece))


def _read_term(written: str, text: str) -> _Term:
    """Read a term of which `written` is the operator, or empty."""
    if text[0] in "<>=^~":
        raise ValueError(f"an operator stands where a version should, in {_shown(written + text)}")
    if text.count("{") != text.count("}"):
        raise ValueError(f"a brace has no other, or a space, comma or || within, at {_shown(written + text)}")
    if text == "-":
        raise ValueError("'-' is no term; a range from 1.0.0 to 2.0.0 is written >=1.0.0 <=2.0.0")
    try:
        return _read_operand(written, "*" if text.lower() == "latest" else text)
    except ValueError as flaw:
        raise ValueError(f"the term {_shown(written + text)} {flaw}") from None


def _read_operand(written: str, text: str) -> _Term:
    parts, prerelease, build = _divide(text)
    if len(parts) == 6 and written in {"", "="}:
        return _Term("=", _leading_numbers(parts[::2]), states=tuple(map(_read_states, parts[1::2])))
    if len(parts) == 6:
        if "{" in text or not _WILDCARDS.isdisjoint(parts):
            raise ValueError("has a pattern after an operator, where only a version can stand")
        return _Term(written, _read_fields(text)[:3])
    if len(parts) > 3:
        raise ValueError(f"has {_count(parts)}; write one to three numbers, as in 1.2, or six parts with states")
    numbers = _leading_numbers(parts)
    if len(numbers) == 3:
        return _Term(written or "=", numbers, _read_fields(text)[6])
    if prerelease or build:
        raise ValueError("has a pre-release or build, and these go with three numbers only")
    if written and not numbers:
        raise ValueError("has an operator, and no number that it could compare with")
    return _Term(written or "=", numbers)


def _leading_numbers(words: list[str]) -> tuple[int, ...]:
    """Read the numbers before the first wildcard, after which there must be none."""
    count = next((index for index, word in enumerate(words) if word in _WILDCARDS), len(words))
    if not _WILDCARDS.issuperset(words[count:]):
        raise ValueError("has a number after a wildcard")
    return tuple(map(_number, words[:count], _PARTS))


def _read_states(word: str) -> tuple[State, ...]:
    """Read a state, `*` or alternatives in braces; tell which states it allows, or none for `*`."""
    if word == "*":
        return ()
    words = word[1:-1].split("|") if word[:1] == "{" and word[-1:] == "}" else [word]
    states = {_state(one) for one in words}
    if len(states) < len(words):
        raise ValueError("names a state twice")
    return tuple(state for state in State if state in states)


def _check_text(text: object, what: str, most: int, alphabet: re.Pattern[str] | None) -> str:
    """Return the text if it is worth reading: not too long, not empty, made of the characters that it may have."""
    if not isinstance(text, str):
        raise InvalidVersion(f"a {what} must be a string, not {type(text).__name__}")
    refuse = _refusal(what, text)
    if len(text) > most:
        raise refuse(f"has {len(text)} characters, which is more than {most}")
    if not text.strip(" "):
        raise refuse("is empty")
    if alphabet is not None and (found := alphabet.match(text)) and (end := found.end()) < len(text):
        raise refuse(f"has the character U+{ord(text[end]):04X} at position {end}, which no {what} has")
    return text


def _check_name(name: object, what: str) -> str:
    checked = _check_text(name, what, MAX_NAME_BYTES, None)
    refuse = _refusal(what, checked)
    body = checked.removeprefix("@")
    scope, _, rest = body.partition("/")
    if body != checked and not (scope and rest):
        raise refuse("begins with @, which only stands before a scope, as in @scope/name")
    if not _NAME.fullmatch(body):
        raise refuse("has a space, an @ within or a character that cannot be seen")
    if (size := len(checked.encode())) > MAX_NAME_BYTES:
        raise refuse(f"has {size} bytes, which is more than {MAX_NAME_BYTES}")
    return checked


def _refusal(what: str, text: str) -> Callable[[str], InvalidVersion]:
    return lambda why: InvalidVersion(f"{what} {_shown(text)} {why}", text=text)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 48 else text[:48] + "...")
