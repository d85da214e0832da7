"""Connections to memcached: each call gets its own answers, whatever is cut off, refused or not understood."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop

from pybustcall.errors import ConfigurationError
from pybustcall.memcached_connection import LARGEST, MemcachedServer, MemcachedUnavailable, shown_url
from pybustcall.memcached_layout import Command
from tests.conftest import eventually
from tests.engines import free_port
from tests.memcached_process import MemcachedProcess, shared_memcached

NOTHING = Command(b"mn")


@pytest.fixture
def engine() -> MemcachedProcess:
    """An empty server."""
    server = shared_memcached()
    server.ask("flush_all")
    return server


@pytest.fixture
def own_engine() -> Iterator[MemcachedProcess]:
    """One that may be killed."""
    with MemcachedProcess() as server:
        yield server


@asynccontextmanager
async def opened(url: str, *, timeout: float = 20.0, connections: int = 50) -> AsyncIterator[MemcachedServer]:
    """Connections, closed at the end."""
    server = MemcachedServer(url, timeout=timeout, connections=connections)
    try:
        yield server
    finally:
        await server.aclose()


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server of ours on loopback; tells its URL, and leaves nothing behind."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(run(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"memcached://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    if tasks:
        await asyncio.wait(tasks)


@asynccontextmanager
async def scripted(*answers: bytes, version: bytes = b"VERSION 1.6.18\r\n") -> AsyncIterator[str]:
    """A server that says these, one for each question, on each connection from the beginning, until that is closed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (version, *answers):
            if not await reader.readline():
                return
            writer.write(answer)
        await reader.read()

    async with listening(serve) as url:
        yield url


def ms(name: str, value: bytes, flags: str = "T0") -> Command:
    """Store a value."""
    return Command(f"ms {name} {len(value)} {flags}".encode(), value)


# Answers


async def test_commands_are_answered_in_their_order(engine: MemcachedProcess) -> None:
    """Each with its code, its flags and its value."""
    async with opened(engine.url) as server:
        told = await server.run([ms("a", b"x\r\ny"), Command(b"mg a v s f c"), NOTHING, Command(b"mg b v"), NOTHING])
        assert [it.code for it in told] == ["HD", "VA", "MN", "EN", "MN"]
        assert told[1].value == b"x\r\ny"
        assert told[1].cas > 0
        assert told[1].flags.keys() == {"s", "f", "c"}
        assert await server.run([]) == []


async def test_many_commands_and_large_values_go_at_once(engine: MemcachedProcess) -> None:
    """More than any buffer holds, in both directions."""
    value = os.urandom(900_000)
    async with opened(engine.url) as server:
        told = await server.run([it for _ in range(20) for it in (ms("big", value), Command(b"mg big v"))])
        assert [it.value for it in told[1::2]] == [value] * 20
        assert {it.code for it in await server.run([NOTHING] * 2000)} == {"MN"}


async def test_an_answer_of_many_lines_is_told_as_a_whole(engine: MemcachedProcess) -> None:
    """As that to "stats"."""
    async with opened(engine.url) as server:
        one, two = await server.run([Command(b"stats", until=b"END"), NOTHING])
        assert "STAT bytes " in one.text
        assert two.code == "MN"


async def test_a_value_that_is_too_large_is_refused_and_the_connection_goes_on(engine: MemcachedProcess) -> None:
    """It says so, and that nothing was stored."""
    async with opened(engine.url, connections=1) as server:
        await server.run([NOTHING])
        (state,) = server._states.values()
        wires = set(state.open)
        with pytest.raises(MemcachedUnavailable, match="object too large for cache") as caught:
            await server.run([ms("k", b"x" * (2 << 20))])
        error = caught.value
        assert (error.too_large, error.whole, error.answered, error.applied) == (True, False, True, "no")
        with pytest.raises(MemcachedUnavailable) as caught:
            await server.run([ms("k", b"x" * (2 << 20)), NOTHING])
        assert caught.value.applied == "maybe"
        assert (await server.run([Command(b"mg k v")]))[0].code == "EN"
        assert state.open == wires


async def test_a_value_that_no_server_takes_is_not_even_sent() -> None:
    """It would take long to be refused."""
    server = MemcachedServer(f"memcached://127.0.0.1:{free_port()}")
    with pytest.raises(MemcachedUnavailable, match="nothing was sent") as caught:
        await server.run([ms("k", bytes(LARGEST + 1))])
    assert (caught.value.too_large, caught.value.applied) == (True, "no")


