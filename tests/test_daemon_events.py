"""The log of events and its readers: who is told what, in which order, and who must forget."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.clock import clock
from pybustcall.daemon import DaemonSettings, Engine, Indexes, Layer, MemoryBackend, create_app
from pybustcall.daemon.app import DAEMON
from pybustcall.daemon.events import (
    LEAP,
    MOST_ALSO,
    MOST_PENDING_BYTES,
    BustEvent,
    Events,
    Interest,
    Reader,
    TooManyReaders,
)
from pybustcall.daemon.journal import Entry, Journal, Wish
from pybustcall.daemon.journal import _Store as Store
from pybustcall.errors import ConfigurationError
from pybustcall.keys import covers, is_variant
from pybustcall.models import DEFAULT_NAMESPACE
from pybustcall.sse import StreamParser
from tests.conftest import PATIENCE, eventually, virtual_time
from tests.test_daemon_jobs import AWAY, house
from tests.test_daemon_journal import in_thread, spoil_in_use

if TYPE_CHECKING:
    Client = TestClient[web.Request, web.Application]

EVERYTHING = Interest(DEFAULT_NAMESPACE)


def event(target: str = "a", **more: Any) -> BustEvent:
    return BustEvent(**{"namespace": DEFAULT_NAMESPACE, "kind": "key", "target": target, "tags": (), **more})


def parsed(text: bytes) -> list[tuple[str, str, Any]]:
    """Read a stream's text: each event with its id and what it says; a heartbeat is one of no name."""
    found = []
    for one in text.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in one.split("\n"))
        data = json.loads(lines["data"]) if "data" in lines else None
        found.append((lines.get("event", ""), lines["id"], data))
    return found


async def due(reader: Reader) -> list[tuple[str, str]]:
    """Tell what is due to a reader by now: names and what was busted."""
    found: list[tuple[str, str]] = []
    while True:
        try:
            async with asyncio.timeout(0.001):
                text = await anext(reader)
        except TimeoutError:
            return found
        found += [(name, (said or {}).get("target", "")) for name, _, said in parsed(text)]


# Whom an event concerns


KEYS = st.sampled_from(["a", "a/b", "a/b/c", "a/bc", "a?x", "a.gz", "a.gz?x", "a/b?y", "b", "a/", "a/b/"])
EVENTS = st.builds(
    event,
    target=KEYS,
    kind=st.sampled_from(["key", "prefix", "tag", "all"]),
    strategy=st.sampled_from(["direct", "dimensional", "hybrid"]),
    namespace=st.sampled_from([DEFAULT_NAMESPACE, "shop"]),
    also=st.lists(KEYS, max_size=2).map(tuple),
    tags=st.none() | st.lists(st.sampled_from(["b", "t", "u"]), max_size=2).map(tuple),
)
INTERESTS = st.builds(
    Interest,
    st.sampled_from([DEFAULT_NAMESPACE, "shop"]),
    st.frozensets(KEYS, max_size=3),
    st.frozensets(st.sampled_from(["a", "b", "t", "u"]), max_size=2),
)


@given(interests=st.lists(INTERESTS, max_size=8), told=EVENTS)
def test_the_router_finds_exactly_those_whom_an_event_concerns(interests: list[Interest], told: BustEvent) -> None:
    """By look-ups what asking each of them would tell; nobody is left in its tables who has gone."""
    events = Events()
    readers = [events.follow(interest) for interest in interests]
    expected = {reader for reader in readers if reader.interest.concerns(told)}
    assert events._router.concerned(told) == expected
    for reader in readers:
        reader.close()
        reader.close()
    assert events.readers == 0
    assert events._router.concerned(told) == set()
    router = events._router
    tables = router._everything, router._tagged, router._of_tags, router._below, router._some
    assert tables == ({}, {}, {}, {}, {})


@given(told=EVENTS, prefixes=st.frozensets(KEYS, min_size=1, max_size=3), held=KEYS)
def test_a_reader_of_a_prefix_is_told_of_whatever_could_be_below_it(
    told: BustEvent, prefixes: frozenset[str], held: str
) -> None:
    """Whatever a bust names or reaches that lies below a prefix concerns the reader of that prefix."""
    if told.kind == "tag" or not any(covers(prefix, held) for prefix in prefixes):
        return
    named = [*told.also, told.target]
    gone = (
        told.kind == "all"
        or held in named
        or (told.kind == "prefix" and covers(told.target, held))
        or (told.strategy != "direct" and any(is_variant(key, held) for key in named))
    )
    if gone:
        assert Interest(told.namespace, prefixes).concerns(told)


def test_a_tag_goes_to_those_who_want_it_or_hold_what_bears_it() -> None:
    """Of prefixes as far as the daemon knows what bears the tag."""
    told = event("t", kind="tag", also=("products/7",))
    assert Interest(DEFAULT_NAMESPACE, tags=frozenset({"t"})).concerns(told)
    assert Interest(DEFAULT_NAMESPACE, frozenset({"products"})).concerns(told)
    assert not Interest(DEFAULT_NAMESPACE, frozenset({"t"})).concerns(told)
    assert not Interest(DEFAULT_NAMESPACE, tags=frozenset({"products/7"})).concerns(told)


def test_whoever_wants_a_tag_is_told_of_all_that_may_bear_it() -> None:
    """As the registry knows; where it does not, or there are too many tags, of everything."""
    wants = Interest(DEFAULT_NAMESPACE, tags=frozenset({"sale"}))
    assert wants.concerns(event("products/9", tags=("new", "sale")))
    assert not wants.concerns(event("products/9", tags=("new",)))
    assert wants.concerns(event("products/9", tags=None))
    assert not Interest(DEFAULT_NAMESPACE, frozenset({"x"})).concerns(event("products/9", tags=None))
    many = event(tags=tuple(map(str, range(1001)))), event(tags=("x" * 40_000, "y" * 40_000))
    assert [one.bounded().tags for one in many] == [None, None]
    assert event(tags=tuple(map(str, range(1000)))).bounded().tags is not None


