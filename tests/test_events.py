"""The events of daemons as a client follows them: in order, without a gap that is not told, and to a clean end."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pybustcall import TLS, BustcallClient, Pool
from pybustcall.daemon import DaemonSettings, Engine, Indexes, Layer, MemoryBackend, create_app
from pybustcall.errors import ClientClosed, IncompatibleDaemon, InvalidRequest, NotAllowed, Panic
from pybustcall.events import BustEvent, Concern, EventStream, Feed, Reset, Wanted, clock
from pybustcall.faults import Fault, FaultKind
from pybustcall.testing import Answer, FakeDaemon, FaultyProxy, Trouble
from tests.conftest import PATIENCE, eventually, virtual_time
from tests.event_wires import BEGUN, Heard, Wire, dated, told

STREAM = ["events.stream", "cache.bust.tag", "cache.bust.prefix", "cache.bust.all", "cache.bust.namespace"]


@asynccontextmanager
async def fake(**settings: Any) -> AsyncIterator[FakeDaemon]:
    """Serve a fake daemon that has events."""
    async with FakeDaemon(capabilities=STREAM, **{"heartbeat": 0.5, **settings}) as daemon:
        yield daemon


async def take(events: EventStream, count: int) -> list[str]:
    """Take so many events; tell what was busted, and "reset"."""
    found = []
    for _ in range(count):
        event = await anext(events)
        found.append(event.target if isinstance(event, BustEvent) else "reset")
    return found


# What an event concerns


KEYS = st.sampled_from(["a", "a/b", "a/b/c", "a/bc", "a?x", "a.gz", "a.gz?x", "a/b?y", "b", "a/", "a/b/", "a/b.br"])
EVENTS = st.builds(
    BustEvent,
    target=KEYS,
    kind=st.sampled_from(["key", "prefix", "tag", "all"]),
    strategy=st.sampled_from(["direct", "dimensional", "hybrid"]),
    also=st.lists(KEYS, max_size=2).map(tuple),
)


@given(events=st.lists(EVENTS, max_size=4), key=KEYS, tags=st.frozensets(KEYS, max_size=2))
def test_several_events_concern_what_one_of_them_does(events: list[BustEvent], key: str, tags: frozenset[str]) -> None:
    """Asked together, by look-ups."""
    assert Concern(events).concerns(key, tags) == any(event.concerns(key, tags) for event in events)


def test_an_event_concerns_variants_unless_it_is_direct() -> None:
    """Of the named, and of what went with it."""
    wide = BustEvent(target="a/b", also=("c",))
    assert [key for key in ("a/b", "a/b.gz", "a/b?x", "a/b/c", "c.gz", "c", "d") if wide.concerns(key)] == [
        *("a/b", "a/b.gz", "a/b?x"),
        *("c.gz", "c"),
    ]
    direct = BustEvent(target="a/b", also=("c",), strategy="direct")
    assert [key for key in ("a/b", "a/b.gz", "c.gz", "c") if direct.concerns(key)] == ["a/b", "c"]


def test_one_tag_may_be_given_as_a_text() -> None:
    """It is not taken apart; what is no text, nor several, is refused, whatever was busted."""
    told = BustEvent(target="a", kind="tag")
    assert told.concerns("x", "a")
    assert not told.concerns("x", "sale")
    assert told.concerns("x", (tag for tag in ("b", "a")))
    for tags in (None, 5, [1], b"a"):
        for event in (told, BustEvent(target="*", kind="all")):
            with pytest.raises(InvalidRequest, match=r"^tags must be a text, or several, not "):
                event.concerns("x", tags)  # type: ignore[arg-type]


def test_an_event_shows_no_target() -> None:
    """Only its first segment."""
    event = BustEvent(target="users/secret", also=("b",), daemon="http://h", id="e-1")
    assert "secret" not in repr(event)
    assert repr(event).endswith("of default, and 1 more, from http://h e-1)")
    assert repr(BustEvent(target="a")).endswith("of default, from this client)")


def test_what_is_wanted_is_asked_for() -> None:
    """Quoted, each once."""
    wanted = Wanted.of("shop", ["a/b", "a/b"], "x&y")
    assert wanted.path == "/api/v1/events?namespace=shop&prefix=a%2Fb&tag=x%26y"


@pytest.mark.parametrize("wanted", [{"prefix": ""}, {"tags": [""]}, {"prefix": 7}, {"tags": map(str, range(101))}])
def test_what_cannot_be_wanted_is_refused(wanted: dict[str, Any]) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidRequest):
        BustcallClient().events(**wanted)


def test_a_namespace_or_a_daemon_that_cannot_be_is_refused() -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidRequest, match="namespace"):
        BustcallClient().events(namespace="")
    with pytest.raises(InvalidRequest, match="none of this client's"):
        BustcallClient().events(daemon="http://elsewhere")


# A follower by itself, on streams that a test writes


@asynccontextmanager
async def following(*wires: Wire, listener: Any = None, random: float = 1.0) -> AsyncIterator[tuple[Feed, Heard]]:
    """Follow daemons that are written by the test, by the loop's clock."""
    heard = listener or Heard()
    daemons = [(f"http://{number}", wire) for number, wire in enumerate(wires)]
    now = asyncio.get_running_loop().time
    feed = Feed(daemons, Wanted(), random=lambda: random, clock=now)
    feed.join(heard)
    feed.start()
    try:
        yield feed, heard
    finally:
        await feed.aclose()


