"""The base protocol: what every daemon does."""

from __future__ import annotations

import json
import re
from typing import Final

from pydantic import ValidationError

from pybustcall.models import MAX_TARGET_BYTES, CapabilityDocument, StatusReply, explain
from pybustcall.testing.conformance.checking import Check, Skipped, Unmet
from pybustcall.testing.conformance.expecting import expect, expect_bust, expect_problem, expect_success, reply_of
from pybustcall.testing.conformance.probe import ACCEPTED, BINDINGS, BUST, CAPABILITIES, STATUS, TARGET, Probe

__all__ = ["CHECKS", "expect_kept"]

_SCRIPTS: Final = "conformance/ключ/キー/مفتاح/🔑/e\u0301.css"


async def _busts(probe: Probe) -> None:
    expect_bust(await probe.bust(target=TARGET, strategy="direct", binding="pybustcall", fault_tolerance=6))


async def _busts_with_defaults(probe: Probe) -> None:
    expect_success(await probe.bust(target=TARGET))


async def _ignores_unknown_fields(probe: Probe) -> None:
    expect_success(await probe.bust(target=TARGET, colour="green"))


async def _busts_the_same_again(probe: Probe) -> None:
    for _ in range(2):
        expect_success(await probe.bust(target=TARGET))


async def _busts_in_any_script(probe: Probe) -> None:
    for escaped in (False, True):
        body = json.dumps({"target": _SCRIPTS}, ensure_ascii=escaped).encode()
        expect_bust(await probe.send("POST", BUST, body), _SCRIPTS)