def test_one_that_names_very_many_keys_is_told_as_everything() -> None:
    """So that no event is large, and nobody misses any of them."""
    few = event(also=tuple(map(str, range(MOST_ALSO))))
    assert few.bounded() is few
    for also in (tuple(map(str, range(MOST_ALSO + 1))), ("x" * 40_000, "y" * 40_000)):
        assert event(also=also, soft=True).bounded() == event("*", kind="all", soft=True, tags=None)


# Following


@virtual_time
async def test_readers_are_live_at_once_and_told_of_what_comes() -> None:
    """In order, each with its id; those who want other things are told nothing."""
    events = Events(heartbeat=3.0)
    events.tell(event("before"))
    reader = events.follow(EVERYTHING)
    elsewhere = events.follow(Interest("shop"))
    assert parsed(await anext(reader)) == [("live", f"{events.epoch}-1", {"heartbeat": 3.0})]
    events.tell(event("a", soft=True))
    events.tell(event("b", kind="prefix", strategy="hybrid", also=("x",)))
    first, second = parsed(await anext(reader))
    assert first == (
        "bust", f"{events.epoch}-2",
        {"namespace": "default", "kind": "key", "target": "a", "soft": True, "strategy": "dimensional"},
    )  # fmt: skip
    assert (second[1], second[2]["kind"], second[2]["also"]) == (f"{events.epoch}-3", "prefix", ["x"])
    now = asyncio.get_running_loop().time()
    assert parsed(await anext(reader)) == [("", f"{events.epoch}-3", None)]
    assert asyncio.get_running_loop().time() - now == pytest.approx(3.0)
    assert [name for name, _, _ in parsed(await anext(elsewhere))] == ["live"]
    assert parsed(await anext(elsewhere)) == [("", f"{events.epoch}-3", None)]  # so that it comes back from there
    assert repr(events) == f"Events({events.epoch}-3, 3 kept, 2 readers)"


async def test_a_heartbeat_says_nothing_of_what_is_still_due() -> None:
    """Where an event comes as the heartbeat is due, on a loop that was late: its id must not be told before it."""
    events = Events(heartbeat=0.01)
    reader = events.follow(EVERYTHING)
    assert await due(reader) == [("live", "")]
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()

    def late() -> None:
        time.sleep(0.02)
        loop.call_soon(events.tell, event("a"))  # runs before the timeout, in the same turn of the loop

    loop.call_soon(late)
    [(name, place, _)] = parsed(await waiting)
    assert (name, place) == ("bust", f"{events.epoch}-1")


async def test_who_comes_back_is_told_what_was_missed_before_being_live() -> None:
    """Only what concerns it, also where that is spread over much else; what comes meanwhile comes after it."""
    events = Events()
    for number in range(1000):
        events.tell(event(f"a/{number}" if number % 400 == 0 else f"b/{number}"))
    reader = events.follow(Interest(DEFAULT_NAMESPACE, frozenset({"a"})), after=f"{events.epoch}-1")
    assert parsed(await anext(reader))[0][2]["target"] == "a/400"
    events.tell(event("a/new"))
    assert await due(reader) == [("bust", "a/800"), ("bust", "a/new"), ("live", "")]


@pytest.mark.parametrize(
    "after",
    ["{epoch}-2", "{epoch}-14", "other-5", "", "5", "{epoch}-", "{epoch}-x", "{epoch}-²", "{epoch}-" + "9" * 30],
)
async def test_who_asks_for_what_is_not_kept_must_forget(after: str) -> None:
    """Because it is too old, was never given, or is of another epoch; what follows is told as ever."""
    events = Events(most=10)
    for number in range(13):
        events.tell(event(str(number)))
    reader = events.follow(EVERYTHING, after=after.format(epoch=events.epoch))
    [(name, place, said)] = parsed(await anext(reader))
    assert (name, place) == ("reset", f"{events.epoch}-13")
    assert set(said) == {"reason"}
    events.tell(event("next"))
    assert await due(reader) == [("bust", "next"), ("live", "")]
    kept = events.follow(EVERYTHING, after=f"{events.epoch}-3")
    assert (await due(kept))[0] == ("reset", "")  # by now 4 is gone, too
    assert (await due(events.follow(EVERYTHING, after=f"{events.epoch}-4")))[0] == ("bust", "4")


async def test_a_reader_that_falls_behind_is_dropped_to_a_reset() -> None:
    """Nothing is kept for it beyond so many events, and it goes on from the newest."""
    events = Events(most_pending=3)
    reader = events.follow(EVERYTHING)
    assert await due(reader) == [("live", "")]
    for number in range(3):
        events.tell(event(str(number)))
    assert await due(reader) == [("bust", "0"), ("bust", "1"), ("bust", "2")]
    for number in range(5):
        events.tell(event(str(number)))
    assert not reader._pending
    [(name, place, _)] = parsed(await anext(reader))
    assert (name, place) == ("reset", f"{events.epoch}-8")
    events.tell(event("next"))
    assert await due(reader) == [("bust", "next")]


async def test_what_nothing_is_due_after_says_what_time_it_is() -> None:
    """So that a reader knows how old it is, however long it was on its way; what more is due after says nothing."""
    events = Events(heartbeat=0.01)
    reader = events.follow(EVERYTHING)
    blocks = StreamParser()
    begun = clock()

    async def dates() -> list[float | None]:
        return [block.at for block in blocks.feed(await anext(reader))]

    (live,) = await dates()
    for number in range(3):
        events.tell(event(str(number)))
    first, second, last = await dates()
    (beat,) = await dates()
    assert (first, second) == (None, None)
    assert live is not None
    assert last is not None
    assert beat is not None
    assert begun - 0.001 <= live <= last <= beat <= clock() + 0.001
    for number in range(20):
        events.tell(event(f"{number}/" + "x" * 8000))
    told = [await dates() for _ in range(3)]
    assert [len(dates) for dates in told] == [9, 9, 2]
    assert [date for dates in told for date in dates][:-1] == [None] * 19
    assert told[-1][-1] is not None