def pauses(wire: Wire, count: int) -> list[float]:
    """Tell the seconds between the first connections."""
    return [round(later - sooner, 1) for (sooner, _), (later, _) in pairwise(wire.opened[: count + 1])]


@virtual_time
async def test_a_broken_stream_is_opened_again_at_once_and_goes_on() -> None:
    """From the last id, which a heartbeat moves, too."""
    wire = Wire([BEGUN, 1.4, told(3), 1.4, b": beat\nid: e-7\n\n", 1.2], [told(8), BEGUN.replace(b"e-0", b"e-8")])
    async with following(wire) as (feed, heard):
        await asyncio.sleep(6)
        assert repr(feed) == "Feed(default, 0 of 1 live, 1 listen)"
        assert repr(feed.followers[0]) == "Follower(http://0, e-8, not live)"
    assert wire.opened[:2] == [(0.0, None), (4.0, "e-7")]
    assert heard.notes == ["first", "e3", "e8"]


@virtual_time
async def test_pauses_grow_while_a_daemon_does_not_answer() -> None:
    """Full jitter, of 0.1 s at first and of 5 s at last; what it says to wait comes on top."""
    down = Fault(FaultKind.UNREACHABLE, "http://0", "down", "no")
    busy = Fault(FaultKind.THROTTLED, "http://0", "busy", "no", retry_after=7.0)
    wire = Wire(*([down] for _ in range(8)), [busy], [BEGUN, 2.0])
    async with following(wire) as (_, heard):
        await asyncio.sleep(100)
    assert pauses(wire, 10) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 12.0, 2.0]
    assert heard.notes == ["reset"]  # what was busted before it was reached cannot be told


@virtual_time
async def test_a_daemon_that_asks_for_an_hour_is_asked_again_in_a_minute() -> None:
    """It may have said so while it was being deployed, and nobody would be told of anything for all that time."""
    busy = Fault(FaultKind.THROTTLED, "http://0", "busy", "no", retry_after=3600.0)
    wire = Wire([busy], [BEGUN, 1e6])
    async with following(wire, random=0.0) as (feed, _):
        await asyncio.sleep(61)
        assert feed.is_live
    assert pauses(wire, 1) == [60.0]


@virtual_time
async def test_a_stream_that_ends_as_soon_as_it_is_live_is_not_opened_again_and_again_at_once() -> None:
    """The pauses grow to 0.4 s, and no further, since it answers."""
    wire = Wire(*([BEGUN] for _ in range(5)), [BEGUN, 1.5])
    async with following(wire):
        await asyncio.sleep(10)
    assert pauses(wire, 6) == [0.1, 0.2, 0.4, 0.4, 0.4, 1.5]


@virtual_time
async def test_a_silent_connection_is_broken_after_three_heartbeats() -> None:
    """As the daemon says its heartbeat; before that, three of five seconds."""
    wire = Wire([100.0], [BEGUN, 100.0], [BEGUN, 0.5])
    async with following(wire) as (feed, _):
        await asyncio.sleep(18.05)
        fault = feed.followers[0].fault
        assert fault is None
        assert [place for place, _ in wire.opened] == [0.0, 15.1]
        await asyncio.sleep(0.2)
        assert [place for place, _ in wire.opened] == [0.0, 15.1, 18.1]


@pytest.mark.parametrize("later", [1.6, 100.0])
async def test_what_waited_while_the_process_did_not_run_is_not_trusted(later: float) -> None:
    """What comes after one and a half heartbeats may be so old; what it says is told again by the next connection."""
    now = 0.0
    opened: list[str | None] = []
    gate: asyncio.Queue[bytes] = asyncio.Queue()

    @asynccontextmanager
    async def wire(path: str, /, *, after: str | None, until: float) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        opened.append(after)
        yield gate.get

    heard = Heard()
    feed = Feed([("http://0", wire)], Wanted(), random=lambda: 0.0, clock=lambda: now)
    feed.join(heard)
    feed.start()
    gate.put_nowait(BEGUN)
    await eventually(lambda: feed.is_live)
    now = later
    gate.put_nowait(told(1))
    await eventually(lambda: len(opened) == 2)
    assert opened == [None, "e-0"]
    assert heard.notes == ["first"]
    assert feed.trusted_until(1, None) == 3.0
    gate.put_nowait(told(1) + BEGUN.replace(b"e-0", b"e-1"))
    await eventually(lambda: feed.is_live)
    assert heard.notes == ["first", "e1"]
    assert feed.trusted_until(1, None) == later + 3
    await feed.aclose()


