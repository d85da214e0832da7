"""The faulty proxy: what passes, what does not, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from pybustcall import BustcallClient, ConfigurationError
from pybustcall.testing import FakeDaemon, FaultyProxy, Trouble
from pybustcall.testing.proxy import loopback_socket
from tests.conftest import PATIENCE, eventually

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

MOMENT = 0.05
"""Seconds after which what has not come by now is taken as held back."""
LINGER_0 = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing sends a reset."""
AGES = 3600.0
"""Seconds that no test waits for."""


class Echo:
    """A server that sends everything back, and notes what it got and how its connections ended."""

    def __init__(self) -> None:
        self.url = ""
        self.got = bytearray()
        self.accepted = 0
        self.ends: list[str] = []
        self.reading = asyncio.Event()
        self.reading.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.accepted += 1
        try:
            await self.reading.wait()
            while data := await reader.read(65536):
                self.got += data
                writer.write(data)
                await writer.drain()
            self.ends.append("closed")
        except ConnectionError:
            self.ends.append("reset")
        finally:
            writer.close()


@asynccontextmanager
async def echoing(path: Path | None = None) -> AsyncIterator[Echo]:
    """Serve an echo on loopback, or on a Unix socket."""
    echo = Echo()
    if path is not None:
        server = await asyncio.start_unix_server(echo.serve, path)
        echo.url = f"unix://{path}"
    else:
        server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
        echo.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield echo
    finally:
        server.close()
        await eventually(lambda: len(echo.ends) == echo.accepted, "the echo's connections end")


@asynccontextmanager
async def connected(proxy: FaultyProxy) -> AsyncIterator[Stream]:
    """Connect to the proxy."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rsplit(":", 1)[1]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(stream: Stream, data: bytes) -> bytes:
    """Send bytes and read as many."""
    stream[1].write(data)
    async with asyncio.timeout(PATIENCE):
        return await stream[0].readexactly(len(data))


async def rest(stream: Stream) -> bytes:
    """Read until the end."""
    async with asyncio.timeout(PATIENCE):
        return await stream[0].read()


async def nothing_comes(stream: Stream) -> None:
    """See that neither bytes nor an end arrive."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream[0].read(1), MOMENT)


async def timed(action: Awaitable[bytes]) -> float:
    """Tell how many seconds it takes."""
    now = asyncio.get_running_loop().time
    begun = now()
    await action
    return now() - begun


async def test_everything_passes_untouched_both_ways() -> None:
    """A megabyte of random bytes comes back as it was; the proxy counts both ways."""
    sent = os.urandom(1_000_000)
    async with echoing() as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as stream:
        stream[1].write(sent)
        async with asyncio.timeout(PATIENCE):
            assert await stream[0].readexactly(len(sent)) == sent
        assert (proxy.connections, proxy.bytes_up, proxy.bytes_down) == (1, len(sent), len(sent))
        assert proxy.open_connections == 1


