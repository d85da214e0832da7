"""The conformance suite: what any daemon must do so that this client can rely on it, checked from outside.

Each check sends requests of the base protocol, or of an extension that the daemon advertises, and says whether the
answers are right. It decides nothing about how a daemon does it, in which language, or with which cache; every daemon
that passes can serve busts.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from pybustcall.models import (
    BindingCapabilities,
    BustReply,
    CapabilityDocument,
    Problem,
    StatusReply,
    explain,
)
from pybustcall.topology import DaemonAddress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

__all__ = ["CHECKS", "Check", "Verdict", "check_daemon"]

_MAX_BYTES: Final = 4 * 1024 * 1024
_BINDINGS: Final = TypeAdapter(dict[str, BindingCapabilities])
_Model = TypeVar("_Model", bound=BaseModel)
_TARGET: Final = "conformance/naïve key.css"
_KEY: Final = "Idempotency-Key"
_REPLAYED: Final = "Idempotency-Replayed"
_IDEMPOTENT: Final = "cache.bust.idempotent"


class _Unmet(Exception):
    """A check found something else than it asks for."""


@final
@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@final
class _Probe:
    """Sends single requests to one daemon and reads the answers whole."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session = session
        self._base = base

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> _Answer:
        headers = {**(headers or {}), **({} if body is None else {"Content-Type": content_type})}
        async with self._session.request(
            method, self._base + path, data=body, headers=headers, allow_redirects=False
        ) as response:
            text = await response.content.read(_MAX_BYTES)
            return _Answer(response.status, response.content_type, text, response.headers)

    async def bust(self, **fields: object) -> _Answer:
        return await self.send("POST", "/api/v1/bust", json.dumps(fields).encode())

    async def bust_once(self, key: str, **fields: object) -> _Answer:
        return await self.send("POST", "/api/v1/bust", json.dumps(fields).encode(), headers={_KEY: key})


async def _busts(probe: _Probe) -> None:
    answer = await probe.bust(target=_TARGET, strategy="direct", binding="pybustcall", fault_tolerance=6)
    _expect(answer, 200)
    reply = _read(BustReply, answer)
    if not reply.cache_key.startswith("sha256:"):
        raise _Unmet(f"cache_key does not begin with sha256: ({reply.cache_key[:20]!r})")
    if not reply.answers(_TARGET):
        raise _Unmet("cache_key is not the SHA-256 of the target's UTF-8 bytes")


async def _busts_with_defaults(probe: _Probe) -> None:
    _expect(await probe.bust(target=_TARGET), 200)


async def _ignores_unknown_fields(probe: _Probe) -> None:
    _expect(await probe.bust(target=_TARGET, colour="green"), 200)


async def _busts_again(probe: _Probe) -> None:
    for _ in range(2):
        _expect(await probe.bust(target=_TARGET), 200)


async def _tells_its_status(probe: _Probe) -> None:
    answer = await probe.send("GET", "/api/v1/status")
    _expect(answer, 200)
    _read(StatusReply, answer)


async def _tells_its_capabilities(probe: _Probe) -> None:
    answer = await probe.send("GET", "/api/v1/capabilities")
    if answer.status == 200:
        _read(CapabilityDocument, answer)
        return
    _expect(answer, 404)
    answer = await probe.send("GET", "/api/v1/bindings/capabilities")
    _expect(answer, 200)
    try:
        _BINDINGS.validate_json(answer.body)
    except ValidationError as error:
        raise _Unmet(f"the map of bindings is not one: {explain(error)[1]}") from error


async def _refuses_malformed_json(probe: _Probe) -> None:
    _expect(await probe.send("POST", "/api/v1/bust", b'{"target": "a'), 400)


async def _refuses_a_missing_target(probe: _Probe) -> None:
    _expect(await probe.bust(strategy="direct"), 400, 422)


async def _refuses_a_mistyped_target(probe: _Probe) -> None:
    _expect(await probe.bust(target=7), 400, 422)


async def _refuses_a_tolerance_beyond_a_byte(probe: _Probe) -> None:
    _expect(await probe.bust(target=_TARGET, fault_tolerance=300), 400, 422)


async def _refuses_other_content_types(probe: _Probe) -> None:
    body = json.dumps({"target": _TARGET}).encode()
    _expect(await probe.send("POST", "/api/v1/bust", body, "text/plain"), 415)


async def _refuses_other_methods(probe: _Probe) -> None:
    _expect(await probe.send("GET", "/api/v1/bust"), 404, 405)


async def _knows_no_other_route(probe: _Probe) -> None:
    _expect(await probe.send("GET", "/api/v1/nothing-here"), 404)


async def _names_the_field(probe: _Probe) -> None:
    for name, value in (("target", ""), ("target", "a\u0007b"), ("target", "x" * 8193), ("fault_tolerance", 13)):
        answer = await probe.bust(**{"target": _TARGET, name: value})
        _expect(answer, 422)
        if answer.content_type != "application/problem+json":
            raise _Unmet(f"a refusal is {answer.content_type}, not application/problem+json")
        problem = _read(Problem, answer)
        if problem.field != name:
            raise _Unmet(f"the problem names the field {problem.field!r}, not {name!r}")


async def _answers_a_repeat_from_memory(probe: _Probe) -> None:
    key = _new_key()
    first = await probe.bust_once(key, target=_TARGET, strategy="direct")
    again = await probe.bust_once(key, target=_TARGET, strategy="direct")
    _expect(first, 200)
    _expect(again, 200)
    if _REPLAYED in first.headers:
        raise _Unmet(f"the first answer to a key has {_REPLAYED}")
    if again.headers.get(_REPLAYED) != "true":
        raise _Unmet(f"the answer to a repeat has {_REPLAYED} {again.headers.get(_REPLAYED)!r}, not 'true'")
    if again.body != first.body:
        raise _Unmet("the answer to a repeat is another than the first")