@virtual_time
async def test_what_is_dated_is_as_old_as_it_says() -> None:
    """However long it was on its way, and however the daemon's clock is set; nothing of it is thrown away."""
    wire = Wire(
        [0.2, dated(BEGUN, 1000.1), 0.8, dated(told(1), 1000.3), 2.0, told(2), 0.5, dated(told(3), 1001.3), 1e6]
    )
    async with following(wire) as (feed, heard):
        seen = {}
        for now in (0.5, 1.5, 3.25, 4.0):
            await asyncio.sleep(now - asyncio.get_running_loop().time())
            seen[now] = round(feed.trusted_until(1, None), 3)
    # The first was written after the request was begun at 0, as far as is known, and the others so much later.
    assert seen == {0.5: 3.0, 1.5: 3.2, 3.25: 3.2, 4.0: 4.2}
    assert (len(wire.opened), heard.notes) == (1, ["first", "e1", "e2", "e3"])


@virtual_time
async def test_what_is_dated_is_never_newer_than_it_can_be() -> None:
    """A daemon's clock that runs ahead makes nothing new; one that was set back makes nothing old again."""
    wire = Wire([dated(BEGUN, 5.0), 1.0, dated(told(1), 9.0), 1.0, dated(told(2), 9.5), 1.0, dated(told(3), 8.0), 1e6])
    async with following(wire) as (feed, _):
        until = []
        for _ in range(4):
            await asyncio.sleep(0.5)
            until.append(feed.trusted_until(1, None))
            await asyncio.sleep(0.5)
    assert until == [3.0, 4.0, 4.5, 4.5]


@virtual_time
async def test_a_stream_that_takes_long_to_open_is_live_if_it_is_dated() -> None:
    """It says itself how old it is."""
    wire = Wire([dated(BEGUN, 0.0), 0.5], [2.0, dated(BEGUN, 100.0), 1.0, dated(told(1), 101.0), 1e6])
    async with following(wire, random=0.0) as (feed, heard):
        await asyncio.sleep(4)
        assert (feed.is_live, len(wire.opened)) == (True, 2)
        assert feed.trusted_until(1, None) == 0.5 + 1.0 + 3.0
    assert heard.notes == ["first", "e1"]


@virtual_time
async def test_a_stream_that_is_dated_is_opened_anew_now_and_then() -> None:
    """Every ten minutes, since clocks differ in how they run; soon, if it took long to open. Nobody notices."""
    beats: list[object] = [part for second in range(1, 700) for part in (1.0, dated(b"id: e-0\n\n", float(second)))]
    slow: list[object] = [part for second in range(1, 20) for part in (1.0, dated(b"id: e-0\n\n", float(second)))]
    wire = Wire([dated(BEGUN, 0.0), *beats], [1.5, dated(BEGUN, 0.0), *slow], [dated(BEGUN, 0.0), *beats])
    async with following(wire, random=0.5) as (feed, heard):
        await asyncio.sleep(630)
        assert feed.is_live
    assert wire.opened == [(0.0, None), (600.0, "e-0"), (611.5, "e-0")]
    assert heard.notes == ["first"]


RESET = b'id: e-9\nevent: reset\ndata: {"reason": "gone"}\n\n'


@pytest.mark.parametrize(
    ("sent", "notes"),
    [
        ([BEGUN, RESET, told(10)], ["first", "reset", "e10"]),
        ([RESET.replace(b'"reason"', b'"x"'), BEGUN.replace(b"e-0", b"e-9")], ["reset"]),
        ([BEGUN, told(1), told(1, "f")], ["first", "e1", "reset", "f1"]),
        ([BEGUN, told(5), told(4)], ["first", "e5", "reset", "e4"]),
        ([BEGUN, told(1).replace(b"key", b"constellation"), told(2)], ["first", "reset", "e2"]),
        ([BEGUN, b"id: e-1\nevent: weather\ndata: {}\n\n: x\n\n", told(2)], ["first", "e2"]),
        ([BEGUN, told(1).replace(b'"default"', b'"other"')], ["first"]),
        ([told(1), BEGUN.replace(b"e-0", b"e-1")], ["e1", "first"]),
    ],
)
@virtual_time
async def test_what_cannot_be_told_is_a_reset(sent: list[bytes], notes: list[str]) -> None:
    """A reset of the daemon; another log, or going back, without one; words that are not known."""
    async with following(Wire([*sent, 1e6])) as (_, heard):
        await asyncio.sleep(0.1)
    assert heard.notes == notes


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (b"id: 7\nevent: bust\ndata: {}\n\n", "without an id"),
        (b"id: x\nevent: reset\ndata: {}\n\n", "without an id"),
        (b"data: \xff\n\n", "not UTF-8"),
        (BEGUN.replace(b"1}", b"0}"), "heartbeat"),
        (BEGUN.replace(b"1}", b'"x"}'), "heartbeat"),
    ],
)
@virtual_time
async def test_a_stream_that_breaks_the_rules_is_begun_anew(broken: bytes, why: str) -> None:
    """Without a place, and with a reset when it is live: nobody knows what was missed."""
    begun = BEGUN.replace(b"e-0", b"e-5")
    wire = Wire([broken], [begun, told(6), 1.0, broken, 1.0], [begun, 1e6])
    async with following(wire, random=0.5) as (feed, heard):
        await asyncio.sleep(1.06)
        assert feed.trusted_until(1, 1e9) == -math.inf
        fault = feed.followers[0].fault
        assert fault is not None
        assert why in fault.message
        await asyncio.sleep(1.0)
    assert [after for _, after in wire.opened] == [None, None, None]
    assert heard.notes[:2] == ["reset", "e6"]
    assert set(heard.notes[2:]) == {"reset"}