async def test_a_reader_is_owed_no_more_than_so_many_bytes() -> None:
    """They are told in pieces, also to whoever comes back; beyond that it must forget. One event is always told."""
    events = Events()
    reader = events.follow(EVERYTHING)
    assert await due(reader) == [("live", "")]
    also = tuple(f"{number}/" + "é" * 300 for number in range(100))
    for number in range(12):
        events.tell(event(f"{number}", also=also))
    back = events.follow(EVERYTHING, after=f"{events.epoch}-0")
    assert reader._pending_bytes < MOST_PENDING_BYTES
    for who in (reader, back):
        assert [len(parsed(await anext(who))) for _ in range(6)] == [2] * 6
    for number in range(17):
        events.tell(event(f"{number}", also=also))
    assert (reader._pending_bytes, len(reader._pending)) == (0, 0)
    assert await due(reader) == [("reset", "")]
    events.tell(event("x" * (MOST_PENDING_BYTES + 1)))
    assert [name for name, _ in await due(reader)] == ["bust"]


async def test_what_is_dropped_while_somebody_catches_up_is_a_reset() -> None:
    """The log goes on while it is read."""
    events = Events(most=600)
    for number in range(600):
        events.tell(event(str(number)))
    reader = events.follow(EVERYTHING, after=f"{events.epoch}-0")
    assert len(parsed(await anext(reader))) == 250
    for number in range(300):
        events.tell(event(str(number)))
    assert await due(reader) == [("reset", ""), ("live", "")]


async def test_the_log_keeps_no_more_than_its_bytes_and_always_the_newest() -> None:
    """However large that one is."""
    events = Events(most_bytes=1000)
    for number in range(10):
        events.tell(event(str(number)))
    assert len(events._kept) == 4
    events.tell(event("x" * 2000))
    assert list(events._kept) == [11]


async def test_readers_are_counted_for_each_principal() -> None:
    """One too many is refused; who goes makes room."""
    events = Events(most_readers=2)
    first, _ = events.follow(EVERYTHING, whose="a"), events.follow(EVERYTHING, whose="a")
    with pytest.raises(TooManyReaders, match=r"^2 readers"):
        events.follow(EVERYTHING, whose="a")
    events.follow(EVERYTHING, whose="b")
    first.close()
    events.follow(EVERYTHING, whose="a")


async def test_all_readers_end_with_the_log() -> None:
    """Those who wait, and those who come later."""
    events = Events()
    reader = events.follow(EVERYTHING)
    assert await due(reader) == [("live", "")]
    waiting = asyncio.ensure_future(anext(reader, b"the end"))
    await asyncio.sleep(0)
    events.close()
    assert await waiting == b"the end"
    assert [text async for text in events.follow(EVERYTHING)] == []


# Over restarts


@asynccontextmanager
async def kept(path: Path | None, *, most: int = 20) -> AsyncIterator[tuple[Journal, Events]]:
    journal = Journal(path)
    await journal.open()
    events = Events(most=most)
    events.attach(journal)
    try:
        yield journal, events
    finally:
        await journal.close()


async def killed(path: Path, *told: BustEvent, flush: bool = True) -> Events:
    """Tell events through a journal whose process then ends without closing it."""
    journal = Journal(path)
    await journal.open()
    events = Events(most=20)
    events.attach(journal)
    for one in told:
        events.tell(one)
    if flush:
        await journal.flush()
    journal._new_events.clear()  # so that closing writes no more than a kill does
    journal._store.close_stream = lambda db: None  # type: ignore[method-assign]  # noqa: ARG005
    await journal.close()
    return events


async def test_a_log_that_was_closed_goes_on_where_it_ended(tmp_path: Path) -> None:
    """With what it had kept, and far beyond its numbers; nobody is told to forget."""
    async with kept(tmp_path / "j") as (_, events):
        for number in range(30):
            events.tell(event(str(number), also=("x", "ü"), soft=True, kind="prefix", tags=None))
        before, place = list(events._kept.values()), events.place
    async with kept(tmp_path / "j") as (_, events):
        assert list(events._kept.values()) == before
        assert 30 + LEAP <= events.newest < 30 + 2 * LEAP
        assert await due(events.follow(EVERYTHING, after=place)) == [("live", "")]
        assert (await due(events.follow(EVERYTHING, after=f"{events.epoch}-28")))[:2] == [
            ("bust", "28"),
            ("bust", "29"),
        ]
        assert (await due(events.follow(EVERYTHING, after=f"{events.epoch}-9")))[0] == ("reset", "")
        events.tell(event("next"))
        assert (await due(events.follow(EVERYTHING, after=place))) == [("bust", "next"), ("live", "")]
        assert (await due(events.follow(EVERYTHING, after=f"{events.epoch}-31")))[0] == ("reset", "")


async def test_numbers_that_a_killed_process_may_have_given_are_given_to_nothing_else(tmp_path: Path) -> None:
    """What it told last was not written. Who was told it comes back with its number, and misses nothing later."""
    before = await killed(tmp_path / "j", event("written"))
    lost = await killed(tmp_path / "j", event("lost"), flush=False)
    assert lost.epoch == before.epoch
    async with kept(tmp_path / "j") as (_, events):
        assert events.epoch == before.epoch
        events.tell(event("again"))
        assert events.newest > 1 + 2 * LEAP
        assert await due(events.follow(EVERYTHING, after=lost.place)) == [("bust", "again"), ("live", "")]
        assert await due(events.follow(EVERYTHING, after=before.place)) == [("bust", "again"), ("live", "")]


async def test_who_read_on_in_a_journal_that_was_lost_must_forget(tmp_path: Path) -> None:
    """A copy from before was put back. Whatever is told since then has numbers that nobody has read."""
    async with kept(tmp_path / "j") as (_, events):
        events.tell(event("old"))
        old = events.place
    copy = (tmp_path / "j").read_bytes()
    async with kept(tmp_path / "j") as (_, events):
        for number in range(3):
            events.tell(event(f"lost {number}"))
        lost = [f"{events.epoch}-{events.newest - number}" for number in range(4)]
    (tmp_path / "j").write_bytes(copy)
    for told in (["new 0"], ["new 0", "new 1"], ["new 0", "new 1", "new 2"]):
        async with kept(tmp_path / "j") as (_, events):
            events.tell(event(told[-1]))
            for place in lost:
                assert (await due(events.follow(EVERYTHING, after=place)))[0] == ("reset", "")
            found = await due(events.follow(EVERYTHING, after=old))
            assert found == [*(("bust", target) for target in told), ("live", "")]


