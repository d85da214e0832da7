"""The daemon over real sockets: routes, admission, refusals, and a life from bind to drained end."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import stat
import sys
import threading
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio
import pytest
import uvloop
from aiohttp.test_utils import TestClient, TestServer

from pybustcall.daemon import (
    BackendFailure,
    DaemonSettings,
    Engine,
    FaultHistory,
    FilesBackend,
    Indexes,
    MemoryBackend,
    check_settings,
    create_app,
    reading,
    serve,
)
from pybustcall.daemon import serving as serving_module
from pybustcall.daemon.access import Refusal
from pybustcall.errors import ConfigurationError
from pybustcall.models import (
    BindingCapabilities,
    BustReply,
    CapabilityDocument,
    Problem,
    RegisterReply,
    StatusReply,
    cache_key_of,
)
from pybustcall.topology import DaemonAddress
from tests.plain_cache import engine_over

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiohttp import web

    Client = TestClient[web.Request, web.Application]

BUST = "/api/v1/bust"
ENTRIES = "/api/v1/entries"
STATUS = "/api/v1/status"
CAPABILITIES = "/api/v1/capabilities"
BINDINGS = "/api/v1/bindings/capabilities"
JSON = {"Content-Type": "application/json"}


class Gate:
    """A backend whose removals wait, in their thread, until they are let through; or that fail as told."""

    name = "gate"
    blocking = True

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.entered = threading.Event()
        self.open = threading.Event()
        self.removed: list[str] = []

    def check(self, key: str) -> None: ...

    def check_ready(self) -> None: ...

    def variants(self, key: str) -> list[str]:
        return []

    def remove(self, key: str) -> bool:
        if self.failure is not None:
            raise self.failure
        self.entered.set()
        self.open.wait()
        self.removed.append(key)
        return True

    def size_bytes(self) -> int:
        if self.failure is not None:
            raise self.failure
        return 0


def memory() -> Engine:
    indexes = Indexes()
    return engine_over(MemoryBackend(indexes), indexes)


@asynccontextmanager
async def running(
    engine: Engine | None = None, history: FaultHistory | None = None, **settings: Any
) -> AsyncIterator[Client]:
    """Serve the application on a port of its own, with a client that speaks to it."""
    app = create_app(engine or memory(), DaemonSettings(**settings), history=history, version="1.2.3")
    async with TestClient(TestServer(app)) as client:
        yield client


async def bust(client: Client, target: str = "main.css", **more: object) -> dict[str, Any]:
    async with client.post(BUST, json={"target": target, **more}) as response:
        assert response.status == 200
        found: dict[str, Any] = await response.json()
        return found


async def refused(response: aiohttp.ClientResponse, status: int, kind: str = "about:blank") -> Problem:
    """Read a problem, and hold that it is one in form."""
    assert response.status == status
    assert response.content_type == "application/problem+json"
    problem = Problem.model_validate_json(await response.read())
    assert (problem.type, problem.title, problem.status) == (kind, HTTPStatus(status).phrase, status)
    assert problem.detail
    return problem


async def history_of(client: Client) -> list[tuple[int, str]]:
    async with client.get(STATUS) as response:
        reply = StatusReply.model_validate_json(await response.read())
    return [(record.fault_stage, record.binding) for record in reply.fault_history]


async def raw(port: int | None, *lines: str, body: bytes = b"", close: bool = False, head: bool = False) -> bytes:
    """Send bytes as they are, and read to the end of the connection, or of the answer's head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join((*lines, "", "")).encode() + body)
    if close:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n") if head else reader.read(), 5)
    finally:
        writer.close()
        await writer.wait_closed()


# Routes


@pytest.mark.requirement("RES-02")
async def test_a_bust_is_acknowledged_with_the_key_of_its_target() -> None:
    """The answer is one that the wire's model reads, and says what was removed."""
    async with running() as client:
        for name in ("main.css", "main.css.gz"):
            async with client.post(ENTRIES, json={"key": name}) as response:
                assert response.status == 200
        found = await bust(client, binding="go", fault_tolerance=0, strategy="dimensional")
        assert BustReply.model_validate(found).answers("main.css")
        assert found.pop("execution_time_ms") >= 0
        assert len(found.pop("job")) == 32
        assert found.pop("layers") == [{"name": "memory", "ok": True, "removed": 2}]
        assert found == {
            "status": "success",
            "cache_key": cache_key_of("main.css"),
            "delegate": "pybustcall-daemon",
            "fault_stage": 12,
            "removed": 2,
        }