async def _reads_the_longest_target(probe: Probe) -> None:
    beginning = "conformance/"
    rest = MAX_TARGET_BYTES - len(beginning)
    for target in (beginning + "x" * rest, beginning + "é" * (rest // 2)):
        answer = await probe.bust(target=target, strategy="direct")
        if answer.status != ACCEPTED:
            expect(answer, 200, 422)
        if answer.status != 422:  # a cache of files has no such name, and may say so
            expect_bust(answer, target)


async def _keeps_to_the_scale(probe: Probe) -> None:
    for tolerance in (0, 1, 6, 12):
        answer = await probe.bust(target=TARGET, fault_tolerance=tolerance)
        expect_bust(answer)
        stage = json.loads(answer.body).get("fault_stage")
        if stage is not None and stage not in range(13):
            raise Unmet(f"fault_stage is {stage}, which is not of the scale from 0 to 12")


async def _keeps_its_connections(probe: Probe) -> None:
    async with probe.alone() as one:
        for target in (TARGET, f"{TARGET}.map"):
            expect_bust(await one.bust(target=target, strategy="direct"), target)
            expect(await one.send("GET", STATUS), 200)
        if one.closings:
            raise Skipped("it closes its connections, and says so")
        expect_kept(one)


async def _stays_in_step(probe: Probe) -> None:
    body = json.dumps({"target": "x" * 1000}).encode()
    async with probe.alone() as one:
        for path, sent, content_type, statuses in (
            (BUST, body, "text/plain", (415,)),
            (BUST, body[:-1], "application/json", (400,)),
            (BUST, b"", "application/json", (400, 411, 422)),
            ("/api/v1/nothing-here", body, "application/json", (404, 405)),
        ):
            expect(await one.send("POST", path, sent, content_type), *statuses)
            expect_bust(await one.bust(target=TARGET, strategy="direct"))
        expect_kept(one)


async def _reads_pieces(probe: Probe) -> None:
    body = json.dumps({"target": TARGET, "strategy": "direct"}, ensure_ascii=False).encode()
    middle = body.index("ï".encode()) + 1  # in the middle of a character
    expect_bust(await probe.send("POST", BUST, (body[:middle], body[middle:])))


async def _answers_head(probe: Probe) -> None:
    for path, statuses in ((STATUS, (200, 404, 405, 501)), ("/api/v1/nothing-here", (404, 405, 501))):
        head, _, rest = (await probe.send_raw("HEAD", path)).partition(b"\r\n\r\n")
        found = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
        if found is None or int(found[1]) not in statuses:
            said = f"HTTP {found[1].decode()}" if found is not None else "no HTTP"
            raise Unmet(f"HEAD {path} is answered with {said}, expected one of {', '.join(map(str, statuses))}")
        if rest:
            raise Unmet(f"the answer to HEAD {path} has a body of {len(rest)} bytes")


async def _tells_its_status(probe: Probe) -> None:
    answer = await probe.send("GET", STATUS)
    expect(answer, 200)
    reply_of(StatusReply, answer)


async def _tells_its_capabilities(probe: Probe) -> None:
    answer = await probe.send("GET", CAPABILITIES)
    if answer.status == 200:
        reply_of(CapabilityDocument, answer)
        return
    expect(answer, 404)
    answer = await probe.send("GET", "/api/v1/bindings/capabilities")
    expect(answer, 200)
    try:
        BINDINGS.validate_json(answer.body)
    except ValidationError as error:
        raise Unmet(f"the map of bindings is not one: {explain(error)[1]}") from error


async def _refuses_malformed_json(probe: Probe) -> None:
    expect(await probe.send("POST", BUST, b'{"target": "a'), 400)


async def _refuses_a_missing_target(probe: Probe) -> None:
    expect(await probe.bust(strategy="direct"), 400, 422)


async def _refuses_a_mistyped_target(probe: Probe) -> None:
    expect(await probe.bust(target=7), 400, 422)


async def _refuses_a_tolerance_beyond_a_byte(probe: Probe) -> None:
    expect(await probe.bust(target=TARGET, fault_tolerance=300), 400, 422)


async def _refuses_other_content_types(probe: Probe) -> None:
    body = json.dumps({"target": TARGET}).encode()
    expect(await probe.send("POST", BUST, body, "text/plain"), 415)


async def _refuses_other_methods(probe: Probe) -> None:
    expect(await probe.send("GET", BUST), 404, 405)


async def _knows_no_other_route(probe: Probe) -> None:
    expect(await probe.send("GET", "/api/v1/nothing-here"), 404)


async def _names_the_field(probe: Probe) -> None:
    for name, value in (
        ("target", ""),
        ("target", "a\u0007b"),
        ("target", "x" * 8193),
        ("target", "é" * 4097),
        ("fault_tolerance", 13),
    ):
        answer = await probe.bust(**{"target": TARGET, name: value})
        expect(answer, 422)
        if answer.content_type != "application/problem+json":
            raise Unmet(f"a refusal is {answer.content_type}, not application/problem+json")
        expect_problem(answer, 422, name)


def expect_kept(probe: Probe) -> None:
    """Expect that connections ended only where the daemon said so."""
    if probe.connections > 1 + probe.closings:
        raise Unmet("it closed a connection without saying so in the answer before")


CHECKS: Final[tuple[Check, ...]] = (
    Check("busts a key and answers with its SHA-256", _busts),
    Check("busts with defaults for every field but the target", _busts_with_defaults),
    Check("ignores fields that it does not know", _ignores_unknown_fields),
    Check("busts the same key again", _busts_the_same_again),
    Check("busts targets of any script, written out or escaped", _busts_in_any_script),
    Check("reads a target of 8192 bytes", _reads_the_longest_target),
    Check("reports no fault stage beyond the scale", _keeps_to_the_scale),
    Check("serves one request after another on a connection", _keeps_its_connections),
    Check("stays in step after a refusal", _stays_in_step),
    Check("reads a body that comes in pieces", _reads_pieces),
    Check("answers HEAD without a body", _answers_head),
    Check("tells its status", _tells_its_status),
    Check("tells its capabilities on one of the two routes", _tells_its_capabilities),
    Check("refuses malformed JSON", _refuses_malformed_json),
    Check("refuses a request without a target", _refuses_a_missing_target),
    Check("refuses a target that is no string", _refuses_a_mistyped_target),
    Check("refuses a fault tolerance beyond a byte", _refuses_a_tolerance_beyond_a_byte),
    Check("refuses other content types than JSON", _refuses_other_content_types),
    Check("refuses other methods than POST for a bust", _refuses_other_methods),
    Check("answers 404 to routes that it does not have", _knows_no_other_route),
    Check("names the field at fault in an RFC 9457 problem", _names_the_field, strict=True),
)
