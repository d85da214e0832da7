"""The capability document, and what a daemon keeps of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from pybustcall.capabilities import (
    Agreement,
    DaemonCapabilities,
    advertisement,
    advertisement_bytes,
    check_requirements,
    digest_of,
)
from pybustcall.errors import ConfigurationError, InvalidVersion
from pybustcall.models import CapabilityDocument
from pybustcall.semverx import SemverX
from pybustcall.testing.conformance.checking import Answer, Check, Skipped, Unmet
from pybustcall.testing.conformance.expecting import expect, reply_of
from pybustcall.testing.conformance.probe import (
    BUST,
    CAPABILITIES,
    DEPENDENCIES,
    DIGEST,
    ENTRIES,
    EVENTS,
    FORGET,
    HOTSWAP,
    JOBS,
    MISSING,
    RESOLVE,
    STATUS,
    TARGET,
    Probe,
    new_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CHECKS"]


async def _document(probe: Probe) -> tuple[CapabilityDocument, Answer]:
    answer = await probe.send("GET", CAPABILITIES)
    if answer.status == 404:
        raise Skipped("it has no capability document")
    expect(answer, 200)
    return reply_of(CapabilityDocument, answer), answer


async def _has_a_sound_document(probe: Probe) -> None:
    document, _ = await _document(probe)
    if "cache.bust" not in document.capabilities:
        raise Unmet("capabilities does not name cache.bust, which is the base")
    try:
        check_requirements(document.requires)
        if document.semverx is not None:
            SemverX.parse(document.semverx)
    except ConfigurationError as error:
        raise Unmet(f"requires.{error}") from error
    except InvalidVersion as error:
        raise Unmet(f"semverx: {error}") from error


async def _tells_what_is_unchanged(probe: Probe) -> None:
    _, answer = await _document(probe)
    tag = f'"{digest_of(answer.body)}"'
    if answer.headers.get("ETag") != tag:
        raise Unmet(f"its ETag is {answer.headers.get('ETag')}, not {tag}")
    same = await probe.send("GET", CAPABILITIES, headers={"If-None-Match": tag})
    expect(same, 304)
    if same.body or same.headers.get("ETag") != tag:
        raise Unmet("a 304 has a body, or another ETag")
    expect(await probe.send("GET", CAPABILITIES, headers={"If-None-Match": '"another"'}), 200)


async def _signs_every_answer(probe: Probe) -> None:
    _, answer = await _document(probe)
    digest = digest_of(answer.body)
    for method, path, body, content_type in (
        ("GET", CAPABILITIES, None, ""),
        ("GET", STATUS, None, ""),
        ("POST", BUST, json.dumps({"target": TARGET}).encode(), "application/json"),
        ("POST", BUST, b'{"target": ""}', "application/json"),
        ("POST", BUST, b"{", "application/json"),
        ("POST", BUST, b"{}", "text/plain"),
        ("GET", BUST, None, ""),
        ("GET", "/api/v1/nothing-here", None, ""),
    ):
        sent = {"If-None-Match": answer.headers.get("ETag", "")} if path == CAPABILITIES else None
        signed = await probe.send(method, path, body, content_type, sent)
        if signed.headers.get(DIGEST) != digest:
            told = signed.headers.get(DIGEST)
            raise Unmet(f"{DIGEST} of an HTTP {signed.status} ({method} {path}) is {told}, not {digest}")


async def _tells_the_access(probe: Probe) -> None:
    document, _ = await _document(probe)
    if untold := [name for name in document.capabilities if name not in document.access]:
        raise Unmet(f"access does not name {', '.join(untold)}")


async def _fits(probe: Probe) -> None:
    document, _ = await _document(probe)
    agreement = Agreement([advertisement().requires])
    agreement.learned(DaemonCapabilities("", document), 0.0)
    if agreement.misfit:
        raise Unmet(agreement.misfit)


async def _keeps_to_the_access(probe: Probe) -> None:
    document, _ = await _document(probe)
    if not document.access:
        raise Skipped("its document tells the access of nothing")
    async with probe.stranger(None) as nobody, probe.stranger(new_key()) as stranger:
        for capability, method, path, body in _harmless(probe):
            tier = document.access.get(capability, "")
            usable = capability in document.capabilities
            if tier == "public" and usable:
                _expect_access(capability, tier, "no token", await nobody.send(method, path, body))
            elif tier in {"protected", "private"}:
                missing = MISSING if path == FORGET or not usable else ()  # what nobody may use need not be there
                for one, whose in ((nobody, "no token"), (stranger, "a wrong token")):
                    _expect_access(capability, tier, whose, await one.send(method, path, body), *missing)


def _harmless(probe: Probe) -> Iterator[tuple[str, str, str, bytes | None]]:
    """Tell requests of each capability that do little, and that whoever is let in can make."""
    name = probe.new_name()
    posts: tuple[tuple[str, str, object], ...] = (
        ("cache.register", ENTRIES, {"key": TARGET, "depends_on": []}),  # which is busted next
        ("cache.bust", BUST, {"target": TARGET, "strategy": "direct"}),
        ("cache.dependencies", DEPENDENCIES, {"name": name, "versions": ["1.0.0"]}),
        ("cache.dependencies", FORGET, {"name": name}),
        ("semver.resolve", RESOLVE, {"spec": f"{name}@*"}),
        ("cache.hotswap", HOTSWAP, {"swaps": [{"name": probe.new_name(), "to": "1.0.0"}]}),  # which nobody announced
    )
    for capability, path, document in posts:
        yield capability, "POST", path, json.dumps(document).encode()
    yield "cache.bust.jobs", "GET", f"{JOBS}?limit=1", None
    yield "cache.bust.jobs", "DELETE", f"{JOBS}/{new_key()}", None  # which nobody has
    yield "events.stream", "GET", EVENTS, None
    yield "daemon.negotiate", "POST", CAPABILITIES, advertisement_bytes()
    yield "cache.dependencies", "GET", DEPENDENCIES, None
    yield "daemon.status", "GET", STATUS, None
    yield "daemon.capabilities", "GET", CAPABILITIES, None


async def _negotiates(probe: Probe) -> None:
    _, own = await _document(probe)
    answer = await probe.send("POST", CAPABILITIES, advertisement_bytes())
    expect(answer, 200)
    if answer.body != own.body:
        raise Unmet("it answers a document with another one than its own")


async def _refuses_what_is_no_document(probe: Probe) -> None:
    for body in (b'{"binding": "a', b"[]", b'{"binding": 7}', b'{"binding": "a", "capabilities": "cache.bust"}'):
        expect(await probe.send("POST", CAPABILITIES, body), 400, 422)


def _expect_access(capability: str, tier: str, whose: str, answer: Answer, *missing: int) -> None:
    """Expect that who has no token, or a wrong one, is denied where that is said, and nowhere else."""
    denied = answer.status in {401, 403}
    if denied == (tier == "public") and answer.status not in missing:
        raise Unmet(f"{capability} is told to be {tier}, and answers {whose} with HTTP {answer.status}")


CHECKS: Final[tuple[Check, ...]] = (
    Check("has a sound capability document", _has_a_sound_document),
    Check("tells by its ETag that its document is unchanged", _tells_what_is_unchanged, strict=True),
    Check("signs every answer with the digest of its document", _signs_every_answer, strict=True),
    Check("fits this client", _fits),
    Check("tells the access of each capability", _tells_the_access, strict=True),
    Check("keeps to the access that it tells", _keeps_to_the_access),
    Check("answers a capability document with its own", _negotiates, needs=("daemon.negotiate",)),
    Check("refuses what is no capability document", _refuses_what_is_no_document, needs=("daemon.negotiate",)),
)
