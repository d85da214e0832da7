"""Who is let in, to which capability; what is required of clients; and how both sides know what is in effect."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from pybustcall.capabilities import digest_of
from pybustcall.daemon import DaemonSettings, FaultHistory, check_settings
from pybustcall.daemon.access import Clients, Refusal
from pybustcall.daemon.app import DAEMON, ROUTES, Route
from pybustcall.errors import ConfigurationError
from pybustcall.models import CapabilityDocument, Requirements
from tests.conftest import StartDaemon
from tests.plain_cache import engine_over
from tests.test_cli import call
from tests.test_daemon_app import (
    BINDINGS,
    BUST,
    CAPABILITIES,
    ENTRIES,
    JSON,
    STATUS,
    Gate,
    bust,
    raw,
    refused,
    running,
    serving,
)
from tests.test_daemon_idempotency import warnings_in

if TYPE_CHECKING:
    from tests.test_daemon_app import Client

TOKEN = "tok-en"
OPERATOR = "operat-or"
DIGEST = "Bustcall-Capabilities"
ADVERTISE = "urn:bustcall:problem:advertise"
INCOMPATIBLE = "urn:bustcall:problem:incompatible"
NEEDY = Requirements(capabilities=("cache.bust",))


def bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


async def document_of(client: Client, token: str | None = None) -> CapabilityDocument:
    async with client.get(CAPABILITIES, headers=bearer(token)) as response:
        assert response.status == 200
        return CapabilityDocument.model_validate_json(await response.read())


async def status_of(client: Client, token: str | None, method: str = "POST", path: str = BUST) -> int:
    """Ask for something, with a token or without; tell the status, of which a refusal must be sound."""
    sent: dict[str, Any] = {"json": {"target": "a"}} if method == "POST" else {}
    async with client.request(method, path, headers=bearer(token), **sent) as response:
        if response.status != 200 and method != "HEAD":
            problem = await refused(response, response.status)
            assert not any(secret in problem.detail for secret in (TOKEN, OPERATOR))
        assert ("WWW-Authenticate" in response.headers) is (response.status == 401)
        return response.status


# Tiers


PROTECTED_BY_BOTH = {None: 401, "wrong": 401, TOKEN: 200, OPERATOR: 200}
PRIVATE_BY_BOTH = {None: 401, "wrong": 401, TOKEN: 403, OPERATOR: 200}


@pytest.mark.requirement("INT-14")
@pytest.mark.parametrize(
    ("tier", "token", "operator", "statuses"),
    [
        ("public", None, None, {None: 200, "wrong": 200}),
        ("public", TOKEN, OPERATOR, {None: 200, "wrong": 200, TOKEN: 200, OPERATOR: 200}),
        ("protected", None, None, {None: 200, "wrong": 200}),
        ("protected", TOKEN, None, {None: 401, "wrong": 401, TOKEN: 200}),
        ("protected", None, OPERATOR, {None: 401, "wrong": 401, OPERATOR: 200}),
        ("protected", TOKEN, OPERATOR, PROTECTED_BY_BOTH),
        ("private", None, None, {None: 403, "wrong": 403}),
        ("private", TOKEN, None, {None: 403, "wrong": 403, TOKEN: 403}),
        ("private", None, OPERATOR, {None: 401, "wrong": 401, OPERATOR: 200}),
        ("private", TOKEN, OPERATOR, PRIVATE_BY_BOTH),
    ],
)
async def test_each_tier_lets_in_whom_it_names(
    tier: str, token: str | None, operator: str | None, statuses: dict[str | None, int]
) -> None:
    """The whole table: a tier, the tokens that there are, and what each credential gets."""
    async with running(token=token, operator_token=operator, access={"cache.bust": tier}) as client:
        assert {given: await status_of(client, given) for given in statuses} == statuses


@pytest.mark.requirement("INT-14")
async def test_what_is_not_said_to_be_otherwise_is_protected() -> None:
    """But for the capabilities themselves, which are public; HEAD is no way around."""
    async with running(token=TOKEN) as client:
        access = (await document_of(client)).access
        assert {name for name, tier in access.items() if tier == "public"} == {"daemon.capabilities"}
        assert set(access.values()) == {"public", "protected"}
        for method, path in (
            ("POST", BUST), ("POST", ENTRIES), ("POST", CAPABILITIES), ("GET", STATUS), ("HEAD", STATUS),
            ("DELETE", BUST), ("GET", "/api/v1/%62ust"), ("GET", "/nothing"),
        ):  # fmt: skip
            assert await status_of(client, None, method, path) == 401
        for method, path in (
            ("GET", CAPABILITIES),
            ("HEAD", CAPABILITIES),
            ("GET", BINDINGS),
            ("GET", "/openapi.json"),
        ):
            assert await status_of(client, None, method, path) == 200


@pytest.mark.requirement("INT-14")
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_asks_for_its_capability(route: Route) -> None:
    """Made private without an operator, a capability is closed to everybody, on each of its routes and on no other."""
    async with running(access={route.capability: "private"}) as client:
        for other in ROUTES:
            async with client.request(other.method, other.path.replace("{job}", "x")) as response:
                if other.capability == route.capability:
                    assert (await refused(response, 403)).detail.startswith(f"{route.capability} is denied: ")
                else:
                    assert response.status in {200, 404, 415}  # which knows no such job, or wants a body


async def test_the_capabilities_can_be_private() -> None:
    """Then nobody but the operator learns even those, on any of their routes."""
    async with running(token=TOKEN, operator_token=OPERATOR, access={"daemon.capabilities": "private"}) as client:
        for path in (CAPABILITIES, BINDINGS, "/openapi.json"):
            assert await status_of(client, TOKEN, "GET", path) == 403
            assert await status_of(client, OPERATOR, "GET", path) == 200


@pytest.mark.requirement("INT-14")
async def test_a_capability_that_nobody_can_use_is_not_advertised() -> None:
    """It is named in the access map alone; the header that belongs to it goes with it."""
    async with running(access={"cache.bust": "private", "cache.register": "private"}) as client:
        document = await document_of(client)
        fields = ("all", "dry_run", "idempotent", "namespace", "prefix", "settle", "soft", "tag", "verify")
        gone = {"cache.bust", "cache.register", *(f"cache.bust.{name}" for name in fields)}
        assert gone.isdisjoint(document.capabilities)
        assert gone.isdisjoint(document.endpoints)
        assert {name for name, tier in document.access.items() if tier == "private"} == gone
        assert set(document.access.values()) == {"private", "public"}
        async with client.get(BINDINGS) as response:
            assert (await response.json())["pybustcall"]["capabilities"] == list(document.capabilities)


async def test_a_private_capability_is_advertised_if_there_is_an_operator() -> None:
    """Somebody can use it."""
    async with running(operator_token=OPERATOR, access={"cache.bust": "private"}) as client:
        document = await document_of(client)
        assert {"cache.bust", "cache.bust.idempotent"} <= set(document.capabilities)
        assert document.access["cache.bust"] == document.access["cache.bust.idempotent"] == "private"
        assert document.access["daemon.status"] == "protected"


@pytest.mark.requirement("INT-14")
@pytest.mark.parametrize(
    ("status", "capability", "method", "path", "headers"),
    [
        (421, "cache.bust", "POST", BUST, {"Host": "evil.example"}),
        (403, "cache.bust", "POST", BUST, {"Origin": "http://evil.example"}),
        (401, "cache.register", "POST", ENTRIES, {}),
        (401, "daemon.status", "GET", STATUS, bearer("wrong")),
        (401, "cache.bust", "POST", BUST, {}),
        (403, "cache.bust", "POST", BUST, bearer(TOKEN)),
        (401, "an unknown route", "GET", "/nothing", {}),
    ],
)
async def test_every_denial_is_in_the_history(
    status: int, capability: str, method: str, path: str, headers: dict[str, str]
) -> None:
    """At stage 3, with the capability, and the binding that the headers say."""
    history = FaultHistory()
    async with (
        running(history=history, token=TOKEN, operator_token=OPERATOR, access={"cache.bust": "private"}) as client,
        client.request(method, path, headers={"Bustcall-Binding": "lua", **headers}) as response,
    ):
        problem = await refused(response, status)
    assert problem.detail.startswith(f"{capability} is denied: ")
    assert [(it.fault_stage, it.binding, it.message) for it in history.records()] == [(3, "lua", problem.detail)]


@pytest.mark.requirement("INT-14")
async def test_denials_are_logged_and_not_washed_out(caplog: pytest.LogCaptureFixture) -> None:
    """At once, then at most one line in 10 seconds, which counts those between; whatever else is asked."""
    history = FaultHistory()
    async with running(history=history, token=TOKEN) as client:
        for path in [STATUS] * 3 + [CAPABILITIES] * 300:
            async with client.get(path, headers={"Expect": "tea"} if path == CAPABILITIES else {}):
                pass
        client.app[DAEMON]._denials._told -= 10
        await status_of(client, "wrong", "GET", STATUS)
    denied = "daemon.status is denied: this daemon wants its token, as Authorization: Bearer"
    assert warnings_in(caplog) == [
        f"{denied} (asked by unknown)",
        f"{denied} (asked by unknown; 2 more since the line before)",
    ]
    assert [it.message.partition(" since")[0] for it in history.records() if it.fault_stage == 3] == [
        f"{denied} (4 times"
    ]


@pytest.mark.parametrize("lines", [(), ("Bustcall-Binding: a b",), ("Bustcall-Binding: a", "Bustcall-Binding: b")])
async def test_a_binding_that_no_header_says_is_unknown(lines: tuple[str, ...]) -> None:
    """Said twice, or not presentable, it is said by nobody."""
    history = FaultHistory()
    async with running(history=history, token=TOKEN) as client:
        assert b" 401 " in await raw(client.port, f"GET {STATUS} HTTP/1.1", "Host: localhost", *lines, head=True)
    assert [record.binding for record in history.records()] == ["unknown"]


async def test_the_body_says_the_binding_better_than_the_header() -> None:
    """The header serves where the body was not read, or does not say it."""
    history = FaultHistory()
    async with running(history=history) as client:
        for body in ({"target": "", "binding": "go"}, {"target": ""}):
            async with client.post(BUST, json=body, headers={"Bustcall-Binding": "lua"}) as response:
                await refused(response, 422)
    assert [record.binding for record in history.records()] == ["go", "lua"]


async def test_the_keys_of_the_operator_are_not_those_of_others() -> None:
    """An idempotency key belongs to the token that let it in, or to nobody."""
    gate = Gate()
    gate.open.set()
    replayed = []
    async with running(
        engine_over(gate), token=TOKEN, operator_token=OPERATOR, access={"cache.bust": "public"}
    ) as client:
        for token in (TOKEN, OPERATOR, None, "wrong", OPERATOR):
            headers = {"Idempotency-Key": "k", **bearer(token)}
            async with client.post(BUST, json={"target": "a"}, headers=headers) as response:
                replayed.append(response.headers.get("Idempotency-Replayed"))
    assert replayed == [None, None, None, "true", "true"]


# Settings


@pytest.mark.parametrize(
    ("settings", "setting", "reason"),
    [
        ({"access": {"cache.bust.idempotent": "public"}}, "access", "is that of cache.bust; set that"),
        (
            {"access": {"cache.burst": "public"}},
            "access",
            "no capability 'cache.burst' .* cache.bust, cache.bust.jobs, cache.dep",
        ),
        ({"access": {"cache.bust": "secret"}}, "access", "one of public, protected, private, not 'secret'"),
        ({"operator_token": ""}, "operator_token", "the operator token must be visible ASCII"),
        ({"operator_token": "se cret"}, "operator_token", "visible ASCII"),
        ({"operator_token": "secret", "token": "secret"}, "operator_token", "another than the token"),
        ({"requires": Requirements(semverx="newest")}, "requires", "semverx: range .newest."),
        ({"requires": Requirements(capabilities=("",))}, "requires", "is not the name of a capability"),
        (
            {"requires": NEEDY, "access": {"daemon.negotiate": "private"}, "token": "secret"},
            "access",
            "no client could do anything; leave it protected, require no capability, or set an operator token",
        ),
    ],
)
def test_rules_that_cannot_be_kept_are_told_by_name(settings: dict[str, Any], setting: str, reason: str) -> None:
    """The error says which setting, and what there is instead; never a token."""
    with pytest.raises(ConfigurationError, match=reason) as caught:
        check_settings(DaemonSettings(**settings))
    assert caught.value.setting == setting
    assert setting == "access" or "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"requires": NEEDY, "access": {"daemon.negotiate": "private"}, "operator_token": "x"},
        {"requires": NEEDY, "access": {"daemon.negotiate": "protected"}},
        {"requires": Requirements(semverx=">=1.0.0"), "access": {"daemon.negotiate": "private"}},
        {"access": {"daemon.negotiate": "private"}},
    ],
)
def test_negotiation_may_be_private_where_somebody_can_do_without(settings: dict[str, Any]) -> None:
    """The operator, or everybody: a version is told with each request."""
    check_settings(DaemonSettings(**settings))


@pytest.mark.parametrize("token", ["token", "operator_token"])
def test_either_token_lets_a_daemon_listen_for_other_machines(token: str) -> None:
    """What is protected needs one of them, so nothing is open to all that was not said to be."""
    check_settings(DaemonSettings(host="0.0.0.0", **{token: "x"}))  # type: ignore[arg-type]  # both are text
    with pytest.raises(ConfigurationError, match="needs a token"):
        check_settings(DaemonSettings(host="0.0.0.0", access={"cache.bust": "private"}))


def test_the_operator_token_is_not_in_the_repr() -> None:
    """Settings can be logged."""
    assert "secret" not in repr(DaemonSettings(operator_token="secret"))


# The digest


async def test_the_digest_is_that_of_the_document_as_served() -> None:
    """SHA-256 of the body's bytes, which is also its strong entity tag."""
    async with running() as client, client.get(CAPABILITIES) as response:
        body = await response.read()
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        assert response.headers[DIGEST] == digest
        assert response.headers["ETag"] == f'"{digest}"'