@pytest.mark.requirement("RES-02")
async def test_a_registered_dependent_goes_with_its_subject() -> None:
    """POST /api/v1/entries is what a later bust knows of."""
    async with running() as client:
        async with client.post(ENTRIES, json={"key": "page", "depends_on": ["product:7"]}) as response:
            assert RegisterReply.model_validate_json(await response.read()).cache_key == cache_key_of("page")
        assert (await bust(client, "product:7"))["removed"] == 1
        assert (await bust(client, "product:7"))["removed"] == 0


@pytest.mark.requirement("RES-02")
async def test_the_status_tells_the_process_the_size_and_the_faults() -> None:
    """GET /api/v1/status."""
    async with running() as client:
        async with client.post(ENTRIES, json={"key": "page"}):
            pass
        async with client.post(BUST, json={"target": "page", "strategy": "x", "binding": "lua"}):
            pass
        async with client.get(STATUS) as response:
            reply = StatusReply.model_validate_json(await response.read())
        assert reply.daemon_pid == os.getpid()
        assert {name: (it.status, it.version) for name, it in reply.bindings.items()} == {
            "pybustcall": ("active", "1.2.3")
        }
        assert reply.cache_size == "4B"
        assert [(record.fault_stage, record.binding) for record in reply.fault_history] == [(4, "lua")]


@pytest.mark.requirement("RES-02")
async def test_the_capabilities_say_what_is_served() -> None:
    """GET /api/v1/capabilities: every endpoint it names exists, and access is public without a token."""
    async with running(max_body_bytes=9000) as client:
        async with client.get(CAPABILITIES) as response:
            document = CapabilityDocument.model_validate_json(await response.read())
        assert document.binding == "pybustcall"
        assert document.version == "1.2.3"
        assert document.semverx == "0.experimental.1.experimental.0.experimental"
        assert document.capabilities == (
            "cache.bust", "cache.bust.all", "cache.bust.dry_run", "cache.bust.idempotent", "cache.bust.jobs",
            "cache.bust.namespace", "cache.bust.prefix", "cache.bust.settle", "cache.bust.soft", "cache.bust.tag",
            "cache.bust.verify", "cache.dependencies", "cache.hotswap", "cache.register", "daemon.capabilities",
            "daemon.negotiate", "daemon.status", "events.stream", "semver.resolve",
        )  # fmt: skip
        assert document.supported_strategies == ("direct", "dimensional", "hybrid")
        assert (document.limits.max_target_bytes, document.limits.max_body_bytes) == (8192, 9000)
        assert document.requires.semverx == "*"
        assert set(document.access.values()) == {"public"}
        assert document.access.keys() == set(document.capabilities)
        fields = {name for name in document.capabilities if name.startswith("cache.bust.")} - {"cache.bust.jobs"}
        assert document.endpoints.keys() == set(document.capabilities) - fields
        for path in document.endpoints.values():
            async with client.options(path) as response:
                assert response.status == 405


@pytest.mark.requirement("RES-02")
async def test_the_bindings_route_answers_in_the_form_of_the_existing_daemon() -> None:
    """GET /api/v1/bindings/capabilities is a map of names."""
    async with running() as client, client.get(BINDINGS) as response:
        found = await response.json()
    assert found.keys() == {"pybustcall"}
    assert found["pybustcall"].keys() == {"binding", "capabilities", "semverx", "stage", "p2p_enabled"}
    assert BindingCapabilities.model_validate(found["pybustcall"]).p2p_enabled is False


# Refusals


@pytest.mark.requirement("RES-02")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"target=x",
        b"\xff\xfe",
        b'{"target": "\xff"}',
        b'{"target": NaN}',
        b'{"x": -Infinity}',
        b'{"target": "a", "target": "b"}',
        b'{"x": {"y": 1, "y": 2}}',
        b"[" * 60000,
        b'{"x":' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b'{"target": "a"} {}',
    ],
)
async def test_what_is_not_json_is_a_400(body: bytes) -> None:
    """Broken text, broken UTF-8, a field twice, NaN and endless nesting are refused as malformed."""
    async with running() as client:
        async with client.post(BUST, data=body, headers=JSON) as response:
            assert (await refused(response, 400)).field is None
        assert await history_of(client) == [(4, "unknown")]