@virtual_time
async def test_a_connection_that_breaks_before_it_is_live_still_owes_a_reset() -> None:
    """It has a place by then, and goes on from there; but what was before is not known."""
    wire = Wire([told(3)], [BEGUN.replace(b"e-0", b"e-3"), 1e6])
    async with following(wire) as (_, heard):
        await asyncio.sleep(1)
    assert [after for _, after in wire.opened] == [None, "e-3"]
    assert heard.notes == ["e3", "reset"]


@virtual_time
async def test_a_listener_that_fails_is_logged_and_loses_nothing_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """The stream is begun anew, with a reset."""

    class Failing(Heard):
        def busted(self, event: BustEvent) -> None:
            raise RuntimeError("of the test")

    async with following(Wire([BEGUN, told(1)], [BEGUN, 1e6]), listener=Failing()) as (_, heard):
        await asyncio.sleep(1)
    assert heard.notes == ["first", "reset"]
    assert "an unexpected error while the events of http://0 were followed" in caplog.text


@virtual_time
async def test_a_daemon_that_cannot_be_followed_is_logged_once_and_when_it_can_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A connection that is only made anew is no news."""
    caplog.set_level(logging.INFO, "pybustcall")
    down = Fault(FaultKind.UNREACHABLE, "http://0", "no connection could be made", "no")
    wire = Wire([BEGUN, 2.0], [down], [down], [BEGUN, 2.0], [BEGUN, 1e6])
    async with following(wire):
        await asyncio.sleep(10)
    assert [record.getMessage() for record in caplog.records] == [
        "the events of http://0 cannot be followed, which is tried again: no connection could be made",
        "the events of http://0 are followed again",
    ]


# How far they are trusted together


@virtual_time
async def test_a_live_stream_is_trusted_for_three_heartbeats_and_a_broken_one_for_its_grace() -> None:
    """From when it was heard last while it was live. A small grace ends the trust in silence sooner, too."""
    wire = Wire([BEGUN, 1.0, b"id: e-1\n\n", 1.0], [told(2), 1e6])
    async with following(wire) as (feed, _):
        assert feed.trusted_until(1, None) == -math.inf
        await asyncio.sleep(1.5)
        assert [feed.trusted_until(1, grace) for grace in (None, 100, 2, 0)] == [4.0, 4.0, 3.0, 2.5]
        assert feed.is_live
        await asyncio.sleep(1.0)  # it broke, and the next one has told something, but is not live
        assert not feed.is_live
        assert [feed.trusted_until(1, grace) for grace in (None, 100, 2, 0)] == [4.0, 101.0, 3.0, 1.0]
        assert feed.why_not() == "http://0: it ended its stream"


@virtual_time
async def test_as_many_daemons_as_needed_must_be_followed() -> None:
    """The trust ends with the one that is needed still, and was heard first."""
    late = BEGUN.replace(b"e-", b"f-")
    async with following(Wire([BEGUN, 1e6]), Wire([1.0, late, 1e6]), Wire([1e6])) as (feed, _):
        await asyncio.sleep(1.5)
        assert [feed.trusted_until(needed, None) for needed in (1, 2, 3)] == [4.0, 3.0, -math.inf]
        assert feed.why_not() == "http://2: not live yet"


@virtual_time
async def test_daemons_that_share_a_log_vouch_for_each_other() -> None:
    """If one breaks, the other tells what both bust."""
    wires = Wire([BEGUN, 1.0], [1e6]), Wire([BEGUN, *([0.5, b"id: e-1\n\n"] * 40), 1e6])
    async with following(*wires) as (feed, _):
        await asyncio.sleep(10.1)
        assert not feed.followers[0].is_live
        assert feed.is_live
        assert feed.trusted_until(2, None) == 13.0


def test_the_clock_goes_on() -> None:
    """It is the one that counts the time of sleep, where there is one."""
    assert clock() <= clock()


@virtual_time
async def test_whoever_listens_is_held_weakly() -> None:
    """One who is gone, or has left, is told nothing; the last one ends the feed."""
    ended: list[Feed] = []
    wire, now = Wire([BEGUN, 1.0, told(1), 1e6]), asyncio.get_running_loop().time
    feed = Feed([("http://0", wire)], Wanted(), random=lambda: 1.0, clock=now, idle=ended.append)
    heard, other, third = Heard(), Heard(), Heard()
    for listener in (heard, other, third):
        feed.join(listener)
    feed.start()
    await asyncio.sleep(0.5)
    feed.leave(other)
    feed.leave(other)
    del third, listener
    gc.collect()
    await asyncio.sleep(1)
    assert (heard.notes, other.notes) == (["first", "e1"], ["first"])
    assert repr(feed) == "Feed(default, 1 of 1 live, 1 listen)"
    assert ended == []
    del heard
    gc.collect()
    await asyncio.sleep(0.01)
    assert ended == [feed]
    await feed.aclose()
    await feed.aclose()


# A client's events


async def test_closing_that_is_cancelled_ends_whoever_waits_all_the_same() -> None:
    """Also if that happens before anything was ended."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        events = client.events()
        await events.wait_live(5)
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        closing = asyncio.create_task(events.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(StopAsyncIteration):
            async with asyncio.timeout(PATIENCE):
                await waiting
        await asyncio.wait({closing})


async def test_a_stream_that_was_closed_before_it_began_does_not_begin() -> None:
    """Nobody would end it."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        events = client.events()
        await events.aclose()
        for begin in (events.wait_live(), events.__aenter__()):
            with pytest.raises(ClientClosed, match="this stream of events was closed"):
                await begin
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        assert not daemon.followed


async def test_what_is_busted_is_told() -> None:
    """Of all kinds, with what went with it."""
    async with fake() as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        await events.wait_live(5)
        assert events.is_live
        await client.bust("a/b", strategy="direct")
        await client.bust("sale", kind="tag")
        await client.bust("elsewhere", namespace="other")
        daemon.tell("a", kind="prefix", soft=True, also=["x", "y"])
        first, second, third = await anext(events), await anext(events), await anext(events)
        assert (first, second) == (
            BustEvent(target="a/b", strategy="direct", daemon=daemon.url, id="fake-1"),
            BustEvent(target="sale", kind="tag", daemon=daemon.url, id="fake-2"),
        )
        assert third == BustEvent(target="a", kind="prefix", soft=True, also=("x", "y"), daemon=daemon.url, id="fake-4")
        assert "live, 1 listen), 0 waiting" in repr(events)


@asynccontextmanager
async def real(*, events_heartbeat: float = 0.3, **settings: Any) -> AsyncIterator[str]:
    """Serve the reference daemon over a cache in memory."""
    indexes = Indexes()
    engine = Engine([Layer(name="memory", number=0, backend=MemoryBackend(indexes))], indexes)
    runner = web.AppRunner(
        create_app(engine, DaemonSettings(events_heartbeat=events_heartbeat, **settings)), access_log=None
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_the_reference_daemon_tells_what_is_wanted_alone() -> None:
    """Below a prefix, or with a tag, in one namespace."""
    async with real() as url, BustcallClient(url) as client:
        async with client.events(prefix="a/ä&b", tags=["x+y"]) as events, client.events(namespace="shop") as shop:
            await events.wait_live(5)
            await shop.wait_live(5)
            await client.bust_many(["a/b", "a/ä&b/c", "z"], concurrency=1)
            await client.bust_many(["x", "x+y"], kind="tag", concurrency=1)
            await client.bust("z", namespace="shop")
            await client.bust("*", kind="all", confirm=True)
            assert await take(events, 3) == ["a/ä&b/c", "x+y", "*"]
            assert await take(shop, 1) == ["z"]


async def test_a_reader_that_was_cut_for_two_seconds_is_told_what_it_missed(tmp_path: Path) -> None:
    """Five keys that were busted meanwhile, in order, with the first that comes."""
    async with real(journal=tmp_path / "journal") as url, FaultyProxy(url) as proxy:
        async with BustcallClient(url) as writer, BustcallClient(proxy.url) as client, client.events() as events:
            await events.wait_live(5)
            proxy.trouble = Trouble(refuse=True)
            proxy.drop_connections()
            await writer.bust_many(map(str, range(5)), concurrency=1)
            await asyncio.sleep(2)
            assert not events.is_live
            proxy.heal()
            assert await take(events, 5) == ["0", "1", "2", "3", "4"]


async def test_a_reader_that_missed_what_is_no_longer_kept_is_told_to_forget(tmp_path: Path) -> None:
    """The reset comes first."""
    async with real(journal=tmp_path / "journal", events_most=3) as url, FaultyProxy(url) as proxy:
        async with BustcallClient(url) as writer, BustcallClient(proxy.url) as client, client.events() as events:
            await events.wait_live(5)
            proxy.trouble = Trouble(refuse=True)
            proxy.drop_connections()
            await writer.bust_many(map(str, range(5)), concurrency=1)
            proxy.heal()
            first = await anext(events)
            assert isinstance(first, Reset)
            assert (first.daemon, "no longer kept" in first.reason) == (proxy.url, True)
            await events.wait_live(5)
            await writer.bust("next")
            assert await take(events, 1) == ["next"]


async def test_whatever_is_cut_no_event_is_missed_without_a_reset() -> None:
    """A thousand busts while connections are cut at random places, and few events are kept."""
    chance = random.Random(7)
    async with real(events_most=20, events_heartbeat=0.2) as url, FaultyProxy(url, seed=7) as proxy:
        async with BustcallClient(url) as writer, BustcallClient(proxy.url) as client, client.events() as events:
            await events.wait_live(5)
            told: list[str] = []

            async def read() -> None:
                while not told or told[-1] != "end":
                    told.extend(await take(events, 1))

            reading = asyncio.create_task(read())
            for number in range(1000):
                if chance.random() < 0.05:
                    cut = chance.choice([Trouble(), Trouble(truncate=chance.randrange(2000), abrupt=True)])
                    proxy.trouble = cut
                    proxy.drop_connections()
                await writer.bust(str(number))
            proxy.heal()
            await events.wait_live(10)
            await writer.bust("end")
            await reading
    numbers = [int(text) for text in told[:-1] if text != "reset"]
    assert numbers == sorted(set(numbers))
    assert "reset" in told
    seen = -1
    may_miss = False
    for text in told[:-1]:
        if text == "reset":
            may_miss = True
        else:
            assert may_miss or int(text) == seen + 1
            seen, may_miss = int(text), False
    assert may_miss or seen == 999


async def test_a_silent_connection_is_noticed() -> None:
    """A black hole keeps the connection open; the events come over the next one."""
    async with fake(heartbeat=0.1) as daemon, FaultyProxy(daemon.url) as proxy:
        async with BustcallClient(proxy.url) as client, client.events() as events:
            await events.wait_live(5)
            proxy.trouble = Trouble(stall=True)
            await eventually(lambda: not events.is_live)
            daemon.tell("a")
            proxy.heal()
            assert await take(events, 1) == ["a"]


async def test_a_daemon_that_is_restarted_is_followed_again() -> None:
    """One that goes on with its log; another log is a reset."""
    async with fake() as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        await events.wait_live(5)
        await daemon.stop()
        daemon.tell("a")
        await daemon.start()
        assert await take(events, 1) == ["a"]
        await daemon.stop()
        daemon.forget_events("another")
        await daemon.start()
        assert await take(events, 1) == ["reset"]
        assert daemon.followed == [None, "fake-0", "fake-1"]


async def test_each_daemon_is_followed_or_the_one_that_is_named() -> None:
    """A daemon tells only of what it busted."""
    async with fake() as hub, fake() as peer, BustcallClient(hub.url, peers=[peer.url]) as client:
        hub.epoch, peer.epoch = "hub", "peer"
        async with client.events() as events, client.events(daemon=peer.url) as of_peer:
            await events.wait_live(5)
            await of_peer.wait_live(5)
            hub.tell("a")
            assert await take(events, 1) == ["a"]
            peer.tell("b")
            assert await take(events, 1) == ["b"]
            found = await anext(of_peer)
            assert isinstance(found, BustEvent)
            assert (found.target, found.daemon) == ("b", peer.url)


async def test_what_daemons_with_one_log_tell_comes_once() -> None:
    """One daemon with two addresses; each event by whoever tells it first."""
    async with fake() as daemon, FaultyProxy(daemon.url) as proxy:
        async with BustcallClient(daemon.url, peers=[proxy.url]) as client, client.events() as events:
            await events.wait_live(5)
            for number in range(1200):
                daemon.tell(str(number))
                if number % 100 == 0:
                    assert await take(events, 1 if not number else 100)
            proxy.drop_connections()
            daemon.tell("end")
            left = await take(events, 100)
            assert left[-1] == "end"


async def test_of_a_client_that_is_disabled_nothing_is_told() -> None:
    """It waits until it is closed, or its reader is cancelled; what cannot be wanted is refused as ever."""
    client = BustcallClient.disabled()
    with pytest.raises(InvalidRequest):
        client.events(prefix="")
    async with client.events(prefix="a", daemon="http://127.0.0.1:1") as events:
        await events.wait_live(5)
        assert (events.is_live, events.reason) == (True, "")
        reading = asyncio.ensure_future(anext(events, "the end"))
        await client.bust("a")
        await asyncio.sleep(0)
        assert not reading.done()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        reading = asyncio.ensure_future(anext(events, "the end"))
        await asyncio.sleep(0)
    assert await reading == "the end"


async def test_two_tasks_at_a_time_cannot_iterate() -> None:
    """They would share the events out among them; one after the other they can."""
    async with fake() as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="begin a stream for each"):
            await anext(events)
        await events.wait_live(5)
        daemon.tell("a")
        daemon.tell("b")
        told = [await first, await anext(events)]
        assert [event.target for event in told if isinstance(event, BustEvent)] == ["a", "b"]


async def test_a_slow_reader_is_told_to_forget_instead() -> None:
    """A thousand may wait."""
    async with fake() as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        await events.wait_live(5)
        for number in range(1003):
            daemon.tell(str(number))
        await eventually(lambda: "3 waiting" in repr(events))
        first = await anext(events)
        assert isinstance(first, Reset)
        assert first.reason == "more than 1000 events waited for a slow reader"
        assert await take(events, 2) == ["1001", "1002"]


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (Answer.problem(404), IncompatibleDaemon, "does not advertise events.stream"),
        (Answer.problem(401), NotAllowed, "wants a token"),
        (Answer.problem(403, "of another tenant"), NotAllowed, "of another tenant"),
    ],
)
async def test_a_hub_that_says_no_is_an_error(answer: Answer, error: type[Exception], said: str) -> None:
    """For whoever iterates, and for whoever waits until it is live."""
    async with fake(stream_plan=[answer] * 50) as daemon, BustcallClient(daemon.url) as client:
        events = client.events()
        with pytest.raises(error, match=said):
            await anext(events)
        with pytest.raises(error, match=said):
            await events.wait_live()
        await events.aclose()


async def test_a_daemon_without_events_is_an_error() -> None:
    """One that does not know the route."""
    async with FakeDaemon() as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        with pytest.raises(IncompatibleDaemon, match="tells nobody of its busts"):
            await anext(events)


async def test_a_peer_that_says_no_is_told_once() -> None:
    """What it busts is missed."""
    async with fake() as hub, FakeDaemon() as peer, BustcallClient(hub.url, peers=[peer.url]) as client:
        async with client.events() as events:
            found = await anext(events)
            assert isinstance(found, Reset)
            assert (found.daemon, "events.stream" in found.reason) == (peer.url, True)
            hub.tell("a")
            assert await take(events, 1) == ["a"]


async def test_a_hub_that_says_no_later_is_asked_again() -> None:
    """It was followed before: somebody may be replacing it."""
    async with fake() as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        await events.wait_live(5)
        daemon.stream_plan.extend([Answer.problem(404), Answer.problem(429, retry_after=0), Answer.problem(503)])
        daemon.drop_connections()
        daemon.tell("a")
        assert await take(events, 1) == ["a"]


@pytest.mark.parametrize(
    "answer", [Answer.page(), Answer.redirect("http://elsewhere"), Answer(reset=True), Answer(raw=b"SSH-2.0\r\n")]
)
async def test_what_is_no_stream_is_asked_again(answer: Answer) -> None:
    """Whatever it may be."""
    async with fake(stream_plan=[answer]) as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        await events.wait_live(5)
        daemon.tell("a")
        while await take(events, 1) != ["a"]:
            pass  # a reset, unless the request was sent again so soon that nobody noticed
        assert len(daemon.followed) == 2


async def test_a_stream_that_is_cut_inside_an_event_is_read_again_from_the_one_before() -> None:
    """Half an event is none."""
    cut = b'id: fake-0\nevent: live\ndata: {"heartbeat": 5}\n\n' + told(1, "fake")[:-5]
    async with fake(stream_plan=[cut]) as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        await events.wait_live(5)
        daemon.tell("a")
        daemon.drop_connections()
        assert await take(events, 1) == ["a"]


async def test_a_daemon_that_wants_to_know_the_client_is_told() -> None:
    """And then it lets it follow."""
    async with FakeDaemon(
        capabilities=["daemon.negotiate", "events.stream"], advertises={"requires": {"capabilities": ["cache.bust"]}}
    ) as daemon:
        async with BustcallClient(daemon.url) as client, client.events() as events:
            await events.wait_live(5)
        assert daemon.advertised


# Connections


async def test_streams_take_no_slot_of_the_pool() -> None:
    """With one slot, ten streams and a bust go on at once; and the connections count as open sessions."""
    async with fake() as daemon, BustcallClient(daemon.url, pool=Pool(total=1, per_daemon=1)) as client:
        streams = [client.events() for _ in range(10)]
        for events in streams:
            await events.wait_live(5)
        assert (await client.bust("a")).ok
        pool = client.statistics().pool
        assert (pool.in_use, pool.sessions) == (0, 2)
        for events in streams:
            assert await take(events, 1) == ["a"]
            await events.aclose()
            await events.aclose()


async def test_streams_go_over_unix_sockets(tmp_path: Path) -> None:
    """As other requests do."""
    async with fake(socket=tmp_path / "s") as daemon, BustcallClient(daemon.url) as client:
        async with client.events() as events:
            await events.wait_live(5)
            await client.bust("a")
            assert await take(events, 1) == ["a"]


async def test_streams_go_over_tls_with_the_token(server_tls: ssl.SSLContext, ca_file: Path) -> None:
    """And a false certificate is an error that names it."""
    async with fake(tls=server_tls) as daemon:
        async with BustcallClient(daemon.url, tls=TLS(ca=ca_file), token="secret") as client:
            async with client.events() as events:
                await events.wait_live(5)
        async with BustcallClient(daemon.url) as client, client.events() as events:
            with pytest.raises(Panic, match="certificate"):
                await anext(events)


async def test_a_token_opens_a_stream() -> None:
    """The reference daemon lets nobody else follow."""
    async with real(token="secret") as url:
        async with BustcallClient(url, token="secret") as client, client.events() as events:
            await events.wait_live(5)
        async with BustcallClient(url) as client, client.events() as events:
            with pytest.raises(NotAllowed):
                await anext(events)


async def test_a_session_that_was_passed_in_is_used_and_left_open() -> None:
    """For streams, too."""
    import aiohttp

    async with aiohttp.ClientSession() as session, fake() as daemon:
        async with BustcallClient(daemon.url, session=session) as client, client.events() as events:
            await events.wait_live(5)
        assert not session.closed


# The end


async def test_following_that_somebody_else_cancels_ends_for_all_to_see() -> None:
    """Who iterates comes to the end; a near cache follows anew when it is asked the next time."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        events, cache = client.events(), client.near_cache(ttl=None)
        await events.wait_live(PATIENCE)
        await cache.wait_trusted(PATIENCE)
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        for task in asyncio.all_tasks():
            if task.get_name() == "pybustcall-events":
                task.cancel()
        with pytest.raises(StopAsyncIteration):
            async with asyncio.timeout(PATIENCE):
                await waiting
        assert (events.is_live, cache.is_trusted) == (False, False)
        await cache.wait_trusted(PATIENCE)


async def test_iterating_ends_when_the_client_is_closed() -> None:
    """And with the stream itself; waiting until it is live says so."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        events, other = client.events(), client.events()
        reading = asyncio.create_task(take_all(events))
        await events.wait_live(5)
        await other.wait_live(5)
        own_end = asyncio.create_task(take_all(other))
        daemon.tell("a")
        await asyncio.sleep(0.05)
        await other.aclose()
        assert await own_end == ["a"]
        await client.aclose()
        assert await reading == ["a"]
        assert [event async for event in events] == []
        with pytest.raises(ClientClosed):
            await events.wait_live()
        with pytest.raises(ClientClosed):
            await anext(client.events())
        assert repr(other).startswith("EventStream(ended")


async def take_all(events: EventStream) -> list[str]:
    return [event.target if isinstance(event, BustEvent) else "reset" async for event in events]


async def test_waiting_for_an_event_can_be_cancelled() -> None:
    """And what comes after is still told."""
    async with fake() as daemon, BustcallClient(daemon.url) as client, client.events() as events:
        await events.wait_live(5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(events)
        daemon.stream_plan.append(Answer(hang=True))
        with pytest.raises(TimeoutError):
            await client.events().wait_live(0.05)
        daemon.tell("a")
        assert await take(events, 1) == ["a"]


async def test_a_stream_that_is_dropped_ends_by_itself() -> None:
    """Its connection is closed, and its tasks are gone."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        async for _ in _one(client, daemon):
            break
        gc.collect()
        await eventually(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "pybustcall-events"])