async def test_every_answer_carries_the_digest() -> None:
    """Refusals as well, and those of what is no request."""
    async with running(token=TOKEN) as client:
        async with client.get(CAPABILITIES) as response:
            digest = response.headers[DIGEST]
        found: Counter[int] = Counter()
        for method, path, headers in (
            ("POST", BUST, bearer(TOKEN)),
            ("HEAD", CAPABILITIES, {}),
            ("GET", BINDINGS, {}),
            ("GET", STATUS, {}),
            ("GET", STATUS, {"Host": "evil.example"}),
            ("GET", STATUS, {"Origin": "null"}),
            ("GET", "/nothing", bearer(TOKEN)),
            ("GET", BUST, bearer(TOKEN)),
            ("POST", ENTRIES, {**bearer(TOKEN), **JSON}),
            ("GET", CAPABILITIES, {"If-None-Match": "*"}),
            ("GET", "/nothing", {"Expect": "tea"}),
        ):
            sent = {"json": {"target": "a"}} if path == BUST and method == "POST" else {}
            async with client.request(method, path, headers=headers, **sent) as response:  # type: ignore[arg-type]
                assert response.headers.getall(DIGEST) == [digest]
                found[response.status] += 1
    assert found == {200: 3, 401: 1, 421: 1, 403: 1, 404: 1, 405: 1, 400: 1, 304: 1, 417: 1}