async def _refuses_a_key_of_another_request(probe: _Probe) -> None:
    key = _new_key()
    _expect(await probe.bust_once(key, target=_TARGET, strategy="direct"), 200)
    for fields in ({"target": f"{_TARGET}.map", "strategy": "direct"}, {"target": _TARGET, "strategy": "dimensional"}):
        answer = await probe.bust_once(key, **fields)
        _expect(answer, 422)
        problem = _read(Problem, answer)
        if problem.field != _KEY:
            raise _Unmet(f"the problem names the field {problem.field!r}, not {_KEY!r}")


async def _refuses_what_is_no_key(probe: _Probe) -> None:
    for key in ("x" * 256, "two words"):
        answer = await probe.bust_once(key, target=_TARGET)
        _expect(answer, 400)
        problem = _read(Problem, answer)
        if problem.field != _KEY:
            raise _Unmet(f"the problem names the field {problem.field!r}, not {_KEY!r}")


async def _remembers_no_refusal(probe: _Probe) -> None:
    for refused in ({"target": ""}, {"target": _TARGET, "strategy": "no-such-strategy"}):
        key = _new_key()
        first = await probe.bust_once(key, **refused)
        if first.status == 200:  # a daemon may take any strategy
            continue
        _expect(first, 400, 422)
        answer = await probe.bust_once(key, target=_TARGET)
        _expect(answer, 200)
        if _REPLAYED in answer.headers:
            raise _Unmet(f"the first success of a key has {_REPLAYED}")


def _new_key() -> str:
    return f"conformance-{secrets.token_hex(16)}"


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a daemon must do.

    - `strict`: asked of daemons of ours, not of every other
    - `capability`: asked only of daemons that advertise it
    """

    name: str
    run: Callable[[Any], Awaitable[None]]
    strict: bool = False
    capability: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one check passed; `detail` tells what was found instead."""

    name: str
    ok: bool
    detail: str = ""


CHECKS: Final[tuple[Check, ...]] = (
    Check("busts a key and answers with its SHA-256", _busts),
    Check("busts with defaults for every field but the target", _busts_with_defaults),
    Check("ignores fields that it does not know", _ignores_unknown_fields),
    Check("busts the same key again", _busts_again),
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
    Check("answers a repeat of a key from memory", _answers_a_repeat_from_memory, capability=_IDEMPOTENT),
    Check("refuses a key that belongs to another request", _refuses_a_key_of_another_request, capability=_IDEMPOTENT),
    Check("refuses what cannot be a key", _refuses_what_is_no_key, capability=_IDEMPOTENT),
    Check("remembers no refusal under a key", _remembers_no_refusal, capability=_IDEMPOTENT),
)
"""The base protocol and the extensions, as checks."""


async def check_daemon(
    url: str, *, token: str | None = None, strict: bool = False, timeout: float = 10.0
) -> tuple[Verdict, ...]:
    """Run the checks of the base protocol, and of what it advertises, against the daemon at `url`; tell their verdicts.

    - `strict`: also what only daemons of ours must do
    - `timeout`: seconds for each request

    The checks bust keys that begin with "conformance/naïve key.css". Raises `ConfigurationError` for a URL that is
    none; a daemon that does not answer makes verdicts that say so.
    """
    address = DaemonAddress.parse(url)
    headers: Mapping[str, str] = {} if token is None else {"Authorization": f"Bearer {token}"}
    connector = aiohttp.UnixConnector(address.socket_path) if address.socket_path is not None else None
    limit = aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=limit) as session:
        probe = _Probe(session, address.base)
        advertised = await _advertised(probe)
        asked = [check for check in CHECKS if strict or not check.strict]
        return tuple([await _judge(check, probe) for check in asked if check.capability in advertised])


async def _advertised(probe: _Probe) -> set[str | None]:
    """Tell what the daemon says it can do, and None, which stands for the base; bad answers are for a check to tell."""
    found: set[str | None] = {None}
    try:
        answer = await probe.send("GET", "/api/v1/capabilities")
        if answer.status == 200:
            return found.union(_read(CapabilityDocument, answer).capabilities)
        answer = await probe.send("GET", "/api/v1/bindings/capabilities")
        if answer.status == 200:
            bindings = _BINDINGS.validate_json(answer.body)
            return found.union(*(binding.capabilities for binding in bindings.values()))
    except (_Unmet, ValidationError, aiohttp.ClientError, OSError):
        pass
    return found


async def _judge(check: Check, probe: _Probe) -> Verdict:
    try:
        await check.run(probe)
    except _Unmet as unmet:
        return Verdict(check.name, ok=False, detail=str(unmet))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return Verdict(check.name, ok=False, detail=f"no answer: {str(error) or type(error).__name__}")
    return Verdict(check.name, ok=True)


def _expect(answer: _Answer, *statuses: int) -> None:
    if answer.status not in statuses:
        expected = " or ".join(str(status) for status in statuses)
        raise _Unmet(f"answered HTTP {answer.status}, expected {expected}")


def _read(model: type[_Model], answer: _Answer) -> _Model:
    try:
        return model.model_validate_json(answer.body)
    except ValidationError as error:
        field, why = explain(error)
        raise _Unmet(f"{field or 'the body'}: {why}") from error