async def test_the_end_of_one_way_leaves_the_other_open() -> None:
    """The client says that it has said all; the answer still arrives whole, and then its end."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as stream:
        stream[1].write(b"question")
        stream[1].write_eof()
        assert await rest(stream) == b"question"
        await eventually(lambda: proxy.open_connections == 0)
    assert echo.ends == ["closed"]


async def test_a_reset_by_the_client_is_a_reset_for_the_daemon() -> None:
    """As without a proxy between."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy:
        async with connected(proxy) as stream:
            assert await ask(stream, b"a") == b"a"
            stream[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        await eventually(lambda: echo.ends == ["reset"])


async def test_a_receiver_that_does_not_read_slows_the_sender_down() -> None:
    """The proxy holds a bounded number of bytes, and passes all of them on when they are read."""
    sent = os.urandom(24 * 1024 * 1024)
    async with echoing() as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as stream:
        echo.reading.clear()
        stream[1].write(sent)
        writing = asyncio.create_task(stream[1].drain())
        await eventually(lambda: echo.accepted == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(writing), 4 * MOMENT)
        assert proxy.bytes_up < len(sent)
        echo.reading.set()
        async with asyncio.timeout(PATIENCE):
            assert await stream[0].readexactly(len(sent)) == sent
            await writing


async def test_refuse_closes_the_port_and_healing_opens_the_same_again() -> None:
    """A living connection is left alone meanwhile."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as living:
        assert await ask(living, b"a") == b"a"
        url = proxy.url
        for _ in range(2):
            proxy.trouble = Trouble(refuse=True)
            with pytest.raises(ConnectionRefusedError):
                async with connected(proxy):
                    raise AssertionError
            assert await ask(living, b"b") == b"b"
            proxy.heal()
            async with connected(proxy) as stream:
                assert await ask(stream, b"c") == b"c"
        assert proxy.url == url


async def test_a_proxy_can_refuse_from_the_beginning() -> None:
    """Nobody can connect before it is healed."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(refuse=True)) as proxy:
        with pytest.raises(ConnectionRefusedError):
            async with connected(proxy):
                raise AssertionError
        proxy.heal()
        async with connected(proxy) as stream:
            assert await ask(stream, b"a") == b"a"


async def test_reset_ends_living_connections_at_once_and_new_ones_too() -> None:
    """Both sides of a living one see a reset."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy:
        async with connected(proxy) as living:
            assert await ask(living, b"a") == b"a"
            proxy.trouble = Trouble(reset=True)
            with pytest.raises(ConnectionResetError):
                await rest(living)
        await eventually(lambda: echo.ends == ["reset"])
        with pytest.raises(ConnectionResetError):
            async with connected(proxy) as stream:
                await rest(stream)
        assert (proxy.connections, echo.accepted, proxy.open_connections) == (2, 1, 0)


async def test_dropping_connections_leaves_the_door_open() -> None:
    """Living ones are reset, new ones are served."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy:
        async with connected(proxy) as living:
            assert await ask(living, b"a") == b"a"
            proxy.drop_connections()
            with pytest.raises(ConnectionResetError):
                await rest(living)
        async with connected(proxy) as stream:
            assert await ask(stream, b"b") == b"b"


async def test_stall_holds_living_connections_until_healed() -> None:
    """Neither bytes nor an end pass; then both do."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as stream:
        assert await ask(stream, b"a") == b"a"
        proxy.trouble = Trouble(stall=True)
        stream[1].write(b"bcd")
        stream[1].write_eof()
        await nothing_comes(stream)
        assert (bytes(echo.got), echo.ends) == (b"a", [])
        proxy.heal()
        assert await rest(stream) == b"bcd"


async def test_stall_accepts_new_connections_and_asks_the_daemon_only_when_healed() -> None:
    """A black hole looks like a server that thinks."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(stall=True)) as proxy:
        async with connected(proxy) as stream:
            stream[1].write(b"abc")
            await nothing_comes(stream)
            assert (proxy.connections, echo.accepted) == (1, 0)
            proxy.heal()
            async with asyncio.timeout(PATIENCE):
                assert await stream[0].readexactly(3) == b"abc"


async def test_half_open_kills_the_daemons_side_alone() -> None:
    """The client learns of it only by the reset that answers its next byte after healing."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as stream:
        assert await ask(stream, b"a") == b"a"
        proxy.trouble = Trouble(half_open=True)
        await eventually(lambda: echo.ends == ["reset"])
        await nothing_comes(stream)
        proxy.heal()
        await nothing_comes(stream)
        stream[1].write(b"b")
        with pytest.raises(ConnectionResetError):
            await rest(stream)
        assert bytes(echo.got) == b"a"


async def test_half_open_holds_what_is_sent_and_answers_it_with_a_reset_when_healed() -> None:
    """A new connection gets no daemon at all; one that ends in order, ends so."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(half_open=True)) as proxy:
        async with connected(proxy) as sender, connected(proxy) as ender:
            sender[1].write(b"a")
            ender[1].write_eof()
            await nothing_comes(sender)
            await nothing_comes(ender)
            proxy.heal()
            with pytest.raises(ConnectionResetError):
                await rest(sender)
            assert await rest(ender) == b""
    assert echo.accepted == 0


async def test_half_open_after_a_stall_leaves_the_daemon_unasked() -> None:
    """A connection that waited for its daemon loses it before it has it."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(stall=True)) as proxy:
        async with connected(proxy) as stream:
            await nothing_comes(stream)
            proxy.trouble = Trouble(half_open=True)
            await nothing_comes(stream)
            proxy.trouble = Trouble(half_open=True, latency=1.0)  # dead it is, whatever else
            proxy.drop_connections()
            with pytest.raises(ConnectionResetError):
                await rest(stream)
    assert echo.accepted == 0


async def test_latency_is_added_each_way_once() -> None:
    """Two writes in a row do not add theirs."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(latency=0.1)) as proxy:
        async with connected(proxy) as stream:
            assert await timed(ask(stream, b"a")) >= 0.2
            stream[1].write(b"b")
            await asyncio.sleep(0.02)
            assert await timed(ask(stream, b"c")) >= 0.17


@pytest.mark.parametrize(
    "trouble",
    [Trouble(latency=AGES), Trouble(jitter=AGES), Trouble(bandwidth=1 / AGES), Trouble(drip=AGES)],
    ids=["latency", "jitter", "bandwidth", "drip"],
)
async def test_healing_lets_go_at_once_of_what_was_slow(trouble: Trouble) -> None:
    """Nobody waits for the time that was left."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=trouble) as proxy, connected(proxy) as stream:
        stream[1].write(b"abc")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream[0].readexactly(3), MOMENT)
        proxy.heal()
        async with asyncio.timeout(PATIENCE):
            await eventually(lambda: echo.got == b"abc")


async def test_bandwidth_limits_what_passes_in_a_second() -> None:
    """2,000 bytes at 10,000 a second take nearly 0.2 s."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(bandwidth=10_000)) as proxy:
        async with connected(proxy) as stream:
            assert await timed(ask(stream, b"x" * 2000)) >= 0.17


async def test_drip_sends_the_answer_byte_by_byte() -> None:
    """The request passes whole."""
    async with (
        echoing() as echo,
        FaultyProxy(echo.url, trouble=Trouble(drip=0.03)) as proxy,
        connected(proxy) as stream,
    ):
        answering = asyncio.create_task(timed(ask(stream, b"abcdef")))
        await eventually(lambda: proxy.bytes_down == 1)
        assert bytes(echo.got) == b"abcdef"
        assert await answering >= 0.14


async def test_truncate_closes_after_so_many_bytes_of_the_answer() -> None:
    """They are counted from when the trouble began; the daemon had got all."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as stream:
        assert await ask(stream, b"before") == b"before"
        proxy.trouble = Trouble(truncate=4)
        stream[1].write(b"abc")
        async with asyncio.timeout(PATIENCE):
            assert await stream[0].readexactly(3) == b"abc"
        stream[1].write(b"defg")
        assert await rest(stream) == b"d"
        assert bytes(echo.got) == b"beforeabcdefg"


async def test_truncate_can_end_abruptly_and_before_the_first_byte() -> None:
    """What was asked was done, and a reset is all that the client gets."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(truncate=0, abrupt=True)) as proxy:
        async with connected(proxy) as stream:
            stream[1].write(b"abc")
            with pytest.raises(ConnectionResetError):
                await rest(stream)
    assert bytes(echo.got) == b"abc"


async def test_close_after_lets_so_many_bytes_of_the_request_pass() -> None:
    """The daemon gets them, and then the end."""
    async with echoing() as echo, FaultyProxy(echo.url, trouble=Trouble(close_after=3)) as proxy:
        async with connected(proxy) as stream:
            stream[1].write(b"abcdef")
            assert (await rest(stream)) in {b"", b"abc"}
        await eventually(lambda: len(echo.ends) == 1)
    assert bytes(echo.got) == b"abc"


async def test_garbage_comes_in_place_of_the_answer_and_is_repeated_by_its_seed() -> None:
    """As many bytes, others than sent, and the same ones for the same seed."""
    answers = []
    async with echoing() as echo:
        for seed in (1, 1, 2):
            async with FaultyProxy(echo.url, trouble=Trouble(garbage=True), seed=seed) as proxy:
                async with connected(proxy) as stream:
                    answers.append(await ask(stream, b"a" * 64))
        assert bytes(echo.got) == b"a" * 192
    assert answers[0] == answers[1]
    assert len({b"a" * 64, *answers}) == 3


async def test_a_daemon_that_is_down_makes_a_reset() -> None:
    """The client had connected to the proxy, so it cannot be refused any more."""
    with loopback_socket() as nobody:
        async with FaultyProxy(f"http://127.0.0.1:{nobody.getsockname()[1]}") as proxy:
            with pytest.raises(ConnectionResetError):
                async with connected(proxy) as stream:
                    await rest(stream)
            await eventually(lambda: proxy.open_connections == 0)


async def test_the_upstream_can_be_another_later() -> None:
    """New connections go there."""
    async with echoing() as first, echoing() as second, FaultyProxy(first.url) as proxy:
        async with connected(proxy) as stream:
            await ask(stream, b"a")
            proxy.upstream = second.url
            assert proxy.upstream == second.url
            await ask(stream, b"b")
            async with connected(proxy) as other:
                await ask(other, b"c")
    assert (bytes(first.got), bytes(second.got)) == (b"ab", b"c")


async def test_a_unix_socket_can_be_upstream(tmp_path: Path) -> None:
    """The proxy itself is on loopback all the same."""
    async with echoing(tmp_path / "e.sock") as echo, FaultyProxy(echo.url) as proxy, connected(proxy) as stream:
        assert proxy.url.startswith("http://127.0.0.1:")
        assert await ask(stream, b"a") == b"a"


async def test_its_url_is_the_daemons_with_another_address() -> None:
    """Scheme and path stay, so that TLS and a base path pass through."""
    proxy = FaultyProxy("https://cache.example/base")
    assert proxy.url == ""
    assert "closed" in repr(proxy)
    proxy.trouble = Trouble(refuse=True)  # before it is entered, too
    async with proxy:
        assert proxy.url.startswith("https://127.0.0.1:")
        assert proxy.url.endswith("/base")
        assert "refuse=True" in repr(proxy)


def test_an_upstream_that_is_no_url_is_refused() -> None:
    """The setting is named."""
    with pytest.raises(ConfigurationError, match="upstream"):
        FaultyProxy("localhost:8989")
    proxy = FaultyProxy("http://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="upstream"):
        proxy.upstream = ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latency", -1.0),
        ("jitter", float("nan")),
        ("drip", -0.1),
        ("bandwidth", 0.0),
        ("bandwidth", float("inf")),
        ("truncate", -1),
        ("close_after", True),
    ],
)
def test_a_trouble_that_cannot_be_is_refused(name: str, value: float) -> None:
    """The field is named."""
    with pytest.raises(ConfigurationError, match=name):
        Trouble(**{name: value})  # type: ignore[arg-type]