@pytest.mark.parametrize("what", ["inode", "boot"])
async def test_a_copy_of_a_journal_that_is_used_elsewhere_is_another_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Beside its original, or on another machine: two daemons with one epoch would vouch for each other."""
    async with kept(tmp_path / "j") as (_, events):
        events.tell(event())
        place = events.place
    there = tmp_path / ("copy" if what == "inode" else "j")
    if what == "inode":
        there.write_bytes((tmp_path / "j").read_bytes())
    else:
        monkeypatch.setattr("pybustcall.daemon.journal._boot", lambda: "another")
    async with kept(there) as (_, events):
        assert events.place.rpartition("-")[0] != place.rpartition("-")[0]
        assert (await due(events.follow(EVERYTHING, after=place)))[0] == ("reset", "")
        events.tell(event("b"))
        place = events.place
    async with kept(there) as (_, events):
        assert await due(events.follow(EVERYTHING, after=place)) == [("live", "")]
        assert [kept.target for kept in events._kept.values()] == ["b"]


async def test_who_missed_nothing_that_is_gone_need_not_forget_over_any_number_of_processes(tmp_path: Path) -> None:
    """However few they told; and whoever missed what is gone must, over as many."""
    places: list[str] = []
    for number in range(4):
        async with kept(tmp_path / "j", most=3) as (_, events):
            places.append(events.place)
            if number:
                events.tell(event(f"{number}"))
    async with kept(tmp_path / "j", most=3) as (_, events):
        for seen, place in enumerate(places):
            missed = [("bust", f"{number}") for number in range(max(1, seen), 4)]
            assert await due(events.follow(EVERYTHING, after=place)) == [*missed, ("live", "")]
        events.tell(event("4"))  # for which the first goes
    async with kept(tmp_path / "j", most=3) as (_, events):
        assert (await due(events.follow(EVERYTHING, after=places[1])))[0] == ("reset", "")
        assert (await due(events.follow(EVERYTHING, after=places[2])))[0] == ("bust", "2")


async def test_who_followed_a_process_that_told_nothing_need_not_forget(tmp_path: Path) -> None:
    """However it ended."""
    async with kept(tmp_path / "j") as (_, events):
        places = [events.place]
    places += [(await killed(tmp_path / "j")).place for _ in range(3)]
    async with kept(tmp_path / "j") as (_, events):
        for place in places:
            assert await due(events.follow(EVERYTHING, after=place)) == [("live", "")]


async def test_a_deleted_journal_is_another_epoch(tmp_path: Path) -> None:
    """And so is each process without a file."""
    async with kept(tmp_path / "j") as (_, events):
        events.tell(event())
        place = events.place
    (tmp_path / "j").unlink()
    for path in (tmp_path / "j", None):
        async with kept(path) as (_, events):
            assert (await due(events.follow(EVERYTHING, after=place)))[0] == ("reset", "")
            events.tell(event())


@pytest.mark.parametrize("many", [0, 20])
async def test_a_file_damaged_in_the_midst_of_the_work_is_replaced_by_one_with_all_events(
    tmp_path: Path, many: int
) -> None:
    """The epoch stays, and no number is given twice, since this process knows all of it."""
    await killed(tmp_path / "j")
    async with kept(tmp_path / "j") as (journal, events):
        for number in range(many):
            events.tell(event(str(number) * 500, tags=None))
        await journal.flush()
        await in_thread(journal, partial(spoil_in_use, tmp_path / "j"))
        assert await journal.find("1" * 32) is None  # which meets the damage
        assert (tmp_path / "j.corrupt-1").exists()
        events.tell(event("new", tags=None))
        await journal.flush()
        before, place = list(events._kept.values()), events.place
        assert events.newest > LEAP
    async with kept(tmp_path / "j") as (_, events):
        assert list(events._kept.values()) == before
        assert await due(events.follow(EVERYTHING, after=place)) == [("live", "")]


def copy_files(source: Path, there: Path) -> None:
    """Copy a journal as a kill would leave it."""
    for path in source.glob("j*"):
        if "corrupt" not in path.name:
            (there / path.name).write_bytes(path.read_bytes())


async def test_who_is_killed_before_the_new_file_has_all_events_has_lost_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that readers must forget, whatever they have read."""
    monkeypatch.setattr(Store, "_origin", lambda _: (0, ""))  # what is copied below is taken for the file itself
    monkeypatch.setattr("pybustcall.daemon.journal._LINGER", 60.0)
    (tmp_path / "killed").mkdir()
    async with kept(tmp_path / "j") as (journal, events):
        for number in range(5):
            events.tell(event(str(number) * 500))
        await journal.flush()
        places = [f"{events.epoch}-{events.newest - number}" for number in range(6)]
        await in_thread(journal, partial(spoil_in_use, tmp_path / "j"))
        assert await journal.find("1" * 32) is None  # which meets the damage
        copy_files(tmp_path, tmp_path / "killed")
    async with kept(tmp_path / "killed" / "j") as (_, events):
        for place in places:
            assert (await due(events.follow(EVERYTHING, after=place)))[0] == ("reset", "")
    async with kept(tmp_path / "j") as (_, events):
        for place in places[:-1]:
            assert (await due(events.follow(EVERYTHING, after=place)))[-1] == ("live", "")
        assert await due(events.follow(EVERYTHING, after=places[0])) == [("live", "")]


async def test_where_nothing_can_be_noted_at_the_start_another_epoch_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk numbers could be given twice, so that they must be of an epoch that nobody finds again."""
    async with kept(tmp_path / "j") as (_, events):
        events.tell(event())
        place = events.place

    def refuse(*_args: Any, **_more: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("pybustcall.daemon.journal._Store._note_start", refuse)
        async with kept(tmp_path / "j") as (_, events):
            assert (await due(events.follow(EVERYTHING, after=place)))[0] == ("reset", "")
            other = events.epoch
    async with kept(tmp_path / "j") as (_, events):
        assert events.epoch != other
        assert await due(events.follow(EVERYTHING, after=place)) == [("live", "")]


async def test_a_disk_on_which_there_is_room_later_has_the_events_of_the_epoch_that_began_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none under the numbers of the one before, whose readers must forget."""
    async with kept(tmp_path / "j") as (_, events):
        for number in range(3):
            events.tell(event(f"old {number}"))
        place = events.place
    real, full = Store._note_start, True

    def note(*arguments: Any) -> None:
        if full:
            raise sqlite3.OperationalError("database or disk is full")
        real(*arguments)

    monkeypatch.setattr(Store, "_note_start", note)
    async with kept(tmp_path / "j") as (journal, events):
        epoch = events.epoch
        full = False
        events.tell(event("new"))
        await journal.flush()
        new = events.place
    async with kept(tmp_path / "j") as (_, events):
        assert events.epoch == epoch
        assert (await due(events.follow(EVERYTHING, after=place)))[0] == ("reset", "")
        assert await due(events.follow(EVERYTHING, after=new)) == [("live", "")]
        assert [kept.target for kept in events._kept.values()] == ["new"]


