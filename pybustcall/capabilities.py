"""What each side can do: pybustcall's own advertisement, what a daemon said of itself, and whether the two fit.

The advertisement is capabilities.json, of which there is one source: the file at the project's root, which the wheel
carries inside the package. `Agreement` decides, of one daemon, when its document has to be asked for and whether client
and daemon meet each other's requirements; `negotiation` does the asking. Why it is done so is told in
docs/explanation/contract.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from pydantic import ValidationError

from pybustcall.errors import ConfigurationError, InvalidVersion
from pybustcall.models import BindingCapabilities, CapabilityDocument, Requirements, explain
from pybustcall.semverx import SemverX, SemverXRange

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping, Sequence

__all__ = [
    "BASE",
    "LIFETIME",
    "SCHEMA_ID",
    "SEMVERX",
    "VERSION",
    "Agreement",
    "DaemonCapabilities",
    "advertised_digest",
    "advertisement",
    "advertisement_bytes",
    "capability_schema",
    "check_requirements",
    "digest_of",
    "load_document",
    "semverx_of",
    "unmet",
    "unmet_here",
]

VERSION: Final = version("pybustcall")
"""This package's version, as PEP 440 writes it."""

BASE: Final = frozenset({"cache.bust", "daemon.status", "daemon.capabilities"})
"""What any daemon can do, with a document or without one."""

LIFETIME: Final = 300.0
"""Seconds for which a daemon's document is taken as it was."""

_CAPABILITY: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

SCHEMA_ID: Final = "urn:bustcall:schema:capabilities:1"

_MISFIT_LIFETIME: Final = 30.0
"""The same of one that is left out: it may have been brought to another version."""

_LEAST: Final = 1.0
"""Seconds between two questions that answers gave rise to: daemons that differ behind one address would cause many."""


def semverx_of(text: str) -> str:
    """Write a PEP 440 version as SemverX: `MAJOR.state.MINOR.state.PATCH.state`.

    A pre-release or development version is experimental in all three parts, any other is stable.
    """
    return SemverX.from_pep440(text).six_parts()


SEMVERX: Final = semverx_of(VERSION)
"""This package's version as SemverX, which every request carries."""


# Documents


def digest_of(document: bytes) -> str:
    """Tell the digest of a capability document: "sha256:" and the hex SHA-256 of its bytes as they are served."""
    return "sha256:" + hashlib.sha256(document).hexdigest()


@cache
def advertisement_bytes() -> bytes:
    """Read pybustcall's own capability document as it is sent."""
    packaged = files("pybustcall") / "capabilities.json"
    source = Path(__file__).parent.parent / "capabilities.json"  # a checkout, where the package is not built
    return packaged.read_bytes() if packaged.is_file() else source.read_bytes()


@cache
def advertisement() -> CapabilityDocument:
    """Read pybustcall's own capability document."""
    return _read_document(advertisement_bytes(), "capabilities.json")


@cache
def advertised_digest() -> str:
    """Tell the digest of pybustcall's own capability document, which every request carries."""
    return digest_of(advertisement_bytes())