@pytest.mark.parametrize("line", [b"nonsense", b"mg", b"ms k x"])
async def test_a_command_that_is_refused_closes_the_connection(engine: MemcachedProcess, line: bytes) -> None:
    """Nobody knows what else was taken for a command; and the next call has a new one."""
    async with opened(engine.url, connections=1) as server:
        with pytest.raises(MemcachedUnavailable, match=r"it refuses: (CLIENT_)?ERROR") as caught:
            await server.run([Command(line)])
        assert caught.value.answered
        assert [it.code for it in await server.run([NOTHING])] == ["MN"]


@pytest.mark.parametrize(
    "answer",
    [
        b"WHAT\r\n",
        b"VA x\r\n",
        b"VA\r\n",
        b"VA 999999999999\r\n",
        b"VA 2\r\nabcd\r\n",
        b"HD\r\nHD\r\n",
        b"x" * 9000,
        b"x" * 9000 + b"\r\n",
    ],
)
async def test_an_answer_that_cannot_be_closes_the_connection(answer: bytes) -> None:
    """It is not waited for more, and none of it is left to the next call."""
    async with scripted(answer) as url, opened(url) as server:
        for _ in range(2):
            with pytest.raises(MemcachedUnavailable, match="is it memcached") as caught:
                await server.run([Command(b"mg k v")])
            assert not caught.value.answered
            assert caught.value.applied == "maybe"
        await eventually(lambda: not any(state.open for state in server._states.values()))


async def test_an_answer_without_end_is_not_waited_for() -> None:
    """However long its lines are."""
    async with scripted(b"STAT a b\r\n" * 10_001) as url, opened(url) as server:
        with pytest.raises(MemcachedUnavailable, match="does not end"):
            await server.run([Command(b"stats", until=b"END")])


async def test_an_answer_may_come_in_pieces() -> None:
    """Of one byte each."""
    whole = b"VA 4 c1 f1\r\na\r\nb\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"VERSION 1.6.18\r\n")
        await reader.readline()
        for place in range(len(whole)):
            writer.write(whole[place : place + 1])
            await asyncio.sleep(0.0005)
        await reader.read()

    async with listening(serve) as url, opened(url) as server:
        (answer,) = await server.run([Command(b"mg k v c f")])
        assert (answer.value, answer.cas) == (b"a\r\nb", 1)


async def test_a_refusal_of_one_line_ends_an_answer_of_many() -> None:
    """The line that would end it does not come."""
    async with scripted(b"SERVER_ERROR out of memory\r\n", b"MN\r\n") as url, opened(url) as server:
        with pytest.raises(MemcachedUnavailable, match="out of memory") as caught:
            await server.run([Command(b"stats", until=b"END")])
        assert (caught.value.whole, caught.value.too_large, caught.value.answered) == (True, False, True)
        assert [it.code for it in await server.run([NOTHING])] == ["MN"]


# Versions


@pytest.mark.parametrize("version", [b"VERSION 1.6.9\r\n", b"VERSION 1.5.22\r\n"])
async def test_a_server_that_is_too_old_is_refused(version: bytes) -> None:
    """It would take values for commands; so nothing is sent to it."""
    async with scripted(b"HD\r\n", version=version) as url, opened(url) as server:
        with pytest.raises(MemcachedUnavailable, match=r"needs 1\.6\.10 or later") as caught:
            await server.run([NOTHING])
        assert (caught.value.answered, caught.value.applied) == (True, "no")


@pytest.mark.parametrize(
    "version", [b"VERSION unknown\r\n", b"HD\r\n", b"-ERR unknown command\r\n", b"HTTP/1.1 400\r\n"]
)
async def test_what_is_no_memcached_is_refused(version: bytes) -> None:
    """It does not tell a version as memcached does."""
    async with scripted(version=version) as url, opened(url) as server:
        with pytest.raises(MemcachedUnavailable, match="is it memcached"):
            await server.run([NOTHING])


async def test_a_server_that_takes_no_more_connections_says_so() -> None:
    """Which is an answer."""
    async with scripted(version=b"ERROR Too many open connections\r\n") as url, opened(url) as server:
        with pytest.raises(MemcachedUnavailable, match="refuses connections: ERROR Too many") as caught:
            await server.run([NOTHING])
        assert (caught.value.answered, caught.value.whole, caught.value.applied) == (True, True, "no")


# Failures