@pytest.mark.requirement("RES-02")
@pytest.mark.parametrize(
    ("document", "field"),
    [
        ([], None),
        ("private", None),
        (None, None),
        ({}, "target"),
        ({"target": 7}, "target"),
        ({"target": ""}, "target"),
        ({"target": "private\n"}, "target"),
        ({"target": "private\x85"}, "target"),
        ({"target": "private\ud800"}, "target"),
        ({"target": "private" * 2000}, "target"),
        ({"target": "é" * 4097}, "target"),
        ({"target": "private", "strategy": 1}, "strategy"),
        ({"target": "private", "strategy": ""}, "strategy"),
        ({"target": "private", "strategy": "private"}, "strategy"),
        ({"target": "private", "binding": []}, "binding"),
        ({"target": "private", "fault_tolerance": 13}, "fault_tolerance"),
        ({"target": "private", "fault_tolerance": -1}, "fault_tolerance"),
        ({"target": "private", "fault_tolerance": True}, "fault_tolerance"),
        ({"target": "private", "fault_tolerance": 6.0}, "fault_tolerance"),
        ({"target": "private", "fault_tolerance": "6"}, "fault_tolerance"),
    ],
)
async def test_a_bad_field_is_a_422_that_names_it(document: object, field: str | None) -> None:
    """The problem names the field, and repeats nothing of what was sent."""
    async with running() as client, client.post(BUST, data=json.dumps(document), headers=JSON) as response:
        problem = await refused(response, 422)
    assert problem.field == field
    assert "private" not in problem.detail
    assert (problem.supported is not None) is (document == {"target": "private", "strategy": "private"})


async def test_an_unknown_strategy_is_answered_with_those_that_there_are() -> None:
    """The problem lists what is supported."""
    async with running() as client, client.post(BUST, json={"target": "a", "strategy": "x"}) as response:
        assert (await refused(response, 422)).supported == ("direct", "dimensional", "hybrid")


@pytest.mark.parametrize(
    ("document", "field"),
    [({}, "key"), ({"key": "a", "depends_on": ["b", 7]}, "depends_on.1"), ({"key": "../a"}, "key")],
)
async def test_a_bad_registration_is_a_422_that_names_the_field(tmp_path: Path, document: object, field: str) -> None:
    """What cannot be an entry is not registered."""
    async with (
        running(engine_over(FilesBackend(tmp_path))) as client,
        client.post(ENTRIES, json=document) as response,
    ):
        assert (await refused(response, 422)).field == field


async def test_a_path_out_of_the_root_is_a_422_and_a_fault(tmp_path: Path) -> None:
    """The refusal names the field and the reason, never the path."""
    async with running(engine_over(FilesBackend(tmp_path))) as client:
        async with client.post(BUST, json={"target": "../secret", "binding": "go"}) as response:
            problem = await refused(response, 422)
        assert problem.field == "target"
        assert problem.detail == 'target has a segment ".."; name the file where it is'
        assert await history_of(client) == [(4, "go")]


@pytest.mark.parametrize("binding", ["a b", "x" * 65, "\x1b[2J", ""])
async def test_a_binding_that_cannot_be_shown_is_remembered_as_unknown(binding: str) -> None:
    """Nobody writes into the status what it should not show."""
    async with running() as client:
        async with client.post(BUST, json={"target": "", "binding": binding}) as response:
            await refused(response, 422)
        assert await history_of(client) == [(4, "unknown")]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