def test_a_file_on_another_device_is_another(tmp_path: Path) -> None:
    """Files of two volumes may have one inode."""
    (tmp_path / "j").touch()
    store = Store(tmp_path / "j", 1.0, 1, time.time_ns)
    assert store._origin()[1].endswith(f":{(tmp_path / 'j').stat().st_dev}")


async def test_a_damage_that_is_found_at_the_start_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is set aside, and the new one is another epoch."""
    async with kept(tmp_path / "j") as (_, events):
        events.tell(event())
        epoch = events.epoch
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("UPDATE events SET kind = 'odd'")
    db.close()
    async with kept(tmp_path / "j") as (_, events):
        assert events.epoch != epoch
    assert "an event has no such kind" in caplog.text


@pytest.mark.parametrize("version", [1, 2])
async def test_a_journal_of_a_version_before_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    """It keeps its busts, and its epoch, if it had one."""
    journal = Journal(tmp_path / "j")
    await journal.open()
    wish = Wish(namespace=DEFAULT_NAMESPACE, kind="key", target="a", strategy="direct")
    await journal.begin(Entry(job="1" * 32, wish=wish, at=1))
    epoch = journal.epoch
    await journal.close()
    with sqlite3.connect(tmp_path / "j") as db:
        db.executescript("DROP TABLE spans; DROP TABLE origin; ALTER TABLE faults DROP COLUMN namespace")
        if version == 1:
            db.executescript("DROP TABLE events; DROP TABLE stream")
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    journal = Journal(tmp_path / "j")
    [entry] = await journal.open()
    assert (entry.wish.target, len(journal.epoch), journal.epoch == epoch) == ("a", 16, version == 2)
    assert journal.spans == (() if version == 1 else ((0, 0),))
    await journal.close()


async def test_an_event_is_never_written_after_what_was_put_later(tmp_path: Path) -> None:
    """So whoever finds a bust that is over finds its event, too, whenever the process was killed."""
    journal = Journal(tmp_path / "j")
    await journal.open()
    events = Events()
    events.attach(journal)
    wish = Wish(namespace=DEFAULT_NAMESPACE, kind="key", target="a", strategy="direct")
    entry = await journal.begin(Entry(job="1" * 32, wish=wish, at=1))
    batches: list[Any] = []
    write = journal._store.write

    def noting(batch: Any, db: sqlite3.Connection) -> bool:
        batches.append(batch)
        return write(batch, db)

    journal._store.write = noting  # type: ignore[method-assign]
    for state in ("waiting", "done"):
        events.tell(event())
        journal.put(replace(entry, state=state))
        await journal.flush()
    await journal.close()
    written: set[int] = set()
    for batch in batches:
        written |= batch.events.keys()
        for one in batch.puts.values():
            assert len(written) >= (1 if one.state == "waiting" else 2)
    assert written == {1, 2}


# When busts are told of


def targets_of(told: Sequence[BustEvent]) -> list[str]:
    return [one.target for one in told]


async def test_a_bust_is_told_of_once_the_layers_are_done_and_before_its_answer(tmp_path: Path) -> None:
    """With what depends on it, as far as the registry knows; a second time with the second bust."""
    told: list[tuple[BustEvent, list[str]]] = []
    async with house(tmp_path / "j", settle=0.01) as it:
        it.jobs.tell = lambda one: told.append((one, it.inner.keys))
        it.jobs.engine.indexes.of(DEFAULT_NAMESPACE).add("page", ["a"])
        it.inner.put("a", "b")
        answer = await it.bust(soft=False)
        [(first, left)] = told
        assert (first, left) == (event("a", also=("page",)), ["b"])
        await it.over(answer)
        assert [one for one, _ in told] == [first, first]


async def test_what_only_the_registry_knows_to_bear_a_tag_is_told(tmp_path: Path) -> None:
    """And what depends on that; of a direct bust only the first."""
    told: list[BustEvent] = []
    async with house(tmp_path / "j") as it:
        it.jobs.tell = told.append
        index = it.jobs.engine.indexes.of(DEFAULT_NAMESPACE)
        index.add("registered", tags=["t"])
        index.add("page", ["registered"])
        await it.bust("t", kind="tag", strategy="direct")
        await it.bust("t", kind="tag")
        assert [(one.target, one.also) for one in told] == [("t", ("registered",)), ("t", ("registered", "page"))]


BEARERS = {"products/9": ["sale"], "products/9.gz": ["packed"], "page": ["pages"], "page?x": ["asked"], "x": ["none"]}


@pytest.mark.parametrize(
    ("asked", "tags"),
    [
        ({"target": "products/9"}, {"sale", "packed", "pages", "asked"}),
        ({"target": "products/9", "strategy": "direct"}, {"sale"}),
        ({"target": "products", "kind": "prefix"}, {"sale", "packed", "pages", "asked"}),
        ({"target": "products", "kind": "prefix", "strategy": "direct"}, {"sale", "packed"}),
        ({"target": "sale", "kind": "tag"}, {"sale", "packed", "pages", "asked"}),
        ({"target": "sale", "kind": "tag", "strategy": "direct"}, {"sale"}),
        ({"target": "shelf"}, {"pages", "asked"}),
        ({"target": "nothing"}, set()),
    ],
)
async def test_an_event_has_the_tags_of_all_that_it_hit(tmp_path: Path, asked: dict[str, str], tags: set[str]) -> None:
    """Of the named, of variants and of dependents, as far as they are registered; the second time, too."""
    told: list[BustEvent] = []
    async with house(tmp_path / "j", settle=0.01) as it:
        it.jobs.tell = told.append
        index = it.jobs.engine.indexes.of(DEFAULT_NAMESPACE)
        for key, of in BEARERS.items():
            index.add(key, ["products/9", "shelf"] if key == "page" else [], tags=of)
        answer = await it.bust(**asked)
        for key in BEARERS:
            index.remove(key)
        await it.over(answer)
    assert [None if one.tags is None else set(one.tags) for one in told] == [tags, tags]


async def test_where_very_many_are_hit_their_tags_are_not_told_apart(tmp_path: Path) -> None:
    """A thousand keys are looked at. Nor are they where nobody has looked yet, or only a process before this one."""
    told: list[BustEvent] = []
    async with house(tmp_path / "j", pause=lambda _: 60.0) as it:
        it.jobs.tell = told.append
        index = it.jobs.engine.indexes.of(DEFAULT_NAMESPACE)
        for number in range(1000):
            index.add(f"a/{number}", tags=["t"])
        await it.bust("a", kind="prefix")
        index.remove("a/0")
        await it.bust("a", kind="prefix")
        await it.bust("t", kind="tag", strategy="direct")
        assert it.jobs.engine.bust(Wish(namespace="x", kind="key", target="a", strategy="direct")).borne.tags is None
        assert [one.tags for one in told] == [None, ("t",), ("t",)]
        it.inner.failure = AWAY
        await it.bust("a/1")
        assert told.pop().tags == ("t",)
    it.jobs.tell = told.append
    await it.jobs.prepare()
    it.jobs.start()
    assert told.pop().tags is None
    await it.jobs.close()


async def test_an_answer_that_comes_early_is_not_given_before_it_is_told(tmp_path: Path) -> None:
    """Of what takes long, of a layer that fails, and of the direct part of hybrid; each again when it is done."""
    told: list[BustEvent] = []
    async with house(tmp_path / "j", answer_within=0.01) as it:
        it.jobs.tell = told.append
        it.inner.put("slow", "slow.gz")
        it.inner.passing.clear()
        slow = await it.bust("slow")
        assert (slow.accepted, targets_of(told)) == (True, ["slow"])
        it.inner.passing.set()
        await it.over(slow)
        it.inner.failure = AWAY
        away = await it.bust("away")
        it.inner.failure = None
        await it.over(away)
        assert targets_of(told) == ["slow", "slow", "away", "away"]
        it.inner.put("h", "h.gz")
        it.inner.widening.clear()
        hybrid = await it.bust("h", strategy="hybrid")
        assert (hybrid.accepted, targets_of(told)[4:]) == (True, ["h"])
        it.inner.widening.set()
        await it.over(hybrid)
        assert targets_of(told)[4:] == ["h", "h"]


async def test_a_restart_with_busts_that_are_not_over_tells_that_all_was_busted_before_anything_else(
    tmp_path: Path,
) -> None:
    """Once in each namespace: what was told before may not have been written, and what went with it be forgotten."""
    told: list[BustEvent] = []
    async with house(tmp_path / "k", pause=lambda _: 60.0) as it:
        it.inner.failure = AWAY
        await it.bust("a")
        await it.bust("b")
        await it.bust("c", namespace="other")
    it.inner.failure = None
    it.jobs.tell = told.append
    await it.jobs.prepare()
    it.jobs.start()
    assert [(event.kind, event.namespace) for event in told] == [("all", DEFAULT_NAMESPACE), ("all", "other")]
    await eventually(lambda: not it.jobs._runs)
    assert targets_of(told)[2:] == ["a", "b", "c"]
    await it.jobs.close()


@pytest.mark.parametrize("hangs", [True, False])
async def test_what_goes_with_it_is_told_even_if_no_layer_could_be_visited(tmp_path: Path, hangs: bool) -> None:
    """It is down, or has not answered in time: who holds what depends on it must not serve it meanwhile."""
    told: list[BustEvent] = []
    async with house(tmp_path / "j", pause=lambda _: 60.0) as it:
        index = it.jobs.engine.indexes.of(DEFAULT_NAMESPACE)
        index.add("page", ["a"], tags=["t"])
        it.jobs.tell = told.append
        gate = asyncio.Event()
        if hangs:
            begin = it.inner.begin

            async def wait(*arguments: Any, **more: Any) -> int:
                await gate.wait()
                return await begin(*arguments, **more)

            it.inner.begin = wait  # type: ignore[method-assign]
        else:
            it.inner.failure = AWAY
        answer = await it.bust("a", within=0.01)
        assert answer.accepted
        assert [(one.target, one.also, one.tags) for one in told] == [("a", ("page",), ("t",))]
        gate.set()


async def test_nothing_is_told_of_what_was_refused_or_only_counted(tmp_path: Path) -> None:
    """For nothing was removed."""
    told: list[BustEvent] = []
    async with house(tmp_path / "j") as it:
        it.jobs.tell = told.append
        with pytest.raises(ValueError, match="strategy"):
            await it.bust(strategy="sideways")
        await it.jobs.count(Wish(namespace=DEFAULT_NAMESPACE, kind="key", target="a", strategy="direct"))
        assert told == []


# Over HTTP


@asynccontextmanager
async def serving(*layers: Layer, **settings: Any) -> AsyncIterator[Client]:
    indexes = Indexes()
    given_layers = layers or (Layer(name="memory", number=0, backend=MemoryBackend(indexes)),)
    app = create_app(Engine(given_layers, indexes), DaemonSettings(**{"events_heartbeat": 0.05, **settings}))
    async with TestClient(TestServer(app)) as client:
        yield client


class Stream:
    """What a reader over HTTP has got so far."""

    def __init__(self, response: Any) -> None:
        self.response = response
        self.found: list[tuple[str, str, Any]] = []
        self._text = b""

    async def until(self, name: str, target: str | None = None) -> None:
        """Read on until there is such an event."""
        async with asyncio.timeout(PATIENCE):
            while not any(one == name and (target is None or said["target"] == target) for one, _, said in self.found):
                text = await self.response.content.readany()
                assert text, "the stream has ended"
                whole, mark, rest = (self._text + text).rpartition(b"\n\n")
                self.found += parsed(whole + mark)
                self._text = rest

    @property
    def busted(self) -> list[str]:
        return [said["target"] for name, _, said in self.found if name == "bust"]


@asynccontextmanager
async def following(client: Client, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    async with client.get(f"/api/v1/events{query}", headers=headers) as response:
        assert response.status == 200, await response.text()
        stream = Stream(response)
        await stream.until("live")
        yield stream


async def bust(client: Client, target: str = "a", **fields: Any) -> None:
    async with client.post("/api/v1/bust", json={"target": target, **fields}) as response:
        assert response.status == 200, await response.text()


async def test_a_stream_tells_what_is_busted_while_it_lasts() -> None:
    """Server-sent events that no proxy keeps; what was asked for, and no other namespace's."""
    async with (
        serving() as client,
        following(client) as everything,
        following(client, "?prefix=products/&tag=shelf&prefix=x") as some,
        following(client, "?namespace=shop") as shop,
    ):
        assert everything.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert everything.response.headers["Cache-Control"] == "no-store"
        await bust(client, "products/7")
        await bust(client, "other")
        await bust(client, "shelf", kind="tag")
        await bust(client, "hers", namespace="shop")
        await bust(client, "*", kind="all", confirm=True)
        await everything.until("bust", "*")
        await some.until("bust", "*")
        await shop.until("bust", "hers")
        assert everything.busted == ["products/7", "other", "shelf", "*"]
        assert some.busted == ["products/7", "shelf", "*"]
        assert shop.busted == ["hers"]