async def test_what_is_no_http_is_answered_with_the_digest() -> None:
    """The client learns what is in effect, though its request was none."""
    async with serving(port=0) as (url, _), aiohttp.ClientSession(url) as session:
        async with session.get(CAPABILITIES) as response:
            digest = response.headers[DIGEST]
        port = response.url.port
        answer = await raw(port, "NONSENSE", head=True)
    assert answer.count(f"{DIGEST}: {digest}\r\n".encode()) == 1


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"other", {tag}', 304),
        ('"other" ,W/"weak",W/{tag}', 304),
        ("*", 304),
        ('"other"', 200),
        ("{digest}", 200),
        ('"*"', 200),
        ("", 200),
        ('"other', 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_document_that_is_known_is_not_sent_again(given: str, status: int, method: str) -> None:
    """If-None-Match of RFC 9110: a list, or the star, compared weakly."""
    async with running() as client:
        async with client.get(CAPABILITIES) as response:
            tag = response.headers["ETag"]
        headers = {"If-None-Match": given.format(tag=tag, digest=tag.strip('"'))}
        async with client.request(method, CAPABILITIES, headers=headers) as response:
            assert response.status == status
            assert response.headers["ETag"] == tag
            assert (await response.read() == b"") is (status == 304 or method == "HEAD")
        async with client.post(CAPABILITIES, json={"binding": "go"}, headers=headers) as response:
            assert response.status == 200


async def test_tags_in_several_lines_are_one_list() -> None:
    """As any list header."""
    async with running() as client:
        async with client.get(CAPABILITIES) as response:
            tag = response.headers["ETag"]
        answer = await raw(
            client.port, f"GET {CAPABILITIES} HTTP/1.1", "Host: localhost", 'If-None-Match: "a"',
            f"If-None-Match: {tag}", head=True,
        )  # fmt: skip
    assert answer.startswith(b"HTTP/1.1 304 ")


@pytest.mark.parametrize(
    "settings",
    [
        {"token": TOKEN},
        {"max_body_bytes": 9000},
        {"access": {"cache.bust": "private"}},
        {"requires": Requirements(capabilities=("cache.bust",))},
    ],
)
async def test_another_document_has_another_digest(settings: dict[str, Any]) -> None:
    """Whatever changes what clients may rely on; the same settings have the same digest."""
    digests = []
    for more in ({}, settings, settings):
        async with running(**more) as client, client.get(CAPABILITIES) as response:
            digests.append(response.headers[DIGEST])
    assert digests[0] != digests[1] == digests[2]


# Requirements


def advertisement(*capabilities: str, semverx: str | None = "1.2.0", **more: object) -> bytes:
    return json.dumps({"binding": "lua", "semverx": semverx, "capabilities": capabilities, **more}).encode()


@pytest.mark.requirement("IMP-10")
@pytest.mark.parametrize(
    ("version", "status"),
    [("1.2.0", 200), ("1.stable.2.stable.0.stable", 200), ("0.9.0", 426), ("newest", 426), (None, 426)],
)
async def test_a_client_of_another_version_is_refused(version: str | None, status: int) -> None:
    """It may ask for the status and the capabilities; nothing is busted for it; the problem says what is unmet."""
    gate = Gate()
    gate.open.set()
    history = FaultHistory()
    headers = {"Bustcall-Binding": "lua", **({} if version is None else {"Bustcall-Version": version})}
    async with running(engine_over(gate), history, requires=Requirements(semverx=">=1.0.0")) as client:
        for path in (STATUS, CAPABILITIES, BINDINGS):
            async with client.get(path, headers=headers) as response:
                assert response.status == 200
        async with client.post(BUST, json={"target": "a"}, headers=headers) as response:
            if status == 426:
                unmet = (await refused(response, 426, INCOMPATIBLE)).unmet
                assert unmet is not None
                assert len(unmet) == 1
                assert ">=1.0.0" in unmet[0]
                assert response.headers["Upgrade"] == "bustcall/1"
            else:
                assert response.status == 200
        async with client.get("/nothing", headers=headers) as response:
            await refused(response, 404)
    assert gate.removed == (["a"] if status == 200 else [])
    expected = [(3, "lua")] * (2 if status == 426 else 1)
    assert [(record.fault_stage, record.binding) for record in history.records()] == expected


async def test_without_requirements_anybody_fits() -> None:
    """Whatever version and digest are said, or none."""
    async with running() as client:
        await bust(client)
        headers = {"Bustcall-Version": "nonsense", DIGEST: "nonsense"}
        async with client.post(BUST, json={"target": "a"}, headers=headers) as response:
            assert response.status == 200


@pytest.mark.requirement("IMP-10")
async def test_a_client_that_lacks_nothing_advertises_itself_once() -> None:
    """A digest that is not known is a 428, which is no fault; with the document known, the request is served."""
    history = FaultHistory()
    body = advertisement("cache.bust", "cache.hotswap", "another.thing")
    headers = {DIGEST: digest_of(body), "Bustcall-Version": "1.2.0"}
    requires = Requirements(semverx=">=1.0.0", capabilities=("cache.bust", "cache.hotswap"))
    async with running(history=history, requires=requires) as client:
        assert (await document_of(client)).requires == requires
        for given in (headers, {"Bustcall-Version": "1.2.0"}):
            async with client.post(BUST, json={"target": "a"}, headers=given) as response:
                problem = await refused(response, 428, ADVERTISE)
                assert CAPABILITIES in problem.detail
                assert DIGEST in problem.detail
        async with client.post(CAPABILITIES, data=body, headers={**headers, **JSON}) as response:
            assert response.status == 200
            own = await response.read()
            assert response.headers["ETag"] == f'"{digest_of(own)}"'
        async with client.get(CAPABILITIES) as response:
            assert await response.read() == own
        for _ in range(2):
            async with client.post(BUST, json={"target": "a"}, headers=headers) as response:
                assert response.status == 200
    assert not history.records()


@pytest.mark.requirement("IMP-10")
async def test_a_client_that_lacks_something_is_told_what() -> None:
    """When it advertises itself, and at every request after that; each unmet requirement is one sentence."""
    history = FaultHistory()
    body = advertisement("cache.bust", semverx="0.1.0")
    requires = Requirements(semverx=">=1.0", capabilities=("cache.bust", "cache.hotswap"))
    async with running(history=history, requires=requires) as client:
        async with client.post(CAPABILITIES, data=body, headers=JSON) as response:
            problem = await refused(response, 426, INCOMPATIBLE)
        assert problem.unmet == ("version 0.1.0 does not match >=1.0", "capability cache.hotswap is missing")
        assert "; ".join(problem.unmet) in problem.detail
        headers = {DIGEST: digest_of(body), "Bustcall-Version": "1.2.0"}
        async with client.post(BUST, json={"target": "a"}, headers=headers) as response:
            assert (await refused(response, 426, INCOMPATIBLE)).unmet == ("capability cache.hotswap is missing",)
    assert [(record.fault_stage, record.binding) for record in history.records()] == [(3, "lua"), (3, "unknown")]


async def test_a_client_whose_version_does_not_fit_need_not_advertise_itself() -> None:
    """It would be refused all the same, so it is told so at once."""
    requires = Requirements(semverx=">=1.0.0", capabilities=("cache.hotswap",))
    async with (
        running(requires=requires) as client,
        client.post(BUST, json={"target": "a"}, headers={"Bustcall-Version": "0.1.0"}) as response,
    ):
        unmet = (await refused(response, 426, INCOMPATIBLE)).unmet
    assert unmet == ("version 0.1.0 does not match >=1.0.0",)


async def test_a_426_leaves_the_connection_as_it_was() -> None:
    """The Upgrade that it offers is not taken up, and the next request goes over the same connection."""
    async with running(requires=Requirements(semverx=">=1.0.0")) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        for path, status in ((BUST, b"426"), (STATUS, b"200")):
            method = "POST" if path == BUST else "GET"
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 " + status)
            assert (b"\r\nupgrade: bustcall/1\r\n" in head) is (status == b"426")
            assert (b"\r\nconnection: upgrade\r\n" in head) is (status == b"426")
            (length,) = (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("body", "kind", "status", "field"),
    [
        (b"{", "application/json", 400, None),
        (b"{}", "application/json", 422, "binding"),
        (advertisement(semverx="1", capabilities=7), "application/json", 422, "capabilities"),
        (advertisement(), "text/plain", 415, None),
        (advertisement(more="x" * 1000), "application/json", 413, None),
    ],
)
async def test_what_is_no_capability_document_is_refused(
    body: bytes, kind: str, status: int, field: str | None
) -> None:
    """As any other body."""
    async with (
        running(max_body_bytes=1000) as client,
        client.post(CAPABILITIES, data=body, headers={"Content-Type": kind}) as response,
    ):
        assert (await refused(response, status)).field == field


async def test_our_own_document_can_be_advertised() -> None:
    """What one daemon serves, another reads, nested parts and all."""
    async with running() as client:
        async with client.get(CAPABILITIES) as response:
            body = await response.read()
        async with client.post(CAPABILITIES, data=body, headers=JSON) as response:
            assert response.status == 200


def test_as_many_clients_are_remembered_as_were_said_the_least_used_goes_first() -> None:
    """Whoever was forgotten is asked again; whoever asks often is kept."""
    clients = Clients(Requirements(capabilities=("cache.bust",)), limit=2)
    fits = CapabilityDocument(binding="lua", capabilities=("cache.bust",))

    def is_known(digest: str) -> bool:
        try:
            clients.check(CIMultiDictProxy(CIMultiDict({DIGEST: digest})))
        except Refusal:
            return False
        return True

    for digest in ("a", "b"):
        clients.meet(digest, fits)
    assert is_known("a")
    clients.meet("c", fits)
    assert [is_known(digest) for digest in "abc"] == [True, False, True]
    clients.meet("a", fits)
    clients.meet("d", fits)
    assert [is_known(digest) for digest in "abcd"] == [True, False, False, True]


# The command line


@pytest.mark.requirement("INT-14")
@pytest.mark.parametrize("from_file", [False, True])
async def test_the_rules_can_be_given_on_the_command_line(
    start_daemon: StartDaemon, tmp_path: Any, from_file: bool
) -> None:
    """--access, --operator-token-file or its variable, --require-semverx, --require-capability."""
    (tmp_path / "operator").write_text(OPERATOR + "\n")
    daemon = start_daemon(
        "--access", "cache.bust=private", "--access", "daemon.status=public",
        "--require-semverx", ">=1.0.0", "--require-capability", "cache.bust", "--require-capability", "cache.hotswap",
        *(["--operator-token-file", str(tmp_path / "operator")] if from_file else []),
        env={"BUSTCALL_TOKEN": TOKEN, **({} if from_file else {"BUSTCALL_OPERATOR_TOKEN": OPERATOR})},
    )  # fmt: skip
    async with aiohttp.ClientSession(daemon.url) as session:
        async with session.get(CAPABILITIES) as response:
            document = CapabilityDocument.model_validate_json(await response.read())
        for token, status in ((None, 401), (TOKEN, 403), (OPERATOR, 426)):
            async with session.post(BUST, json={"target": "a"}, headers=bearer(token)) as response:
                assert response.status == status
        async with session.get(STATUS) as response:
            assert response.status == 200
    assert document.requires == Requirements(semverx=">=1.0.0", capabilities=("cache.bust", "cache.hotswap"))
    access = {name: document.access[name] for name in ("cache.bust", "daemon.status", "cache.register")}
    assert access == {"cache.bust": "private", "daemon.status": "public", "cache.register": "protected"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--access", "cache.bust"], 2, "--access takes NAME=TIER"),
        (["--access", "cache.burst=public"], 4, "no capability 'cache.burst'"),
        (["--access", "cache.bust="], 4, "one of public, protected, private"),
        (["--require-semverx", "newest"], 4, "semverx: range"),
        (["--operator-token-file", "missing"], 4, "token file missing: cannot be read"),
    ],
)
def test_rules_that_cannot_be_kept_end_the_command(arguments: list[str], code: int, says: str) -> None:
    """Before it listens, with a sentence."""
    found, out, err = call("daemon", "--port", "0", *arguments)
    assert (found, out) == (code, "")
    assert says in err