async def test_anything_but_json_is_a_415(kind: str) -> None:
    """A form of another origin cannot send JSON unasked, so nothing else is read."""
    async with (
        running() as client,
        client.post(BUST, data=b'{"target": "a"}', headers={"Content-Type": kind}) as response,
    ):
        await refused(response, 415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json;x=y"])
async def test_parameters_of_the_content_type_do_no_harm(kind: str) -> None:
    """JSON is JSON, whatever is said beside it."""
    async with (
        running() as client,
        client.post(BUST, data=b'{"target": "a"}', headers={"Content-Type": kind}) as response,
    ):
        assert response.status == 200


async def test_a_body_over_the_limit_is_a_413() -> None:
    """Announced or not, more than the limit is not read."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async with running(max_body_bytes=1000) as client:
        async with client.post(BUST, data=b" " * 1001, headers=JSON) as response:
            await refused(response, 413)
        async with client.post(BUST, data=pieces(), headers=JSON) as response:
            assert "1000 bytes" in (await refused(response, 413)).detail
        assert await history_of(client) == [(4, "unknown")] * 2


async def test_an_unknown_route_is_a_404_and_a_wrong_method_a_405_with_what_it_takes() -> None:
    """Both are faults of stage 3."""
    async with running() as client:
        async with client.get("/") as response:
            await refused(response, 404)
        async with client.put(BUST, json={}) as response:
            await refused(response, 405)
            assert response.headers["Allow"] == "POST"
        assert await history_of(client) == [(3, "unknown")] * 2


async def test_an_expectation_that_is_not_known_does_not_reach_a_bust() -> None:
    """It is refused, with a problem."""
    engine = memory()
    engine.register("a")
    async with running(engine) as client:
        async with client.post(BUST, json={"target": "a"}, headers={"Expect": "tea"}) as response:
            assert "tea" not in (await refused(response, 417)).detail
        assert (await bust(client, "a"))["removed"] == 1


async def test_a_full_registry_takes_no_new_entry() -> None:
    """It is a 507, remembered as a fault of the daemon's; what is registered already can still be replaced."""
    async with running(max_entries=1) as client:
        for key, status in (("a", 200), ("b", 507), ("a", 200)):
            async with client.post(ENTRIES, json={"key": key, "depends_on": ["x"]}) as response:
                if status == 200:
                    assert response.status == 200
                else:
                    assert "registry is full" in (await refused(response, status)).detail
                    assert "Retry-After" not in response.headers
        assert await history_of(client) == [(7, "unknown")]


@pytest.mark.parametrize(
    ("document", "detail"),
    [
        ({"target": "a\n"}, "target has the control character U+000A at character 1"),
        ({"strategy": "direct"}, "target: Field required"),
    ],
)
async def test_a_detail_names_its_field_once(document: object, detail: str) -> None:
    """Whether the reason begins with the field's name or not."""
    async with running() as client, client.post(BUST, json=document) as response:
        assert (await refused(response, 422)).detail == detail


async def test_other_exceptions_of_the_web_framework_become_problems() -> None:
    """Whatever status aiohttp raises, it is told in our form."""
    refusal = reading.refusal_of(aiohttp.web.HTTPConflict(), 1)
    assert refusal.response().status == 409
    assert refusal.response().content_type == "application/problem+json"


async def test_a_failing_backend_is_a_500_that_tells_what_was_applied() -> None:
    """The problem and the history tell of it, and the status still answers."""
    async with running(engine_over(Gate(BackendFailure("the disk is gone")))) as client:
        async with client.post(BUST, json={"target": "private", "binding": "go"}) as response:
            problem = await refused(response, 500)
        assert problem.detail == "the bust was not applied in full: 0 removed, 1 not removed: the disk is gone"
        async with client.get(STATUS) as response:
            reply = StatusReply.model_validate_json(await response.read())
        assert reply.cache_size == "unknown"
        assert [record.fault_stage for record in reply.fault_history] == [7, 7]


async def test_an_unexpected_error_is_logged_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback stays in the log."""
    async with running(engine_over(Gate(ZeroDivisionError("inner secret")))) as client:
        with caplog.at_level(logging.ERROR):
            async with client.post(BUST, json={"target": "a"}) as response:
                problem = await refused(response, 500)
    assert "secret" not in problem.detail
    assert "ZeroDivisionError: inner secret" in caplog.text


# Admission


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer", "Basic tok-en", "Bearer tok-en x", "tok-en", "Bearer é"]
)
async def test_without_the_token_there_is_a_401(given: str | None) -> None:
    """Every route but the capabilities wants it, also those that there are not."""
    headers = {} if given is None else {"Authorization": given}
    async with running(token="tok-en") as client:
        for method, path in (("POST", BUST), ("POST", ENTRIES), ("GET", STATUS), ("GET", "/nothing")):
            async with client.request(method, path, headers=headers) as response:
                problem = await refused(response, 401)
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert "tok-en" not in problem.detail
        for path in (CAPABILITIES, BINDINGS):
            async with client.get(path, headers=headers) as response:
                assert response.status == 200


async def test_with_the_token_everything_is_served_and_the_access_map_says_so() -> None:
    """The scheme's name is case-insensitive, and what needs the token is called protected."""
    history = FaultHistory()
    async with running(token="tok-en", history=history) as client:
        async with client.post(BUST, json={"target": "a"}, headers={"Authorization": "bearer tok-en"}) as response:
            assert response.status == 200
        async with client.get(CAPABILITIES) as response:
            access = CapabilityDocument.model_validate_json(await response.read()).access
        async with client.get(STATUS):
            pass
    assert access.pop("daemon.capabilities") == "public"
    assert set(access.values()) == {"protected"}
    assert [record.fault_stage for record in history.records()] == [3]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("localhost.", 200),
        ("127.0.0.1:8989", 200),
        ("[::1]:8989", 200),
        ("10.0.0.7", 200),
        ("Cache.Example:443", 200),
        ("other.example", 421),
        ("cache.example.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("[evil]", 421),
        ("", 421),
    ],
)
async def test_only_known_hosts_are_answered(host: str, status: int) -> None:
    """A name that somebody else may point here is refused; an IP address cannot be pointed."""
    async with running(allowed_hosts=("cache.example",)) as client:
        found = await raw(client.port, f"GET {CAPABILITIES} HTTP/1.1", f"Host: {host}", "Connection: close")
    assert found.startswith(f"HTTP/1.1 {status} ".encode())