async def test_who_wants_a_tag_is_told_of_what_takes_its_entries() -> None:
    """Their keys, what they lie below, what they are made of, and the tag; not of what was registered with another."""
    async with serving() as client, following(client, "?tag=sale") as stream:
        for target, kind in (("products/9", "key"), ("products", "prefix"), ("part", "key"), ("sale", "tag")):
            for key, tags in (("products/9", ["sale"]), ("other", ["new"])):
                entry = {"key": key, "depends_on": ["part"] if tags == ["sale"] else [], "tags": tags}
                async with client.post("/api/v1/entries", json=entry) as response:
                    assert response.status == 200, await response.text()
            await bust(client, "other")
            await bust(client, target, kind=kind)
            await stream.until("bust", target)
        assert stream.busted == ["products/9", "products", "part", "sale"]


async def test_a_stream_goes_on_after_the_last_event_that_was_read(tmp_path: Path) -> None:
    """Over a restart, too; with another journal it begins with a reset."""
    async with serving(journal=tmp_path / "j") as client, following(client) as stream:
        await bust(client, "a")
        await stream.until("bust", "a")
        place = stream.found[-1][1]
        await bust(client, "b")
    async with serving(journal=tmp_path / "j") as client:
        async with following(client, **{"Last-Event-ID": place}) as stream:
            assert (stream.busted, stream.found[-1][0]) == (["b"], "live")
    async with serving(journal=tmp_path / "k") as client:
        async with following(client, **{"Last-Event-ID": place}) as stream:
            assert [name for name, _, _ in stream.found] == ["reset", "live"]