def load_document(path: str | os.PathLike[str]) -> CapabilityDocument:
    """Read a capability document from a file, such as a binding's own capabilities.json.

    Raises `ConfigurationError` (setting "capabilities") that tells the file, the field, what was expected and what was
    found, also for versions and ranges that are none.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from error
    return _read_document(text, path)


def _refusal(path: str | os.PathLike[str], why: str) -> ConfigurationError:
    return ConfigurationError(f"capability document {str(path)!r}: {why}", setting="capabilities")


def _read_document(text: bytes, path: str | os.PathLike[str]) -> CapabilityDocument:
    refuse = partial(_refusal, path)
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError) as error:  # also of what is no UTF-8, or a number of thousands of digits
        raise refuse(f"expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise refuse(f"expected an object, found {_kind(found)}")
    try:
        document = CapabilityDocument.model_validate_json(text)
    except ValidationError as error:
        raise refuse(_explained(error)) from None
    if document.semverx is not None:
        try:
            SemverX.parse(document.semverx)
        except InvalidVersion as error:
            raise refuse(f"semverx: {error}") from None
    try:
        check_requirements(document.requires)
    except ConfigurationError as error:
        raise refuse(f"requires.{error}") from None
    return document


def _explained(error: ValidationError) -> str:
    """Say the first thing wrong: the field, what was expected, and what kind of thing was found instead."""
    name, why = explain(error)
    if name is None:  # what the standard library takes for JSON and pydantic does not, such as half of a surrogate pair
        return why.replace("Invalid JSON", "expected JSON")
    first = error.errors(include_url=False, include_context=False, include_input=True)[0]
    found = f", found {_kind(first['input'])}" if first["type"] != "missing" else ""
    return f"{name}: {why.replace('Input should be', 'expected')}{found}"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def check_requirements(requires: Requirements) -> Requirements:
    """Return requirements if they can be checked; raise `ConfigurationError` (setting "requires") for a bad range."""
    try:
        SemverXRange.parse(requires.semverx)
    except InvalidVersion as error:
        raise ConfigurationError(f"semverx: {error}", setting="requires") from None
    for name in requires.capabilities:
        if not _CAPABILITY.fullmatch(name):
            raise ConfigurationError(
                f"capabilities: {name!r} is not the name of a capability, such as cache.bust", setting="requires"
            )
    return requires


def capability_schema() -> dict[str, Any]:
    """Make the JSON Schema (2020-12) of capability documents from the model that reads them."""
    schema = CapabilityDocument.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}


# Requirements


def unmet(requires: Requirements, semverx: str | None, capabilities: Collection[str]) -> tuple[str, ...]:
    """Tell what of the requirements is not met by a side of that version with those capabilities, a sentence each.

    A version that is not told, or that is none, meets only the range "*". Raises `InvalidVersion` for a range that is
    none.
    """
    lacks = []
    wanted = SemverXRange.parse(requires.semverx)
    if str(wanted) != "*":
        if semverx is None:
            lacks.append(f"its version is not known, and {requires.semverx} is required")
        else:
            try:
                if not wanted.matches(semverx):
                    lacks.append(f"version {semverx} does not match {requires.semverx}")
            except InvalidVersion:
                lacks.append(f"its version is none, and {requires.semverx} is required")
    lacks += [f"capability {name} is missing" for name in requires.capabilities if name not in capabilities]
    return tuple(lacks)


def unmet_here(document: CapabilityDocument) -> tuple[str, ...]:
    """Tell what this package lacks of what the document's side requires, a sentence each."""
    try:
        return unmet(document.requires, SEMVERX, advertisement().capabilities)
    except InvalidVersion as error:
        return (f"what it requires of its clients cannot be read: {error}",)


@final
@dataclass(frozen=True, slots=True)
class DaemonCapabilities:
    """What a daemon said it can do.

    - `daemon`: its URL
    - `document`: its capability document, if it serves /api/v1/capabilities
    - `bindings`: what it serves at /api/v1/bindings/capabilities instead
    - `digest`: of the document; `etag`: what to ask with whether it is still the same
    """

    daemon: str
    document: CapabilityDocument | None = None
    bindings: Mapping[str, BindingCapabilities] = field(default_factory=dict)
    digest: str | None = None
    etag: str | None = None

    @property
    def base_only(self) -> bool:
        """Whether the daemon advertises nothing: it is served with the base protocol alone."""
        return self.document is None

    @property
    def names(self) -> frozenset[str]:
        """The names of all capabilities advertised."""
        if self.document is not None:
            return frozenset(self.document.capabilities)
        return frozenset(name for binding in self.bindings.values() for name in binding.capabilities)

    def supports(self, name: str) -> bool:
        """Tell whether the daemon can be relied on for a capability: its document says so, or it is of the base."""
        return name in BASE if self.document is None else name in self.document.capabilities

    @property
    def usable(self) -> frozenset[str]:
        """The names of the capabilities that it can be relied on for."""
        return BASE if self.document is None else frozenset(self.document.capabilities)