async def test_a_missing_host_is_refused() -> None:
    """Over TCP nobody gets in without saying whom they mean."""
    async with running() as client:
        assert b" 421 " in await raw(client.port, f"GET {CAPABILITIES} HTTP/1.0")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost"}, 403),
        ({"Origin": "http://localhost:80"}, 200),
        ({"Origin": "HTTPS://LocalHost:80"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"}, 403),
    ],
)
async def test_pages_of_other_origins_are_refused(headers: dict[str, str], status: int) -> None:
    """A browser says where a page is from, and no page but our own host's may bust."""
    async with (
        running() as client,
        client.post(BUST, json={"target": "a"}, headers={"Host": "localhost:80", **headers}) as response,
    ):
        assert response.status == status
        assert not any(name.lower().startswith("access-control") for name in response.headers)


# Lies on the wire


async def test_a_body_that_never_arrives_is_a_408() -> None:
    """Announcing more than is sent holds nothing up for long."""
    async with running(read_timeout=0.05) as client:
        found = await raw(
            client.port, f"POST {BUST} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
            "Content-Length: 100", body=b'{"target": "a"}', head=True,
        )  # fmt: skip
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in found


async def test_a_body_cut_off_is_no_bust(caplog: pytest.LogCaptureFixture) -> None:
    """Hanging up in the middle removes nothing and logs no error."""
    engine = memory()
    engine.register("a")
    async with running(engine) as client:
        await raw(
            client.port, f"POST {BUST} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
            "Content-Length: 100", body=b'{"target": "a"}', close=True,
        )  # fmt: skip
        assert (await bust(client, "a"))["removed"] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_more_than_was_announced_is_no_request() -> None:
    """What follows a body is not HTTP, and whoever sends that is refused and parted from."""
    async with running() as client:
        found = await raw(
            client.port, f"POST {BUST} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
            "Content-Length: 15", body=b'{"target": "a"}, "strategy": "x"}\r\n\r\n',
        )  # fmt: skip
    assert b" 400 " in found.splitlines()[0]
    assert b" 200 " not in found


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_that_is_not_encoded_as_announced_is_a_400(encoding: str) -> None:
    """A broken encoding is the sender's mistake."""
    async with (
        running() as client,
        client.post(BUST, data=b'{"target": "a"}' * 9, headers={**JSON, "Content-Encoding": encoding}) as response,
    ):
        await refused(response, 400)


async def test_two_hosts_or_two_tokens_are_refused() -> None:
    """What is said twice is said by nobody."""
    async with running(token="tok-en") as client:
        found = await raw(
            client.port, f"GET {STATUS} HTTP/1.1", "Host: localhost", "Authorization: Bearer tok-en",
            "Authorization: Bearer tok-en", "Connection: close",
        )  # fmt: skip
        assert found.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
        found = await raw(client.port, f"GET {CAPABILITIES} HTTP/1.1", "Host: localhost", "Host: evil.example")
        assert found.startswith((b"HTTP/1.1 421 ", b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))


# Settings


@pytest.mark.parametrize(
    ("settings", "setting", "reason"),
    [
        ({"host": "0.0.0.0"}, "token", "set one .BUSTCALL_TOKEN., or listen on 127.0.0.1"),
        ({"host": "::"}, "token", "lets other machines in"),
        ({"host": ""}, "token", "lets other machines in"),
        ({"host": "cache.example"}, "token", "lets other machines in"),
        ({"port": -1}, "port", "0 to 65535"),
        ({"port": 65536}, "port", "0 to 65535"),
        ({"port": True}, "port", "0 to 65535"),
        ({"token": ""}, "token", "visible ASCII"),
        ({"token": "se cret"}, "token", "visible ASCII"),
        ({"token": "sécret"}, "token", "visible ASCII"),
        ({"allowed_hosts": ("http://x",)}, "allowed_hosts", "names only"),
        ({"allowed_hosts": ("x:80",)}, "allowed_hosts", "names only"),
        ({"max_body_bytes": 0}, "max_body_bytes", "1 byte or more"),
        ({"read_timeout": 0.0}, "read_timeout", "more than 0 seconds"),
        ({"max_connections": 0}, "max_connections", "1 or more"),
        ({"max_entries": -1}, "max_entries", "0 or more"),
        ({"drain": -1.0}, "drain", "0 seconds or more"),
        ({"drain": float("nan")}, "drain", "0 seconds or more"),
        ({"state": "f", "registry": "f"}, "registry", "cannot both be kept in 'f'; give each a file of its own"),
        ({"state": "f", "registry": Path("f").absolute()}, "registry", "cannot both be kept"),
        ({"state": Path("a/../f"), "registry": "./f"}, "registry", "cannot both be kept"),
        ({"state": "f", "journal": "f-wal"}, "journal", "cannot both be kept"),
        ({"state": "f-journal", "registry": "f"}, "registry", "cannot both be kept"),
        ({"socket": "x" * 108}, "socket", "longer than 107 bytes"),
    ],
)
def test_settings_that_cannot_work_are_told_by_name(settings: dict[str, Any], setting: str, reason: str) -> None:
    """The error names the setting and what to do, and never shows the token."""
    with pytest.raises(ConfigurationError, match=reason) as caught:
        check_settings(DaemonSettings(**settings))
    assert caught.value.setting == setting
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host": "LOCALHOST"},
        {"host": "127.8.8.8"},
        {"host": "::1"},
        {"host": "0.0.0.0", "token": "x"},
        {"host": "0.0.0.0", "socket": "/run/bust.sock"},
        {"allowed_hosts": ("a.example.", "b")},
        {"drain": 0.0},
        {"max_connections": 1, "max_entries": 0},
        {"state": "f", "registry": "g"},
    ],
)
def test_settings_that_work_are_accepted(settings: dict[str, Any]) -> None:
    """Loopback needs no token, nor does a Unix socket."""
    check_settings(DaemonSettings(**settings))