async def test_a_hot_swap_tells_of_what_it_busts(tmp_path: Path) -> None:
    """In each namespace that has something made of it, and written down before the swap goes on."""
    async with serving(journal=tmp_path / "j") as client, following(client) as stream:
        for path, body in (
            ("dependencies", {"name": "model", "versions": ["1.0.0", "1.1.0"], "current": "1.0.0"}),
            ("entries", {"key": "page", "depends_on": ["model"]}),
            ("hotswap", {"swaps": [{"name": "model", "to": "1.1.0"}]}),
        ):
            async with client.post(f"/api/v1/{path}", json=body) as response:
                assert response.status == 200, await response.text()
        await stream.until("bust", "model")
        [(_, _, said)] = [it for it in stream.found if it[0] == "bust"]
        assert (said["kind"], said["also"]) == ("key", ["page"])


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("?namespace=", "namespace"),
        ("?namespace=a&namespace=b", "namespace"),
        ("?namespace=../x", "namespace"),
        ("?namespace=unserved", "namespace"),
        ("?prefix=", "prefix"),
        ("?tag=a%0Ab", "tag"),
        ("?" + "&".join(["prefix=a"] * 101), "prefix"),
    ],
)
async def test_what_cannot_be_wanted_is_refused(query: str, field: str) -> None:
    """Naming the field; what was sent is not repeated."""
    async with (
        serving(namespaces=(DEFAULT_NAMESPACE,)) as client,
        client.get(f"/api/v1/events{query}") as response,
    ):
        told = await response.json()
        assert (response.status, told["field"]) == (422, field)


async def test_the_head_of_a_stream_ends() -> None:
    """There is nothing to wait for."""
    async with serving() as client, client.head("/api/v1/events") as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")


async def test_one_reader_too_many_is_told_to_come_back_and_who_goes_makes_room() -> None:
    """Going is noticed with the next thing that is written."""
    async with serving(max_readers=1) as client:
        async with following(client):
            async with client.get("/api/v1/events") as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "0")
        events = client.server.app[DAEMON]._events  # type: ignore[attr-defined]
        await eventually(lambda: events.readers == 0)
        async with following(client):
            pass


async def test_streams_end_when_the_daemon_stops() -> None:
    """At once: no daemon waits for its readers to go."""
    async with serving() as client, following(client) as stream:
        client.server.app[DAEMON].stop()  # type: ignore[attr-defined]
        async with asyncio.timeout(PATIENCE):
            await stream.response.content.read()


async def test_a_reader_that_takes_nothing_in_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events were dropped for a reset long before, so that it held nobody and nothing up."""
    monkeypatch.setattr("pybustcall.daemon.app._SLOW", 0.05)
    async with serving(max_body_bytes=10**6) as client:
        events = client.server.app[DAEMON]._events  # type: ignore[attr-defined]
        async with client.get("/api/v1/events") as response:
            assert response.status == 200
            assert response.connection is not None
            transport: Any = response.connection.transport
            transport.pause_reading()
            texts = iter(range(10**6))

            def told_and_gone() -> bool:
                for _ in range(100):
                    events.tell(event(f"{next(texts)}{'x' * 8000}"))
                return bool(events.readers == 0)

            await eventually(told_and_gone)


async def test_the_stream_is_closed_to_those_without_the_token() -> None:
    """It tells what is busted, which is nobody else's to know."""
    async with serving(token="secret") as client:
        async with client.get("/api/v1/events") as response:
            assert response.status == 401
        async with following(client, Authorization="Bearer secret") as stream:
            assert stream.found[0][0] == "live"