@given(size=st.integers(1, 10**6), rate=st.floats(0.001, 1e9))
def test_a_bandwidth_is_dealt_out_exactly(size: int, rate: float) -> None:
    """At least a byte and at most all pass at once, and the pause after them is what they take at that rate."""
    count, pause = Trouble(bandwidth=rate).piece(size, answer=True)
    assert 1 <= count <= size
    assert pause == pytest.approx(count / rate)


async def test_at_the_end_nothing_is_left() -> None:
    """No task, no descriptor: not of living, stalled, half-open, refused, nor just accepted connections."""
    async with echoing() as echo:
        async with connected_through(echo, Trouble()):
            pass  # what the loop itself opens at first is open now
        await eventually(lambda: len(echo.ends) == echo.accepted)
        descriptors, tasks = open_descriptors(), asyncio.all_tasks()
        for trouble in (Trouble(), Trouble(stall=True), Trouble(half_open=True), Trouble(refuse=True)):
            async with connected_through(echo, trouble):
                pass
            await eventually(lambda: len(echo.ends) == echo.accepted)
            await eventually(lambda: open_descriptors() == descriptors, f"descriptors after {trouble}")
            await eventually(lambda: asyncio.all_tasks() == tasks, f"tasks after {trouble}")


async def test_after_a_cancellation_nothing_is_left_either() -> None:
    """The block is cancelled while its connection lives."""
    async with echoing() as echo:
        descriptors, tasks = open_descriptors(), asyncio.all_tasks()
        inside = asyncio.Event()

        async def use() -> None:
            async with connected_through(echo, Trouble()):
                inside.set()
                await asyncio.sleep(AGES)

        using = asyncio.create_task(use())
        await inside.wait()
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        await eventually(lambda: len(echo.ends) == echo.accepted)
        await eventually(lambda: open_descriptors() == descriptors)
        await eventually(lambda: asyncio.all_tasks() == tasks)


