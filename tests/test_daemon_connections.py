"""Connections of the listening server: their number, the time of a head, and what is no HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pybustcall.daemon import BackendFailure
from pybustcall.daemon import app as app_module
from pybustcall.daemon.connections import _QUIET, Door
from pybustcall.models import Problem, StatusReply
from tests.conftest import PATIENCE, eventually
from tests.plain_cache import engine_over
from tests.test_daemon_app import BUST, CAPABILITIES, STATUS, Gate, get, raw, serving

HOST = "Host: localhost"
TOKEN = "s3cret-t0ken"
BEARER = f"Authorization: Bearer {TOKEN}"


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def problem_of(answer: bytes) -> Problem:
    """Read the one answer, and hold that it is a problem after which the connection ends."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/problem+json\r\n" in head + b"\r\n"
    problem = Problem.model_validate_json(body)
    assert f" {problem.status} ".encode() in head.splitlines()[0]
    return problem


async def history_at(url: str) -> list[tuple[int, str]]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
        session.get(url + STATUS) as response,
    ):
        reply = StatusReply.model_validate_json(await response.read())
    return [(record.fault_stage, record.message) for record in reply.fault_history]


NOT_HTTP = {
    "a space before a colon": [f"GET {STATUS} HTTP/1.1", HOST, f"Authorization : Bearer {TOKEN}"],
    "two hosts": [f"GET {STATUS} HTTP/1.1", HOST, f"Host: {TOKEN}"],
    "two lengths": [f"POST {BUST} HTTP/1.1", HOST, BEARER, "Content-Length: 3", "Transfer-Encoding: chunked"],
    "no method": [f"{TOKEN}@ / HTTP/1.1", HOST],
    "a long line": [f"GET /{TOKEN * 2000} HTTP/1.1", HOST],
    "no HTTP": [TOKEN],
}