async def test_a_tenants_token_opens_its_own_namespace_and_nothing_else() -> None:
    """Whatever it asks for: streams, busts, entries, jobs, and what concerns all tenants."""
    tokens = {"shop": "of-shop", "bank": "of-bank"}
    shop, operator = {"Authorization": "Bearer of-shop"}, {"Authorization": "Bearer root"}
    async with serving(tenants=tokens, operator_token="root") as client:

        async def ask(method: str, path: str, said: dict[str, str], **body: Any) -> tuple[int, Any]:
            async with client.request(method, f"/api/v1/{path}", json=body or None, headers=said) as response:
                return response.status, await response.json()

        for query in ("", "?namespace=bank", "?namespace=bank&prefix=a", "?namespace=default&tag=t"):
            status, told = await ask("GET", f"events{query}", shop)
            assert (status, told["field"]) == (403, "namespace")
            assert "for the namespace shop only" in told["detail"]
        assert (await ask("GET", "events", {}))[0] == 401
        async with (
            following(client, "?namespace=shop", **shop) as ours,
            following(client, "?namespace=bank", **operator) as theirs,
        ):
            for namespace, said in (("bank", operator), ("shop", operator), ("shop", shop)):
                status, told = await ask("POST", "bust", said, target=f"{namespace}/1", namespace=namespace)
                assert status == 200, told
            assert (await ask("POST", "bust", shop, target="a", namespace="bank"))[0] == 403
            assert (await ask("POST", "bust", shop, target="a"))[0] == 403
            assert (await ask("POST", "entries", shop, key="a", namespace="bank"))[0] == 403
            assert (await ask("POST", "entries", shop, key="a", namespace="shop"))[0] == 200
            await ask("POST", "bust", shop, target="end", namespace="shop")
            await ask("POST", "bust", operator, target="end", namespace="bank")
            await ours.until("bust", "end")
            await theirs.until("bust", "end")
            assert ours.busted == ["shop/1", "shop/1", "end"]
            assert theirs.busted == ["bank/1", "end"]
        all_jobs = (await ask("GET", "jobs", operator))[1]["jobs"]
        jobs = (await ask("GET", "jobs", shop))[1]["jobs"]
        assert [job["target"] for job in jobs] == ["end", "shop/1", "shop/1"]
        assert {job["who"] for job in all_jobs} == {"operator", "tenant shop"}
        other = next(job["job"] for job in all_jobs if job["target"] == "bank/1")
        for method, path in (("GET", f"jobs/{other}"), ("DELETE", f"jobs/{other}")):
            assert (await ask(method, path, shop))[0] == 404
        assert (await ask("GET", f"jobs?before={other}", shop))[0] == 422
        assert (await ask("GET", f"jobs?before={jobs[0]['job']}", shop))[0] == 200
        assert (await ask("DELETE", f"jobs/{jobs[0]['job']}", shop))[0] == 200
        for method, path, body in (
            ("GET", "dependencies", {}),
            ("POST", "dependencies", {"name": "m", "versions": ["1.0.0"]}),
            ("POST", "dependencies/forget", {"name": "m"}),
            ("POST", "hotswap", {"swaps": [{"name": "m", "to": "1.0.0"}]}),
        ):
            assert (await ask(method, path, shop, **body))[0] == 403
        assert (await ask("GET", "status", shop))[0] == 200


async def test_the_status_tells_a_tenant_nothing_of_others(tmp_path: Path) -> None:
    """Neither what they were refused, nor how often anybody was, nor how much all hold; an operator sees everything."""
    tokens = {"shop": "of-shop", "bank": "of-bank"}
    settings = {"tenants": tokens, "operator_token": "root", "journal": tmp_path / "j"}

    async def status(client: TestClient[Any, Any], token: str) -> Any:
        async with client.get("/api/v1/status", headers={"Authorization": f"Bearer {token}"}) as response:
            return await response.json()

    async with serving(**settings) as client:
        for token in ("of-bank", "of-shop", "of-bank", "wrong"):
            said = {"Authorization": f"Bearer {token}"}
            async with client.get("/api/v1/events?namespace=default", headers=said) as response:
                assert response.status in {401, 403}
            async with client.post("/api/v1/bust", json={"target": ""}, headers=said) as response:
                assert response.status in {401, 422}
        before = await status(client, "root")
    async with serving(**settings) as client:  # also after a restart
        everything, ours = await status(client, "root"), await status(client, "of-shop")
        assert everything["fault_history"] == before["fault_history"]
        told = [it["message"] for it in ours["fault_history"]]
        assert told[0] == "this token is for the namespace shop only, which the request must say"
        assert [it for it in everything["fault_history"] if it["message"] in told[:1]] == ours["fault_history"][:1]
        assert len(told) == 2
        assert "bank" not in str(ours)
        assert ours["cache_size"] == "unknown" != everything["cache_size"]


@pytest.mark.parametrize(
    ("tenants", "why"),
    [
        ({"": "t"}, "tenant ''"),
        ({"bank": "t"}, "this namespace is not allowed"),
        ({"shop": "same"}, "its token must be no other's, too"),
        ({"shop": "t", "default": "t"}, "its token must be no other's, too"),
        ({"shop": "a b"}, "visible ASCII"),
    ],
)
def test_tenants_that_cannot_be_are_refused(tenants: dict[str, str], why: str) -> None:
    """Before the daemon serves; nothing shows a token."""
    settings = DaemonSettings(tenants=tenants, token="same", namespaces=("default", "shop"))
    with pytest.raises(ConfigurationError, match=why) as caught:
        create_app(Engine([], Indexes()), settings)
    assert caught.value.setting == "tenants"
    assert "same" not in repr(settings)


def test_with_a_tenants_token_the_daemon_may_listen_to_others() -> None:
    """And what is protected is not advertised as public."""
    create_app(Engine([], Indexes()), DaemonSettings(host="0.0.0.0", tenants={"shop": "t"}))