async def _one(client: BustcallClient, daemon: FakeDaemon) -> AsyncIterator[object]:
    events = client.events()
    await events.wait_live(5)
    daemon.tell("a")
    async for event in events:
        yield event


async def test_a_client_that_is_dropped_open_follows_no_more() -> None:
    """It warns, and its tasks end."""
    async with fake() as daemon:
        client = BustcallClient(daemon.url)
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        del cache
        held = [client]
        del client
        with pytest.warns(ResourceWarning, match="was dropped open"):
            held.clear()
        await eventually(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "pybustcall-events"])
        with warnings.catch_warnings():  # its session is closed by nobody, which is what was warned of
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


async def test_begun_by_two_at_once_it_is_one_stream() -> None:
    """By who iterates and by who waits for it to be live."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        events = client.events()
        reading, waiting = asyncio.create_task(take(events, 2)), asyncio.create_task(events.wait_live(5))
        await events.wait_live(5)
        await waiting
        daemon.tell("a")
        daemon.tell("b")
        assert await reading == ["a", "b"]
        await events.aclose()


def test_a_stream_belongs_to_one_loop() -> None:
    """Another one is told so, and the loop's end ends it."""
    client = BustcallClient("http://127.0.0.1:1")
    events = client.events()
    assert repr(events) == "EventStream(not begun, 0 waiting)"

    async def begin() -> None:
        with pytest.raises(TimeoutError):
            await events.wait_live(0.01)

    async def again() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(events)

    asyncio.run(begin())
    asyncio.run(again())
    asyncio.run(client.aclose())