def test_a_link_to_the_same_file_is_the_same_file(tmp_path: Path) -> None:
    """Though it has another name."""
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ConfigurationError, match="cannot both be kept"):
        check_settings(DaemonSettings(state=tmp_path / "file", registry=tmp_path / "link"))


def test_the_token_is_not_in_the_repr() -> None:
    """Settings can be logged."""
    assert "secret" not in repr(DaemonSettings(token="secret"))


# Serving


@asynccontextmanager
async def serving(engine: Engine | None = None, **settings: Any) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Run `serve` as a task; afterwards it has ended, and left no task behind."""
    before = asyncio.all_tasks()
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(engine or memory(), DaemonSettings(**settings), ready=told.set_result))
    waited: set[asyncio.Future[Any]] = {task, told}
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield told.result(), task
    finally:
        task.cancel()
        await asyncio.wait({task})
        left = asyncio.all_tasks() - before - {task}
    assert not left


async def get(url: str, **more: Any) -> tuple[int, bytes]:
    """Ask a daemon at its URL, over TCP or a Unix socket."""
    address = DaemonAddress.parse(url)
    connector = aiohttp.UnixConnector(address.socket_path) if address.socket_path else aiohttp.TCPConnector()
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(address.base + CAPABILITIES, **more) as response,
    ):
        return response.status, await response.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_it_tells_the_real_port_and_serves_there(host: str) -> None:
    """Port 0 lets the system choose, and the URL says what it chose."""
    async with serving(host=host, port=0) as (url, _):
        assert (await get(url))[0] == 200
    with pytest.raises(aiohttp.ClientConnectorError):
        await get(url)


async def test_it_serves_on_every_address_of_a_name() -> None:
    """With a port of its own choosing, each address of the name is bound, as far as the machine has it."""
    port = free_port()
    async with serving(host="localhost", port=port) as (url, _):
        assert url == f"http://localhost:{port}"
        assert (await get(url))[0] == 200


async def test_it_serves_on_ipv6() -> None:
    """An IPv6 address is told in brackets."""
    try:
        async with serving(host="::1", port=0) as (url, _):
            assert url.startswith("http://[::1]:")
            assert (await get(url))[0] == 200
    except ConfigurationError:
        pytest.skip("this machine has no ::1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_and_the_handlers_are_restored(number: signal.Signals) -> None:
    """Afterwards both signals are handled as they were."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with serving(port=0) as (_, task):
        os.kill(os.getpid(), number)
        await asyncio.wait_for(task, 5)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


async def test_requests_under_way_finish_while_new_ones_are_turned_away() -> None:
    """The drain: the old request gets its answer, a kept connection a 503, a new one nobody."""
    gate = Gate()
    async with serving(engine_over(gate), port=0) as (url, task):
        async with aiohttp.ClientSession() as kept, aiohttp.ClientSession() as session:
            async with kept.get(url + CAPABILITIES) as response:
                await response.read()
            waiting = asyncio.create_task(session.post(url + BUST, json={"target": "a"}))
            await asyncio.to_thread(gate.entered.wait)
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                async with kept.get(url + CAPABILITIES) as response:
                    if response.status == 503:
                        await refused(response, 503)
                        break
            assert (response.headers["Retry-After"], response.headers["Connection"]) == ("1", "close")
            assert response.headers["Bustcall-Capabilities"].startswith("sha256:")
            with pytest.raises(aiohttp.ClientConnectorError):
                await get(url)
            assert not task.done()
            gate.open.set()
            async with await waiting as response:
                assert response.status == 200
        await asyncio.wait_for(task, 5)
    assert gate.removed == ["a"]