async def test_a_server_that_is_not_there_is_told_from_one_that_fell_silent(tmp_path: Path) -> None:
    """Nothing was sent to it."""
    for url in (f"memcached://127.0.0.1:{free_port()}", f"unix://{tmp_path}/none"):
        async with opened(url) as server:
            with pytest.raises(MemcachedUnavailable, match=r"no connection was made: .*; nothing was sent") as caught:
                await server.run([NOTHING])
            error = caught.value
            assert (error.asked, error.answered, error.whole, error.applied) == (True, False, True, "no")
            assert url in str(error)


async def test_a_server_that_does_not_answer_is_given_up(own_engine: MemcachedProcess) -> None:
    """After the limits, and the next call gets its own answer."""
    server = MemcachedServer(own_engine.url, timeout=0.1, connect_timeout=0.1)
    await server.run([NOTHING])
    os.kill(own_engine.pid, signal.SIGSTOP)
    try:
        with pytest.raises(MemcachedUnavailable, match=r"did not answer within 0\.2 s") as caught:
            await server.run([ms("k", b"v")])
        assert caught.value.applied == "maybe"
        with pytest.raises(MemcachedUnavailable, match=r"no connection was made within 0\.1 s") as caught:
            await server.run([ms("k", b"v")])
        assert caught.value.applied == "no"
        assert caught.value.asked
    finally:
        os.kill(own_engine.pid, signal.SIGCONT)
    async with asyncio.timeout(10):
        while True:
            try:
                assert [it.code for it in await server.run([NOTHING])] == ["MN"]
                break
            except MemcachedUnavailable:
                continue
    await server.aclose()


async def test_a_server_that_was_killed_is_used_again_when_it_is_back(own_engine: MemcachedProcess) -> None:
    """Also if connections are left from before."""
    async with opened(own_engine.url) as server:
        for _ in range(3):
            await asyncio.gather(*(server.run([NOTHING]) for _ in range(5)))
            own_engine.kill()
            own_engine.start()
            (state,) = server._states.values()
            await eventually(lambda state=state: not state.open)  # type: ignore[misc]
            assert [it.code for it in await server.run([NOTHING])] == ["MN"]


async def test_a_server_that_goes_away_in_the_midst_is_told(own_engine: MemcachedProcess) -> None:
    """And what was asked may have been done."""
    async with opened(own_engine.url) as server:
        await server.run([NOTHING])
        os.kill(own_engine.pid, signal.SIGSTOP)
        task = asyncio.create_task(server.run([ms("k", b"v")]))
        await asyncio.sleep(0)
        own_engine.kill()
        with pytest.raises(MemcachedUnavailable) as caught:
            await task
        assert (caught.value.answered, caught.value.applied) == (False, "maybe")


async def test_a_connection_that_was_closed_just_now_is_told() -> None:
    """Before the loop has noticed."""
    async with scripted(b"MN\r\n") as url, opened(url) as server:
        await server.run([NOTHING])
        (state,) = server._states.values()
        (wire,) = state.open
        wire.abort()
        assert state.take() is None
        with pytest.raises(ConnectionResetError):
            await wire.exchange([NOTHING])


async def test_who_waits_in_vain_for_a_connection_has_learnt_nothing(own_engine: MemcachedProcess) -> None:
    """Nothing was asked of the server, and that says nothing of it."""
    server = MemcachedServer(own_engine.url, timeout=0.15, connect_timeout=0.15, connections=1)
    await server.run([NOTHING])
    (state,) = server._states.values()
    async with state.slots:
        with pytest.raises(MemcachedUnavailable, match="came free within") as caught:
            await server.run([NOTHING])
        assert (caught.value.asked, caught.value.applied) == (False, "no")
    assert [it.code for it in await server.run([NOTHING])] == ["MN"]
    await server.aclose()


# Cancellation


async def test_cancelled_calls_leave_no_answer_to_others(engine: MemcachedProcess) -> None:
    """Cut off at any moment, on few connections, each answer is that to its own question."""
    chance = random.Random(3)
    cut = 0
    async with opened(engine.url, connections=3) as server:

        async def ask(number: int) -> None:
            name = f"n{number % 7}"
            value = b"%d" % number * chance.randrange(1, 3000)
            told = await server.run([Command(f"mg {name} v O{number}".encode()), ms("x", value), NOTHING])
            assert told[0].flags.get("O", f"{number}") == f"{number}"
            assert [it.code for it in told[1:]] == ["HD", "MN"]

        await server.run([ms(f"n{it}", b"v" * 10_000) for it in range(7)])
        for number in range(400):
            tasks = [asyncio.create_task(ask(number * 10 + offset)) for offset in range(4)]
            for _ in range(chance.randrange(16)):
                await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[2].cancel()
            await asyncio.wait(tasks)
            cut += sum(task.cancelled() for task in tasks)
            for task in tasks:
                assert task.cancelled() or task.exception() is None
        assert cut > 100
        await asyncio.gather(*(ask(number) for number in range(50)))