@pytest.mark.parametrize("lines", NOT_HTTP.values(), ids=NOT_HTTP)
async def test_what_is_not_http_is_a_problem_that_quotes_nothing(
    lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The answer, the history and one line of the log tell of it, and none of them what was sent."""
    with caplog.at_level(logging.DEBUG):
        async with serving(port=0, token=TOKEN) as (url, _):
            answer = await raw(port_of(url), *lines)
            found = await history_at(url)
    problem = problem_of(answer)
    assert (problem.status, problem.detail) == (400, "the request is not HTTP as this daemon reads it")
    assert found == [(4, problem.detail)]
    assert TOKEN.encode() not in answer
    told = [record for record in caplog.records if record.name != "asyncio"]
    assert [(record.name, record.exc_info) for record in told] == [("pybustcall.daemon", None)]
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("path", [STATUS, "/nothing"])
async def test_an_unknown_expectation_is_a_problem_on_every_route(path: str) -> None:
    """Also where there is no route; what was expected is not repeated."""
    async with serving(port=0, token=TOKEN) as (url, _):
        answer = await raw(
            port_of(url), f"GET {path} HTTP/1.1", HOST, BEARER, "Expect: strange-tea", "Connection: close"
        )
        assert await history_at(url) == [(4, "the only expectation that this daemon knows is 100-continue")]
    assert problem_of(answer).status == 417
    assert b"tea" not in answer


async def test_nobody_is_asked_for_a_body_before_they_are_let_in() -> None:
    """With `Expect: 100-continue` a stranger gets the refusal at once, and no 100."""
    async with serving(port=0, token=TOKEN) as (url, _):
        answer = await raw(
            port_of(url), f"POST {BUST} HTTP/1.1", HOST, "Expect: 100-continue", "Content-Length: 15", head=True
        )
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_a_body_is_asked_for_once_its_request_is_let_in() -> None:
    """The 100 comes first, then the answer to the body."""
    async with serving(port=0, token=TOKEN) as (url, _), aiohttp.ClientSession() as session:
        async with session.post(
            url + BUST, json={"target": "a"}, expect100=True, headers={"Authorization": f"Bearer {TOKEN}"}
        ) as response:
            assert response.status == 200


async def test_an_error_outside_of_the_routes_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong is answered in our own form, and its text is not logged."""

    async def fail(*_: object) -> web.StreamResponse:
        raise ZeroDivisionError("inner secret")

    monkeypatch.setattr(app_module.Daemon, "guard", fail)
    with caplog.at_level(logging.INFO):
        async with serving(port=0) as (url, _):
            answer = await raw(port_of(url), f"GET {STATUS} HTTP/1.1", HOST)
    assert problem_of(answer).status == 500
    assert b"secret" not in answer
    told = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert told == [(logging.ERROR, "a request failed before its answer: ZeroDivisionError")]


async def test_an_error_after_the_answer_has_begun_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second answer is written into the first."""

    async def begin_and_fail(_self: object, request: web.Request, _handler: object) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        raise ZeroDivisionError

    monkeypatch.setattr(app_module.Daemon, "guard", begin_and_fail)
    async with serving(port=0) as (url, _):
        answer = await raw(port_of(url), f"GET {STATUS} HTTP/1.1", HOST)
    assert answer.count(b"HTTP/1.") == 1


async def test_a_client_that_left_is_neither_answered_nor_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken connection is no error of the daemon's."""

    async def leave(*_: object, **__: object) -> bytes:
        raise ConnectionResetError("gone")

    monkeypatch.setattr(app_module, "read_body", leave)
    async with serving(port=0) as (url, _):
        body = json.dumps({"target": "a"}).encode()
        answer = await raw(
            port_of(url), f"POST {BUST} HTTP/1.1", HOST, "Content-Type: application/json",
            f"Content-Length: {len(body)}", body=body,
        )  # fmt: skip
    assert answer == b""
    assert not caplog.records


async def test_an_error_while_answering_is_logged_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What aiohttp would log with a traceback is one line."""

    async def fail(*_: object) -> None:
        raise BackendFailure("inner secret")

    monkeypatch.setattr(app_module, "_say_expectation", fail)
    async with serving(port=0) as (url, _):
        assert await raw(port_of(url), f"GET {STATUS} HTTP/1.1", HOST) == b""
    assert [record.getMessage() for record in caplog.records] == ["a connection was closed: BackendFailure"]


# The time of a head


@pytest.mark.parametrize("beginning", [b"", b"GET /api/v1/sta", b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n"])
async def test_a_head_that_does_not_arrive_in_time_ends_the_connection(beginning: bytes) -> None:
    """Without an answer: there is nothing to answer."""
    async with serving(port=0, read_timeout=0.05) as (url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(beginning)
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        writer.close()


async def test_a_second_head_has_its_time_too() -> None:
    """On a kept connection it runs from the head's first byte."""
    async with serving(port=0, read_timeout=0.05) as (url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(f"GET {CAPABILITIES} HTTP/1.1\r\n{HOST}\r\n\r\n".encode())
        assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"GET /api")
        assert b"HTTP" not in await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()


async def test_a_kept_connection_may_idle_longer_than_a_head_may_take() -> None:
    """Nothing has begun to arrive, so nothing is late."""
    async with serving(port=0, read_timeout=0.05) as (url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        ask = f"GET {CAPABILITIES} HTTP/1.1\r\n{HOST}\r\n\r\n".encode()
        writer.write(ask)
        await reader.readuntil(b"}}")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 0.25)
        writer.write(ask)
        assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_an_answer_may_take_longer_than_a_head() -> None:
    """The time is that of the head alone."""
    gate = Gate()
    async with (
        serving(engine_over(gate), port=0, read_timeout=0.05) as (url, _),
        aiohttp.ClientSession() as session,
    ):
        waiting = asyncio.create_task(session.post(url + BUST, json={"target": "a"}))
        await asyncio.wait({waiting}, timeout=0.25)
        assert not waiting.done()
        gate.open.set()
        async with await waiting as response:
            assert response.status == 200


# The number of connections


async def test_one_connection_too_many_is_closed_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Those that there are go on, and there is room again when one of them leaves."""
    async with serving(port=0, max_connections=2) as (url, _):
        streams = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(4)]
        for reader, _writer in streams[2:]:
            assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        streams[0][1].write(f"GET {CAPABILITIES} HTTP/1.1\r\n{HOST}\r\n\r\n".encode())
        assert await streams[0][0].read(12) == b"HTTP/1.1 200"
        for _reader, writer in streams:
            writer.close()

        async def served() -> bool:
            try:
                return (await get(url))[0] == 200
            except aiohttp.ClientConnectionError:
                return False

        async with asyncio.timeout(PATIENCE):
            while not await served():
                pass
    told = [record.getMessage() for record in caplog.records]
    assert told == ["more than 2 connections at once; further ones are closed"]


async def test_connections_too_many_are_told_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A flood fills no log, and one that lasts is not forgotten."""
    now = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    unused: Any = None
    door = Door(server=unused, most=1, patience=1.0, refuse=unused)
    assert door.enter()
    lines = []
    for now in (0.0, _QUIET / 2, _QUIET, _QUIET * 1.5, _QUIET * 2):  # noqa: B007 - the clock reads it
        assert not door.enter()
        lines.append(len(caplog.records))
    assert lines == [1, 1, 2, 2, 3]
    door.leave()
    assert door.enter()


async def test_connections_that_idle_do_not_hold_up_the_end() -> None:
    """Open connections, with a head half sent or without one, are closed by a signal at once."""
    async with serving(port=0) as (url, task):
        streams = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(3)]
        streams[0][1].write(b"GET /")
        assert (await get(url))[0] == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 5)
        for reader, writer in streams:
            await eventually(reader.at_eof)
            writer.close()