@pytest.mark.parametrize("signals", [1, 2])
async def test_the_drain_is_bounded_and_a_second_signal_ends_it(signals: int) -> None:
    """A request that does not finish in time is broken off."""
    gate = Gate()
    async with (
        serving(engine_over(gate), port=0, drain=0.05 if signals == 1 else 600.0) as (url, task),
        aiohttp.ClientSession() as session,
    ):
        waiting = asyncio.create_task(session.post(url + BUST, json={"target": "a"}))
        await asyncio.to_thread(gate.entered.wait)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
        await asyncio.wait_for(task, 5)
        gate.open.set()
        with pytest.raises(aiohttp.ClientConnectionError):
            await waiting


async def test_cancelling_it_twice_still_cleans_up(tmp_path: Path) -> None:
    """A second cancellation, as anyio delivers it, does not break off the cleaning."""
    path = tmp_path / "bust.sock"
    gate = Gate()
    async with (
        serving(engine_over(gate), socket=path) as (url, task),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
    ):
        waiting = asyncio.create_task(session.post("http://localhost" + BUST, json={"target": "a"}))
        await asyncio.to_thread(gate.entered.wait)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not path.exists()
        gate.open.set()
        with pytest.raises(aiohttp.ClientConnectionError):
            await waiting
    assert url == f"unix://{path}"


def test_it_works_in_an_anyio_task_group() -> None:
    """Cancelled by a scope, it ends and leaves nothing."""

    async def main() -> int:
        async with anyio.create_task_group() as group:
            told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            group.start_soon(lambda: serve(memory(), DaemonSettings(port=0), ready=told.set_result))
            status, _ = await get(await told)
            group.cancel_scope.cancel()
        return status

    assert anyio.run(main) == 200


@pytest.mark.parametrize("unix", [False, True])
def test_it_works_on_uvloop(tmp_path: Path, unix: bool) -> None:
    """TCP, a Unix socket and signals, on the other event loop."""

    async def main() -> int:
        more: dict[str, Any] = {"socket": tmp_path / "s"} if unix else {"port": 0}
        async with serving(**more) as (url, task):
            status, _ = await get(url)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(task, 5)
        return status

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == 200
    assert not (tmp_path / "s").exists()


async def test_it_serves_in_another_thread_without_signals() -> None:
    """Only the main thread hears signals; elsewhere it is ended by cancellation."""

    async def main() -> int:
        async with serving(port=0) as (url, _):
            return (await get(url))[0]

    assert await asyncio.to_thread(asyncio.run, main()) == 200