@asynccontextmanager
async def connected_through(echo: Echo, trouble: Trouble) -> AsyncIterator[None]:
    """Hold a connection through a proxy that gets into trouble; leave the proxy before the connection."""
    proxy = FaultyProxy(echo.url)
    async with proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rsplit(":", 1)[1]))
        try:
            await ask((reader, writer), b"a")
            proxy.trouble = trouble
            yield
        finally:
            writer.transport.abort()


def open_descriptors() -> int:
    """Count this process's open files."""
    return len(os.listdir("/proc/self/fd"))


async def test_a_client_that_does_not_read_does_not_keep_the_proxy() -> None:
    """Its connection was to end in order, with bytes that it never took; at the end it is cut."""
    async with echoing() as echo:
        async with FaultyProxy(echo.url) as proxy:
            with socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1]))) as deaf:
                deaf.setblocking(False)
                proxy.trouble = Trouble(truncate=24 * 1024 * 1024)
                pouring = asyncio.create_task(pour(deaf))
                await eventually(lambda: proxy.bytes_down > 0)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(pouring), 4 * MOMENT)
                pouring.cancel()
                for link in tuple(proxy._links):
                    link.end(abrupt=False)
                await asyncio.sleep(0)
                assert proxy.open_connections == 1
                async with asyncio.timeout(PATIENCE):
                    await proxy.__aexit__(None, None, None)
                assert proxy.open_connections == 0