_Verdict = tuple[str, tuple[str, ...]]
"""Why two sides do not fit, in one sentence and by what is unmet."""

_FITS: Final[_Verdict] = ("", ())


@final
class Agreement:
    """What one client knows of one daemon's document, and whether the two fit each other.

    - `requires`: what the client requires of the daemon, all of them
    - `lifetime`: seconds for which a document is taken as it was

    Fed what happens and the time; answers what to do. It asks nobody.
    """

    def __init__(self, requires: Sequence[Requirements], *, lifetime: float = LIFETIME) -> None:
        self.known: DaemonCapabilities | None = None
        self._requires = requires
        self._lifetime = lifetime
        self._strict = any(unmet(required, None, BASE) for required in requires)
        self._fresh_until = -math.inf
        self._asked = -math.inf
        self._judgement = self._refusal = _FITS
        self._refused_until = -math.inf

    @property
    def misfit(self) -> str:
        """Why the daemon is left out: one sentence, or an empty text if it fits as far as is known."""
        return self._judgement[0] or self._refusal[0]

    @property
    def unmet(self) -> tuple[str, ...]:
        """What is unmet where it is left out, a sentence each."""
        return self._judgement[1] if self._judgement[0] else self._refusal[1]

    def is_fresh(self, now: float) -> bool:
        """Tell whether what is known needs no asking."""
        return self.known is not None and now < self._fresh_until

    def must_ask(self, now: float, needs: Collection[str] = ()) -> bool:
        """Tell whether a request has to wait for the document: it needs something, the client does, or they misfit."""
        return not self.is_fresh(now) and (self._strict or not BASE.issuperset(needs) or bool(self.misfit))

    def lacking(self, needs: Collection[str]) -> tuple[str, ...]:
        """Tell what a request needs that the daemon does not advertise, a sentence each."""
        usable = BASE if self.known is None else self.known.usable
        document = self.known.document if self.known is not None else None
        private = {name for name, tier in document.access.items() if tier == "private"} if document is not None else ()
        return tuple(
            f"it keeps {name} private" if name in private else f"it does not advertise {name}"
            for name in sorted(needs)
            if name not in usable
        )

    def asked(self, now: float) -> None:
        """Take in that the document is being asked for."""
        self._asked = now

    def learned(self, found: DaemonCapabilities, now: float) -> None:
        """Take in the document, which may be the same as before. A changed one ends a refusal, and so does time."""
        changed = self.known is not None and found != self.known
        if changed or now >= self._refused_until:
            self._refusal = _FITS
        if found != self.known:
            self.known = found
            self._judgement = self._judge(found)
        self._fresh_until = now + (_MISFIT_LIFETIME if self.misfit else self._lifetime)

    def heard(self, digest: str | None, now: float) -> bool:
        """Take in the digest that an answer carried; tell whether the document is to be asked for now.

        What was never asked for is not missed: whoever needs it asks, and so does the next probe.
        """
        if digest is None or self.known is None or digest == self.known.digest or now - self._asked < _LEAST:
            return False
        self._fresh_until = -math.inf
        return True

    def refused(self, reason: str, unmet: tuple[str, ...], now: float) -> None:
        """Take in that the daemon refuses this client as one that does not fit."""
        self._refusal = f"it refused this client before: {'; '.join(unmet) or reason}", unmet
        self._refused_until = now + _MISFIT_LIFETIME
        self._fresh_until = min(self._fresh_until, self._refused_until)

    def _judge(self, found: DaemonCapabilities) -> _Verdict:
        """Tell why the two do not fit, in one sentence and by what is unmet; both are empty if they do."""
        document = found.document
        semverx = document.semverx if document is not None else None
        lacks = (lack for required in self._requires for lack in unmet(required, semverx, found.usable))
        if ours := tuple(dict.fromkeys(lacks)):
            return f"it does not meet what this client requires: {'; '.join(ours)}", ours
        theirs = unmet_here(document) if document is not None else ()
        return (f"this client does not meet what it requires: {'; '.join(theirs)}", theirs) if theirs else _FITS