async def test_a_process_drains_at_sigterm_and_exits_cleanly() -> None:
    """The whole life, in a process of its own."""
    code = (
        "import asyncio\n"
        "from pybustcall.daemon import *\n"
        "indexes = Indexes()\n"
        "layer = Layer(name='memory', number=0, backend=MemoryBackend(indexes))\n"
        "asyncio.run(serve(Engine([layer], indexes), DaemonSettings(port=0),\n"
        "                  ready=lambda url: print(url, flush=True)))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    assert (await get(url))[0] == 200
    process.terminate()
    assert await asyncio.wait_for(process.communicate(), 10) == (b"", b"")
    assert process.returncode == 0


async def test_an_error_of_the_callback_arrives_after_the_cleaning(tmp_path: Path) -> None:
    """Whoever is told that it is ready may fail, and nothing stays behind."""
    path = tmp_path / "s"

    def fail(url: str) -> None:
        raise LookupError(url)

    with pytest.raises(LookupError, match="unix://"):
        await serve(memory(), DaemonSettings(socket=path), ready=fail)
    assert not path.exists()


async def test_nobody_need_be_told_that_it_is_ready(tmp_path: Path) -> None:
    """It serves all the same."""
    path = str(tmp_path / "s")
    task = asyncio.create_task(serve(memory(), DaemonSettings(socket=path)))
    async with asyncio.timeout(5):
        while not os.listdir(tmp_path):
            await asyncio.sleep(0)
    assert (await get(f"unix://{path}"))[0] == 200
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cache_that_is_not_ready_is_told_at_the_start(tmp_path: Path) -> None:
    """Without its root it does not begin to listen."""
    root = tmp_path / "root"
    root.mkdir()
    engine = engine_over(FilesBackend(root))
    root.rmdir()
    with pytest.raises(BackendFailure, match="root directory"):
        await serve(engine, DaemonSettings(port=0))


# Listening


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


async def refused_to_listen(**settings: Any) -> ConfigurationError:
    def unexpected(url: str) -> None:
        raise AssertionError(url)

    with pytest.raises(ConfigurationError) as caught:
        await serve(memory(), DaemonSettings(**settings), ready=unexpected)
    return caught.value


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_port_in_use_is_told_with_what_to_do(host: str) -> None:
    """The error names the port, the host and the option; nothing stays bound."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        error = await refused_to_listen(host=host, port=port)
    assert str(error) == f"port {port} on {host} is in use by another process; choose another with --port"
    assert error.setting == "port"


def answer_with(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every name have these addresses."""

    async def getaddrinfo(host: str, port: int, **more: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_one_address_in_use_frees_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that answers on half of its name is none."""
    port = free_port()
    answer_with(monkeypatch, "127.0.0.1", "127.0.0.2")
    with socket.create_server(("127.0.0.2", port)):
        assert "is in use" in str(await refused_to_listen(host="localhost", port=port))
    socket.create_server(("127.0.0.1", port)).close()


async def test_an_address_family_that_is_not_there_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as another address of the name serves."""
    port = free_port()
    answer_with(monkeypatch, "192.0.2.7", "127.0.0.1")
    async with serving(host="localhost", port=port) as (url, _):
        monkeypatch.undo()
        assert (await get(url.replace("localhost", "127.0.0.1")))[0] == 200


@pytest.mark.parametrize("host", ["192.0.2.7", "no-such-host.invalid", "x" * 70 + ".example", "a\0b"])
async def test_a_host_that_is_not_here_is_told(host: str) -> None:
    """An address of another machine, and a name without one, are mistakes in the host."""
    error = await refused_to_listen(host=host, port=0, token="x")
    assert error.setting == "host"
    assert "--host" in str(error)


@pytest.mark.parametrize(
    ("number", "setting", "reason"),
    [(errno.EACCES, "port", "choose one above 1023"), (errno.EIO, "host", "Input/output error")],
)
def test_other_reasons_not_to_bind_are_told(number: int, setting: str, reason: str) -> None:
    """Each error of the system has a sentence."""
    error = serving_module._bind_error(OSError(number, os.strerror(number)), "127.0.0.1", 80)
    assert error.setting == setting
    assert reason in str(error)


async def test_a_unix_socket_is_private_and_answers_any_host(tmp_path: Path) -> None:
    """Mode 0600 whatever the umask, any Host, and the file is gone at the end."""
    path = tmp_path / "bust.sock"
    mask = os.umask(0)
    try:
        async with serving(socket=str(path)) as (url, _):
            assert url == f"unix://{path}"
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
            assert (await get(url, headers={"Host": "evil.example"}))[0] == 200
            assert (await get(url, headers={"Host": ""}))[0] == 200
    finally:
        os.umask(mask)
    assert not path.exists()


async def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    """A file left by a killed daemon does not keep the next from starting."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    async with serving(socket=path) as (url, _):
        assert (await get(url))[0] == 200


async def test_a_living_daemon_is_not_pushed_aside(tmp_path: Path) -> None:
    """A socket that somebody listens on is in use."""
    path = tmp_path / "s"
    async with serving(socket=path) as (url, _):
        error = await refused_to_listen(socket=path)
        assert "is in use by another process" in str(error)
        assert error.setting == "socket"
        assert (await get(url))[0] == 200


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_datagram(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "reason"), [(make_file, "is a file of another kind, which is not removed"), (make_datagram, "")]
)
async def test_a_file_of_another_kind_is_never_removed(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    """What is not ours is left; a socket of another kind that nobody listens on is a stale one."""
    path = tmp_path / "s"
    make(path)
    if reason:
        assert reason in str(await refused_to_listen(socket=path))
        assert path.read_text() == "precious"
    else:
        async with serving(socket=path) as (url, _):
            assert (await get(url))[0] == 200


async def test_a_living_socket_of_another_kind_is_left(tmp_path: Path) -> None:
    """Somebody receives datagrams there."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        assert "is in use by another process" in str(await refused_to_listen(socket=path))
    assert path.is_socket()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/s", "directory that does not exist"),
        ("file/s", "directory that does not exist"),
        ("x" * 107, "longer than 107 bytes"),
        ("loop/s", "cannot be listened on: Too many levels"),
    ],
)
async def test_a_socket_that_cannot_be_there_is_told(tmp_path: Path, name: str, reason: str) -> None:
    """The error names the path and the reason."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    error = await refused_to_listen(socket=tmp_path / name)
    assert reason in str(error)
    assert error.setting == "socket"


async def test_the_socket_of_a_successor_is_left_at_the_end(tmp_path: Path) -> None:
    """Only the file that we made is removed."""
    path = tmp_path / "s"
    async with serving(socket=path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
    assert path.is_socket()


async def test_a_socket_that_goes_meanwhile_is_no_error(tmp_path: Path) -> None:
    """Somebody else may have cleaned up."""
    path = tmp_path / "s"
    async with serving(socket=path):
        path.unlink()
    assert not path.exists()


def test_json_with_a_number_too_long_to_read_is_refused() -> None:
    """Python's own limit on digits is a refusal, not a failure."""
    with pytest.raises(Refusal, match="number that cannot be read"):
        reading.parse_json(json.dumps({"x": 1})[:-2].encode() + b"1" * 5000 + b"}")