async def pour(deaf: socket.socket) -> None:
    """Send without end."""
    while True:
        await asyncio.get_running_loop().sock_sendall(deaf, bytes(65536))


async def test_a_connection_dropped_in_the_moment_it_is_accepted_is_closed() -> None:
    """Also while everything stalls, where it would wait."""
    for trouble in (Trouble(), Trouble(stall=True)):
        async with echoing() as echo, FaultyProxy(echo.url, trouble=trouble) as proxy:
            assert proxy._door is not None
            with socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1]))):
                proxy._accept(proxy._door)
                proxy._accept(proxy._door)  # nobody waits any more
                assert (proxy.connections, proxy.open_connections) == (1, 1)
                proxy.drop_connections()
                await eventually(lambda: proxy.open_connections == 0)
        assert echo.accepted == 0


async def test_a_connection_orphaned_in_the_moment_it_is_accepted_gets_no_daemon() -> None:
    """And is kept."""
    async with echoing() as echo, FaultyProxy(echo.url) as proxy:
        assert proxy._door is not None
        with socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1]))):
            proxy._accept(proxy._door)
            proxy.trouble = Trouble(half_open=True)
            proxy.heal()
            await asyncio.sleep(MOMENT)
            assert proxy.open_connections == 1
    assert echo.accepted == 0


async def test_an_end_that_can_no_longer_be_passed_on_ends_the_connection() -> None:
    """The daemon's end was held back, and meanwhile the client has reset the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        async with FaultyProxy(url, trouble=Trouble(latency=AGES)) as proxy:
            client = socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1])))
            accepted, _ = await asyncio.get_running_loop().sock_accept(server)
            accepted.close()
            (link,) = proxy._links
            await eventually(lambda: link._down._queue, "the end arrives at the proxy")
            proxy.trouble = Trouble(stall=True)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            client.close()
            proxy.heal()
            await eventually(lambda: proxy.open_connections == 0)


def test_a_port_that_is_taken_is_told() -> None:
    """And the socket that could not have it is closed (a warning, and so an error, otherwise)."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        loopback_socket(taken.getsockname()[1])


async def bust_through_every_trouble() -> None:
    """Use the proxy as tests do, on whatever loop runs."""
    async with FakeDaemon() as fake, FaultyProxy(fake.url) as proxy:
        async with BustcallClient(proxy.url, timeout=PATIENCE) as client:
            assert (await client.bust("a")).ok
        proxy.trouble = Trouble(refuse=True)
        proxy.drop_connections()
        with pytest.raises(ConnectionRefusedError):
            async with connected(proxy):
                raise AssertionError
        proxy.trouble = Trouble(latency=0.001, jitter=0.001, bandwidth=100_000)
        async with BustcallClient(proxy.url, timeout=PATIENCE) as client:
            assert (await client.bust("b")).ok
            proxy.trouble = Trouble(stall=True)
            pending = asyncio.create_task(client.bust("c"))
            await asyncio.sleep(MOMENT)
            assert not pending.done()
            proxy.heal()
            assert (await pending).ok
            proxy.trouble = Trouble(reset=True)
            assert not (await client.bust("d", fault_tolerance=12, timeout=0.5)).ok
    assert [bust.target for bust in fake.applied] == ["a", "b", "c"]


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_it_works_on_every_loop(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Asyncio's own and uvloop."""
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(bust_through_every_trouble())