async def test_a_limit_is_kept_by_those_who_wait(engine: MemcachedProcess) -> None:
    """No more connections than allowed are open at a time, and all are served."""
    async with opened(engine.url, connections=4) as server:
        told = await asyncio.gather(*(server.run([ms(f"k{it}", b"v"), NOTHING]) for it in range(200)))
        assert {it[1].code for it in told} == {"MN"}
        (state,) = server._states.values()
        assert len(state.open) <= 4


# Loops, threads and processes


async def test_a_socket_serves_as_well(tmp_path: Path) -> None:
    """As a server on the same machine has it."""
    with MemcachedProcess(path=tmp_path / "m.sock") as own:
        async with opened(own.url) as server:
            assert [it.code for it in await server.run([NOTHING])] == ["MN"]
            assert own.url in repr(server)


async def test_closing_again_and_using_again_is_possible(engine: MemcachedProcess) -> None:
    """Connections are opened anew, and none is left."""
    before = len(os.listdir("/proc/self/fd"))
    server = MemcachedServer(engine.url)
    for _ in range(2):
        await asyncio.gather(*(server.run([NOTHING]) for _ in range(5)))
        await server.aclose()
        await server.aclose()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("factory", [None, uvloop.new_event_loop])
def test_one_server_serves_many_loops(
    engine: MemcachedProcess, factory: Callable[[], asyncio.AbstractEventLoop] | None
) -> None:
    """One after the other; each closes its connections at its end, also in the midst, and if nobody asked for it."""
    server = MemcachedServer(engine.url)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.sleep(0))  # what the first loop of its kind opens for all of them
    before = len(os.listdir("/proc/self/fd"))

    async def use(number: int) -> None:
        tasks = [asyncio.create_task(server.run([ms("k", b"v" * 100_000), Command(b"mg k v")])) for _ in range(5)]
        if number % 3:
            await asyncio.wait(tasks)
        else:
            await asyncio.sleep(0)
        if number % 2:
            await server.aclose()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(use(number))
        gc.collect()
    assert [str(it.message) for it in caught] == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(server._states) <= 1


def test_a_forked_child_opens_its_own_connections(engine: MemcachedProcess) -> None:
    """And neither uses nor closes what it inherited."""
    code = """
    import asyncio, os, sys
    from pybustcall.memcached_connection import MemcachedServer
    from pybustcall.memcached_layout import Command

    server = MemcachedServer(sys.argv[1])

    async def use():
        told = await asyncio.gather(*(server.run([Command(b"mn")]) for _ in range(9)))
        return {it.code for some in told for it in some}

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    child = os.fork()
    if not child:
        assert asyncio.run(use()) == {"MN"}
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert loop.run_until_complete(use()) == {"MN"}
    loop.run_until_complete(server.aclose())
    loop.close()
    print("well")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), engine.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("well\n", "")


# Settings


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis://127.0.0.1",
        "memcached://",
        "memcached:///path",
        "memcached://host/1",
        "memcached://host:0",
        "memcached://host:x",
        "memcached://host:99999",
        "memcached://host?db=1",
        "memcached://user:secret@host",
        "unix://host/path",
        "unix:///",
        "unix:",
        "unix:///path?db=1",
        "memcached://[::1",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    """At once, and without what might be a secret in it."""
    with pytest.raises(ConfigurationError, match="no URL of a memcached server") as caught:
        MemcachedServer(url)
    assert caught.value.setting == "url"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("setting", ["timeout", "connect_timeout", "connections"])
def test_limits_are_more_than_nothing(setting: str) -> None:
    """None of them could be kept otherwise."""
    for value in (0, -1, float("nan")):
        with pytest.raises(ConfigurationError, match=f"{setting} must be more than 0"):
            MemcachedServer("memcached://host", **{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memcached://host", "memcached://host"),
        ("memcached://host:11212", "memcached://host:11212"),
        ("memcached://[::1]:11212", "memcached://[::1]:11212"),
        ("unix:///run/m.sock", "unix:///run/m.sock"),
        ("memcached://user:secret@host/?a=secret", "memcached://host/"),
        ("memcached://[::1", "the URL"),
    ],
)
def test_a_server_is_named_without_what_might_be_a_secret(url: str, shown: str) -> None:
    """As far as it can be read."""
    assert shown_url(url) == shown
