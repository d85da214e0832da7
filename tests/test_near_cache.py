"""Near caches: what is served, what is loaded, and what comes too late to be held."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall import BustcallClient
from pybustcall.errors import ClientClosed, ConfigurationError, IncompatibleDaemon, InvalidRequest, NotAllowed
from pybustcall.events import BustEvent, Feed, Wanted
from pybustcall.hotswap import Swap
from pybustcall.near_cache import NearCache, Shelf
from pybustcall.testing import Answer, FakeDaemon, FaultyProxy, Trouble
from tests.conftest import PATIENCE, eventually, virtual_time
from tests.event_wires import Line, live, told
from tests.test_events import EVENTS, KEYS, fake

# What is held


TAGS = st.frozensets(st.sampled_from(["a", "b", "t"]), max_size=2)
DEEP = "a/b" + "/c" * 70


@given(
    steps=st.lists(st.tuples(st.one_of(KEYS, st.just(DEEP)), TAGS), max_size=12),
    dropped=st.lists(KEYS, max_size=4),
    event=EVENTS,
)
def test_an_event_finds_exactly_what_it_concerns(
    steps: list[tuple[str, frozenset[str]]], dropped: list[str], event: BustEvent
) -> None:
    """By look-ups what asking of each entry would tell; and no trace is left of what has gone."""
    shelf = Shelf(100)
    model = dict(steps)
    for key, tags in steps:
        assert shelf.put(key, key, tags, 0.0) == 0
    for key in dropped:
        assert shelf.drop(key) == (model.pop(key, None) is not None)
    expected = {key for key, tags in model.items() if event.concerns(key, tags)}
    assert shelf.concerned(event) == expected
    assert shelf.bust(event) == len(expected)
    assert len(shelf) == len(model) - len(expected)
    for key in model:
        shelf.drop(key)
    assert [shelf._entries, shelf._tagged, shelf._below, shelf._variants, shelf._deep] == [{}, {}, {}, {}, set()]


def test_long_keys_take_no_more_memory_than_they_have() -> None:
    """They are found by their prefixes, of which each would be as long as they are."""
    shelf = Shelf(1000)
    tracemalloc.start()
    for number in range(100):
        shelf.put(f"{number}" + f"/{'x' * 120}" * 60, None, frozenset(), 0.0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 100 * 2 * 7300
    assert shelf.concerned(BustEvent(target=f"7/{'x' * 120}", kind="prefix")) == {"7" + f"/{'x' * 120}" * 60}


def test_what_was_not_asked_for_longest_goes() -> None:
    """Once there are more than may be."""
    shelf = Shelf(2)
    assert [shelf.put(key, key, frozenset(), 0.0) for key in "ab"] == [0, 0]
    shelf.find("a")
    assert shelf.put("c", "c", frozenset(), 0.0) == 1
    assert [key for key in "abc" if shelf.find(key)] == ["a", "c"]
    assert shelf.put("a", "again", frozenset(), 0.0) == 0
    assert shelf.clear() == 2


# On streams that a test writes


class Source:
    """What is loaded: a version for each key, which takes a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.version = 1
        self.loads: list[float] = []

    async def load(self) -> int:
        version = self.version
        self.loads.append(round(asyncio.get_running_loop().time(), 3))
        await asyncio.sleep(self.seconds)
        return version


@asynccontextmanager
async def near(
    *lines: Line, needed: int | None = None, beats: bool = False, **settings: Any
) -> AsyncIterator[NearCache]:
    """Make a near cache on streams that a test writes, by the loop's clock; its streams are live at once."""
    now = asyncio.get_running_loop().time
    feed = Feed([(f"http://{n}", line) for n, line in enumerate(lines)], Wanted(), random=lambda: 1.0, clock=now)

    async def join(namespace: str, /) -> Feed:
        return feed

    cache = NearCache(
        join,
        **{"maxsize": 10, "ttl": None, "namespace": None, "grace": None, **settings},
        needed=needed or len(lines),
        clock=now,
    )
    feed.start()
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await cache.wait_trusted(0.001)
    for number, line in enumerate(lines):
        line.say(live(0, f"log{number}" if number else "e"))
    await cache.wait_trusted(1)
    beating = asyncio.create_task(beat(lines if beats else ()))
    try:
        yield cache
    finally:
        beating.cancel()
        await feed.aclose()


async def beat(lines: Iterable[Line]) -> None:
    """Let streams say that they are there, each second."""
    while True:
        await asyncio.sleep(1)
        for line in lines:
            line.say(b": beat\n\n")


def bust(number: int, target: str, kind: str = "key", **more: str) -> bytes:
    """Write the event of a bust."""
    return (
        told(number)
        .replace(f"e{number}".encode(), target.encode(), 2)
        .replace(f"id: {target}".encode(), f"id: e-{number}".encode())
        .replace(b'"key"', f'"{kind}"'.encode())
    )


@virtual_time
async def test_a_value_is_loaded_once_and_then_served() -> None:
    """By whoever asks; a hundred at a time are one load."""
    source = Source(1.0)
    async with near(Line()) as cache:
        values = await asyncio.gather(*(cache.get_or_load("a", source.load) for _ in range(100)))
        assert await cache.get_or_load("a", source.load) == 1
        assert (values, source.loads, len(cache)) == ([1] * 100, [0.001], 1)
        told = cache.statistics()
        assert (told.hits, told.misses, told.loads, told.size, told.maxsize) == (1, 100, 1, 1, 10)
        assert (told.trusted, told.reason, told.namespace) == (True, "", "default")
        assert repr(cache) == "NearCache(default, 1 of 10, trusted)"


async def test_a_plain_loader_will_do_and_none_is_a_value() -> None:
    """It must not block."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        calls: list[str] = []

        def load() -> str | None:
            calls.append("a")
            return None

        for _ in range(3):
            assert await cache.get_or_load("a", load) is None
        assert len(calls) == 1


@virtual_time
async def test_an_entry_ends_with_its_time_counted_from_when_its_loading_began() -> None:
    """However long that took."""
    source = Source(2.0)
    async with near(Line(), ttl=5.0, beats=True) as cache:
        await cache.get_or_load("a", source.load)
        await asyncio.sleep(2.9)
        await cache.get_or_load("a", source.load)
        assert len(source.loads) == 1
        await asyncio.sleep(0.2)
        await cache.get_or_load("a", source.load)
        assert len(source.loads) == 2
        assert cache.statistics().expired == 1


@virtual_time
async def test_no_more_is_held_than_may_be() -> None:
    """What was not asked for longest goes."""
    source = Source()
    async with near(Line(), maxsize=2) as cache:
        for key in "abca":
            await cache.get_or_load(key, source.load)
        assert len(source.loads) == 4
        assert (len(cache), cache.statistics().evicted) == (2, 2)


@pytest.mark.parametrize(
    ("told_of", "left"),
    [
        (BustEvent(target="a/b"), {"a", "a/b/c", "x"}),
        (BustEvent(target="a/b", strategy="direct"), {"a", "a/b.gz", "a/b/c", "x"}),
        (BustEvent(target="a", kind="prefix"), {"x"}),
        (BustEvent(target="t", kind="tag"), {"a", "a/b", "a/b.gz", "a/b/c"}),
        (BustEvent(target="t", kind="tag", also=("a",)), {"a/b", "a/b.gz", "a/b/c"}),
        (BustEvent(target="*", kind="all"), set()),
        (BustEvent(target="a/b", soft=True), {"a", "a/b/c", "x"}),
    ],
)
async def test_what_is_busted_is_dropped(told_of: BustEvent, left: set[str]) -> None:
    """With what went with it; a soft bust drops, too."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        keys = ("a", "a/b", "a/b.gz", "a/b/c", "x")
        for key in keys:
            await cache.get_or_load(key, lambda: 1, tags=["t"] if key == "x" else [])
        daemon.tell("a/b", namespace="other")
        daemon.tell(told_of.target, kind=told_of.kind, strategy=told_of.strategy, also=told_of.also, soft=told_of.soft)
        await eventually(lambda: cache.statistics().dropped)
        assert {key for key in keys if cache.drop(key)} == left


@virtual_time
async def test_a_value_that_was_loaded_before_a_bust_is_not_held_after_it() -> None:
    """It is given to who asked before; who asks after gets another, at once."""
    source, line = Source(10.0), Line()
    async with near(line) as cache:
        old = asyncio.create_task(cache.get_or_load("a", source.load))
        await asyncio.sleep(1)
        source.version = 2
        line.say(bust(1, "b"), bust(2, "a"))
        await asyncio.sleep(1)
        new = asyncio.create_task(cache.get_or_load("a", source.load))
        for _ in range(20):
            line.say(b"id: e-2\n\n")
            await asyncio.sleep(1)
        assert (await old, await new) == (1, 2)
        assert source.loads == [0.001, 2.001]
        assert await cache.get_or_load("a", source.load) == 2
        assert (cache.statistics().refused, len(source.loads)) == (1, 2)


@virtual_time
async def test_who_asked_after_the_loading_began_gets_no_value_that_was_busted_meanwhile() -> None:
    """The bust may have been acknowledged before he asked, and its event come after: the value is loaded once more."""
    source, line = Source(4.0), Line()
    async with near(line) as cache:
        first = asyncio.create_task(cache.get_or_load("a", source.load))
        await asyncio.sleep(1)
        source.version = 2
        later = [asyncio.create_task(cache.get_or_load("a", source.load)) for _ in range(10)]
        await asyncio.sleep(1)
        line.say(bust(1, "a"))
        await asyncio.sleep(2)
        line.say(bust(2, "a"))  # which they asked before, this time
        assert await first == 1
        assert [await one for one in later] == [2] * 10
        assert source.loads == [0.001, 4.001]


@pytest.mark.parametrize("kind", ["tag", "prefix", "all"])
@virtual_time
async def test_busts_of_all_kinds_refuse_what_is_being_loaded(kind: str) -> None:
    """By its tags, its branch, or whatever it is."""
    source, line = Source(1.0), Line()
    async with near(line) as cache:
        loading = asyncio.create_task(cache.get_or_load("t/a", source.load, tags=["t"]))
        await asyncio.sleep(0.5)
        line.say(bust(1, "t", kind))
        assert await loading == 1
        assert (len(cache), cache.statistics().refused) == (0, 1)


@virtual_time
async def test_who_joins_with_a_tag_that_was_busted_before_gets_another_value() -> None:
    """And one that names a further tag in time has the entry found by it, too."""
    source, line = Source(2.0), Line()
    async with near(line, beats=True) as cache:
        first = asyncio.create_task(cache.get_or_load("a", source.load))
        await asyncio.sleep(0.5)
        joins = asyncio.create_task(cache.get_or_load("a", source.load, tags=["t"]))
        await asyncio.sleep(0.5)
        line.say(bust(1, "u", "tag"))
        await asyncio.sleep(0.1)
        differs = asyncio.create_task(cache.get_or_load("a", source.load, tags=["u"]))
        await asyncio.gather(first, joins, differs)
        assert source.loads == [0.001, 1.101]
        line.say(bust(2, "u", "tag"))
        await asyncio.sleep(0.1)
        assert len(cache) == 0


@virtual_time
async def test_who_goes_over_to_another_loading_brings_no_tag_to_it_that_was_busted_since() -> None:
    """What he asked for before is refused, and the next was begun by somebody who knew of no tag: it is not held."""
    line, first, second = Line(), Source(1.0), Source(2.0)
    async with near(line, beats=True) as cache:
        asked = [asyncio.create_task(cache.get_or_load("k", first.load)) for _ in range(1)]
        await asyncio.sleep(0.1)
        joins = asyncio.create_task(cache.get_or_load("k", first.load, tags=["t"]))
        await asyncio.sleep(0.1)
        line.say(bust(1, "k"))
        await asyncio.sleep(0.1)
        asked.append(asyncio.create_task(cache.get_or_load("k", second.load)))
        await asyncio.sleep(0.1)
        second.version = 2
        line.say(bust(2, "t", "tag"))
        assert await joins == 1
        assert await asyncio.gather(*asked) == [1, 1]
        assert len(cache) == 0
        assert await cache.get_or_load("k", second.load, tags=["t"]) == 2


@virtual_time
async def test_tags_that_calls_before_have_named_are_of_the_next_value_too() -> None:
    """Where it is loaded anew since one that is named now may have been busted, and where nothing may be served."""
    line, source = Line(), Source()
    async with near(line, beats=True) as cache:
        await cache.get_or_load("k", source.load, tags=["x"])
        line.say(bust(1, "unrelated", "tag"))
        await asyncio.sleep(0.1)
        await cache.get_or_load("k", source.load, tags=["y"])
        source.version = 2
        line.say(bust(2, "x", "tag"))
        await asyncio.sleep(0.1)
        assert await cache.get_or_load("k", source.load) == 2


@virtual_time
async def test_an_older_loading_takes_the_place_of_no_newer_value() -> None:
    """Whoever began it knew of no tag; the tag was busted, and another who knew it has loaded since."""
    line, slow, quick = Line(), Source(1.0), Source()
    async with near(line, beats=True) as cache:
        asked = asyncio.create_task(cache.get_or_load("k", slow.load))
        await asyncio.sleep(0.1)
        line.say(bust(1, "t", "tag"))
        await asyncio.sleep(0.1)
        quick.version = 2
        assert await cache.get_or_load("k", quick.load, tags=["t"]) == 2
        assert await asked == 1
        for tags in ([], ["t"]):
            assert await cache.get_or_load("k", quick.load, tags=tags) == 2
        assert len(quick.loads) == 1


@virtual_time
async def test_tags_that_would_add_up_to_too_many_are_those_of_the_last_call() -> None:
    """It reads what it must, and no read fails for what other calls have named; nor is more held than may be."""
    line, source = Line(), Source(1.0)
    tags = [f"{number}" for number in range(300)]
    async with near(line, beats=True) as cache:
        await cache.get_or_load("held", source.load, tags=tags[:200])
        assert await cache.get_or_load("held", source.load, tags=tags[100:]) == 1
        assert cache._shelf.tags("held") == {*tags[100:]}
        source.version = 2
        line.say(bust(1, "299", "tag"))
        await asyncio.sleep(0.1)
        for some in (tags[:200], tags[100:]):
            assert await cache.get_or_load("held", source.load, tags=some) == 2
        loading = asyncio.create_task(cache.get_or_load("k", source.load, tags=tags[:200]))
        await asyncio.sleep(0.1)
        asked = len(source.loads)
        assert await cache.get_or_load("k", source.load, tags=tags[100:]) == 2
        assert await loading == 2
        assert len(source.loads) == asked + 1
        assert cache._shelf.tags("k") == {*tags[100:]}


@virtual_time
async def test_what_is_no_tag_is_refused_also_of_what_is_held() -> None:
    """As of what is not."""
    line, source = Line(), Source()
    async with near(line) as cache:
        await cache.get_or_load("held", source.load)
        unhashable: Any = [["x"]]
        for key in ("held", "other"):
            with pytest.raises(InvalidRequest, match="tag"):
                await cache.get_or_load(key, source.load, tags=unhashable)


@virtual_time
async def test_who_is_served_adds_his_tags_to_those_of_the_entry() -> None:
    """If one of them may have been busted before, the value is loaded again."""
    source, line = Source(), Line()
    async with near(line) as cache:
        await cache.get_or_load("a", source.load)
        await cache.get_or_load("a", source.load, tags=iter(["t"]))
        assert len(source.loads) == 1
        line.say(bust(1, "u", "tag"))
        await asyncio.sleep(0.1)
        await cache.get_or_load("a", source.load, tags=("t",))
        assert len(source.loads) == 1
        await cache.get_or_load("a", source.load, tags=["u"])
        assert len(source.loads) == 2
        await cache.get_or_load("a", source.load, tags=["t"])
        line.say(bust(2, "t", "tag"))
        await asyncio.sleep(0.1)
        assert len(cache) == 0


# Trust


@virtual_time
async def test_nothing_is_served_nor_held_while_the_daemon_is_not_followed() -> None:
    """Who asks then gets a value that was loaded after that; those who ask at a time share the next."""
    source, line = Source(1.0), Line()
    async with near(line, grace=0) as cache:
        await cache.get_or_load("a", source.load)
        line.cut()
        await asyncio.sleep(0.1)
        assert cache.statistics().reason == "http://0: it ended its stream"
        source.version, source.loads = 2, []
        first = asyncio.create_task(cache.get_or_load("a", source.load))
        await asyncio.sleep(0.5)
        source.version = 3
        others = [asyncio.create_task(cache.get_or_load("a", source.load)) for _ in range(10)]
        await asyncio.sleep(0.6)
        source.version = 4
        last = asyncio.create_task(cache.get_or_load("a", source.load))
        assert (await first, [await other for other in others], await last) == (2, [3] * 10, 4)
        assert source.loads == [1.101, 2.101, 3.101]
        told = cache.statistics()
        assert (told.bypassed, told.refused, told.trusted) == (12, 0, False)
        assert "cut" in told.reason
        assert repr(cache).endswith("bypassed)")


@virtual_time
async def test_a_short_break_costs_nothing() -> None:
    """Within the grace what is held is served; the stream goes on, and tells what it missed."""
    source, line = Source(), Line()
    async with near(line) as cache:
        for key in "ab":
            await cache.get_or_load(key, source.load)
        line.cut()
        await asyncio.sleep(2.5)
        await cache.get_or_load("a", source.load)
        line.is_up = True
        await eventually(lambda: len(line.opened) == 2)
        line.say(bust(1, "b"), live(1))
        await asyncio.sleep(0.1)
        await cache.get_or_load("a", source.load)
        assert len(source.loads) == 2
        await cache.get_or_load("b", source.load)
        assert len(source.loads) == 3
        assert cache.statistics().resets == 0


@virtual_time
async def test_a_long_break_is_bypassed_and_what_is_held_is_served_again_after_it() -> None:
    """Unless it was a reset; the daemon knows."""
    source, line = Source(), Line()
    async with near(line) as cache:
        await cache.get_or_load("a", source.load)
        for resets, text in enumerate([live(0), b'id: e-5\nevent: reset\ndata: {"reason": "x"}\n\n' + live(5)]):
            line.cut()
            await asyncio.sleep(10)
            assert not cache.is_trusted
            line.is_up = True
            opened = len(line.opened)
            await eventually(partial(_is_opened, line, opened))
            line.say(text)
            await cache.wait_trusted(1)
            await cache.get_or_load("a", source.load)
            assert (len(source.loads), cache.statistics().resets) == (1 + resets, resets)


def _is_opened(line: Line, before: int) -> bool:
    return len(line.opened) > before


@virtual_time
async def test_a_connection_that_is_silent_is_not_trusted_even_before_it_is_given_up() -> None:
    """The clock is looked at before anything is served: this process may have been stopped."""
    source, line = Source(), Line()
    async with near(line) as cache:
        now = 0.0
        cache._clock = lambda: now
        await cache.get_or_load("a", source.load)
        await cache.get_or_load("a", source.load)
        assert len(source.loads) == 1
        now = 3.1
        await cache.get_or_load("a", source.load)
        assert len(source.loads) == 2


@virtual_time
async def test_a_value_that_comes_when_the_trust_has_ended_is_for_who_asked_before_it_was_loaded() -> None:
    """Whoever joined may have asked after a bust that nobody could tell of, and has it loaded again."""
    source, line = Source(5.0), Line()
    async with near(line) as cache:
        first = asyncio.create_task(cache.get_or_load("a", source.load))
        await asyncio.sleep(0.1)
        line.cut()
        await asyncio.sleep(1)
        source.version = 2
        joined = asyncio.create_task(cache.get_or_load("a", source.load))
        assert (await first, await joined) == (1, 2)
        assert (source.loads, len(cache)) == ([0.001, 5.001], 0)


@virtual_time
async def test_a_first_stream_refuses_what_was_loaded_before_it_was_live() -> None:
    """What was busted before that is told by nobody."""
    line, source = Line(), Source(1.0)
    feed = Feed([("http://0", line)], Wanted(), random=lambda: 1.0, clock=asyncio.get_running_loop().time)

    async def join(namespace: str, /) -> Feed:
        return feed

    cache = NearCache(
        join, maxsize=1, ttl=None, namespace=None, grace=None, needed=1, clock=asyncio.get_running_loop().time
    )
    assert cache.statistics().reason == "nothing was asked for yet"
    feed.start()
    loading = asyncio.create_task(cache.get_or_load("a", source.load))
    await asyncio.sleep(0.5)
    assert cache.statistics().reason == "http://0: not live yet"
    line.say(live(0))
    await loading
    assert cache.is_trusted
    told = cache.statistics()
    assert (len(cache), told.resets, told.refused) == (0, 0, 1)
    await feed.aclose()
    assert cache.statistics().reason == "the client is closed"


@pytest.mark.parametrize(("needed", "trusted"), [(1, [True, True, True]), (2, [True, True, False])])
@virtual_time
async def test_as_many_daemons_are_followed_as_no_bust_can_pass_by(needed: int, trusted: list[bool]) -> None:
    """Of three: all with "first", two with "quorum", one with "all"."""
    lines = [Line(), Line(), Line()]
    async with near(*lines, needed=needed, grace=0) as cache:
        found = [cache.is_trusted]
        for line in lines[:2]:
            line.cut()
            await asyncio.sleep(0.1)
            found.append(cache.is_trusted)
    assert found == trusted


def test_how_many_daemons_are_needed_follows_from_the_delivery() -> None:
    """Of the client, of the view, or of whoever writes."""
    client = BustcallClient("http://a", peers=["http://b", "http://c"])
    assert client.near_cache(ttl=None)._needed == 3
    assert client.with_options(delivery="all").near_cache(ttl=None)._needed == 1
    assert client.near_cache(ttl=None, delivery="quorum")._needed == 2
    with pytest.raises(InvalidRequest, match="delivery"):
        client.near_cache(ttl=None, delivery="most")  # type: ignore[arg-type]


# Loaders


@virtual_time
async def test_what_a_loader_raises_is_raised_by_all_and_held_by_none() -> None:
    """The next call loads again."""
    async with near(Line()) as cache:

        async def fail() -> int:
            await asyncio.sleep(1)
            raise KeyError("of the loader")

        found = await asyncio.gather(*(cache.get_or_load("a", fail) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == [KeyError] * 3
        assert await cache.get_or_load("a", lambda: 1) == 1
        assert cache.statistics().loads == 2


@virtual_time
async def test_a_caller_that_is_cancelled_takes_the_value_from_nobody() -> None:
    """The last one ends the loading, and waits for that."""
    ended: list[str] = []
    async with near(Line()) as cache:

        async def load() -> int:
            try:
                await asyncio.sleep(2)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return 1

        first = asyncio.create_task(cache.get_or_load("a", load))
        second = asyncio.create_task(cache.get_or_load("a", load))
        await asyncio.sleep(1)
        first.cancel()
        assert await second == 1
        assert first.cancelled()
        third = asyncio.create_task(cache.get_or_load("b", load))
        await asyncio.sleep(1)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        assert ended == ["cancelled"]
        assert (cache._flights, cache._flying) == ({}, set())


@virtual_time
async def test_a_loader_that_is_cancelled_says_so() -> None:
    """Whoever waits was not cancelled himself."""
    async with near(Line()) as cache:

        async def load() -> int:
            raise asyncio.CancelledError

        with pytest.raises(ClientClosed, match="cancelled"):
            await cache.get_or_load("a", load)


@pytest.mark.parametrize("is_up", [True, False])
@virtual_time
async def test_a_value_cannot_be_loaded_by_way_of_itself(is_up: bool) -> None:
    """Also by way of others, and of a task that the loader began; whether the daemon is followed or not."""
    line = Line()
    async with near(line, grace=0) as cache:
        if not is_up:
            line.cut()
            await asyncio.sleep(0.1)

        async def own() -> int:
            return await cache.get_or_load("a", own)

        with pytest.raises(RuntimeError, match="by way of itself"):
            await cache.get_or_load("a", own)

        def of(other: str, loader: Callable[[], Any]) -> Callable[[], Any]:
            async def load() -> int:
                await asyncio.sleep(1)
                return await asyncio.create_task(cache.get_or_load(other, loader))

            return load

        found = await asyncio.gather(
            cache.get_or_load("x", of("y", lambda: 1)),
            cache.get_or_load("y", of("x", lambda: 1)),
            return_exceptions=True,
        )
        assert RuntimeError in {type(error) for error in found}
        assert await cache.get_or_load("m", of("n", lambda: 1)) == 1


@pytest.mark.parametrize("tags", ["one", None, [""], [7], map(str, range(257))])
async def test_what_cannot_be_is_refused_before_anything_is_loaded(tags: Any) -> None:
    """Keys and tags are those of busts."""
    cache = BustcallClient.disabled().near_cache(ttl=1)
    with pytest.raises(InvalidRequest):
        await cache.get_or_load("a", pytest.fail, tags=tags)
    for key in ("", "\0", 7, ["a"]):
        with pytest.raises(InvalidRequest):
            await cache.get_or_load(key, pytest.fail)  # type: ignore[arg-type]


async def test_what_is_no_function_loads_nothing() -> None:
    """It says what is expected, and leaves no coroutine to be awaited by nobody."""

    async def load() -> int:
        return 1

    cache: Any = BustcallClient("http://127.0.0.1:1").near_cache(ttl=None)
    with pytest.raises(
        InvalidRequest, match=r"^loader must be a function without arguments, .* not str; lambda: value"
    ):
        await cache.get_or_load("a", "value")
    with pytest.raises(InvalidRequest, match="not what calling it returned; name it without calling it"):
        await cache.get_or_load("a", load())
    with pytest.raises(InvalidRequest, match="tags must be several texts, such as a list, not None"):
        await cache.get_or_load("a", load, tags=None)
    assert cache.statistics().reason == "nothing was asked for yet"


@pytest.mark.parametrize(
    "settings", [{"maxsize": 0}, {"maxsize": 1.5}, {"ttl": 0}, {"grace": -1}, {"ttl": 1, "namespace": ""}]
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    """When the cache is made."""
    with pytest.raises((ConfigurationError, InvalidRequest)):
        BustcallClient().near_cache(**{"ttl": None, **settings})


# With a client


async def test_who_busts_reads_what_he_wrote() -> None:
    """Before `bust` returns, by a view, and with many; whatever is loaded just then is refused."""
    async with fake(stream_plan=[live(0, "fake")] * 9) as daemon, BustcallClient(daemon.url) as client:
        cache, other = client.near_cache(ttl=None), client.near_cache(ttl=None, namespace="other")
        await cache.wait_trusted(5)
        await other.wait_trusted(5)
        source = Source(0.01)
        for call in (
            lambda: client.bust("a"),
            lambda: client.with_options(timeout=1).bust("t", kind="tag"),
            lambda: client.bust_many(["b", "a"]),
            lambda: client.bust("a", namespace="default"),
        ):
            await cache.get_or_load("a", source.load, tags=["t"])
            await other.get_or_load("a", source.load, tags=["t"])
            cache.drop("a/slow")
            loading = asyncio.create_task(cache.get_or_load("a/slow", Source(0.3).load, tags=["t"]))
            await asyncio.sleep(0)
            source.version += 1
            await call()
            assert await cache.get_or_load("a", source.load) == source.version
            await loading
        assert await other.get_or_load("a", source.load) == 1
        assert cache.statistics().refused == 1
        assert {near.namespace for near in client.statistics().near} == {"default", "other"}


async def test_a_bust_that_failed_or_was_cancelled_drops_here_all_the_same() -> None:
    """It may have been applied; a dry run never is."""
    async with fake(stream_plan=[live(0, "fake")]) as daemon, BustcallClient(daemon.url) as client:
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        for _ in range(2):
            await cache.get_or_load("a", lambda: 1)
        daemon.plan.extend([Answer.problem(422), Answer(hang=True)])
        with pytest.raises(Exception, match="refused"):
            await client.bust("a")
        assert len(cache) == 0
        await cache.get_or_load("a", lambda: 1)
        busting = asyncio.create_task(client.bust("a"))
        await eventually(lambda: not daemon.plan)
        busting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await busting
        assert len(cache) == 0
        await cache.get_or_load("a", lambda: 1)
        await client.bust("a", dry_run=True, fault_tolerance=12)
        assert len(cache) == 1


async def test_a_hot_swap_forgets_everything_here() -> None:
    """What was made with the old versions is known to the daemon alone."""
    names = ["events.stream", "cache.hotswap", "cache.dependencies"]
    async with FakeDaemon(capabilities=names) as daemon, BustcallClient(daemon.url) as client:
        await client.announce("model", ["1.0.0"])
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        await cache.get_or_load("a", lambda: 1)
        await client.hot_swap([Swap("model", to="1.1.0")])
        assert len(cache) == 0


async def test_near_caches_of_one_namespace_share_a_stream() -> None:
    """And it ends when they are dropped."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        first, second = client.near_cache(ttl=None), client.near_cache(ttl=1)
        await first.wait_trusted(5)
        await second.wait_trusted(5)
        assert len(daemon.followed) == 1
        gone = weakref.ref(first)
        del first, second
        gc.collect()
        assert gone() is None
        await eventually(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "pybustcall-events"])
        third = client.near_cache(ttl=None)
        await third.wait_trusted(5)
        assert daemon.followed == [None, None]
        assert len(client.statistics().near) == 1


@pytest.mark.parametrize(("status", "error"), [(404, IncompatibleDaemon), (401, NotAllowed), (403, NotAllowed)])
async def test_a_hub_that_tells_of_no_busts_is_an_error(status: int, error: type[Exception]) -> None:
    """A near cache that could never serve anything is no cache."""
    async with fake(stream_plan=[Answer.problem(status)] * 50) as daemon, BustcallClient(daemon.url) as client:
        cache = client.near_cache(ttl=None)
        with pytest.raises(error, match=r"^following the busts for a near cache failed"):
            await cache.wait_trusted(5)
        with pytest.raises(error):
            await cache.get_or_load("a", pytest.fail)


async def test_a_peer_that_tells_of_no_busts_has_the_cache_bypassed() -> None:
    """Unless all acknowledge each bust; the statistics say which it is."""
    async with fake() as hub, FakeDaemon() as peer, BustcallClient(hub.url, peers=[peer.url]) as client:
        cache, other = client.near_cache(ttl=None), client.near_cache(ttl=None, delivery="all")
        await other.wait_trusted(5)
        await cache.get_or_load("a", lambda: 1)
        await eventually(lambda: "events.stream" in cache.statistics().reason)
        await cache.get_or_load("a", lambda: 1)
        assert (len(cache), cache.statistics().bypassed) == (0, 2)


async def test_a_disabled_client_loads_each_value() -> None:
    """Once for all who ask at a time."""
    cache = BustcallClient.disabled().near_cache(ttl=None)
    source = Source(0.01)
    assert await asyncio.gather(*(cache.get_or_load("a", source.load) for _ in range(5))) == [1] * 5
    assert len(source.loads) == 2
    assert cache.statistics().reason == "the client is disabled"
    await cache.wait_trusted()  # there is nothing to wait for
    assert not cache.is_trusted


async def test_it_can_be_dropped_by_hand() -> None:
    """One entry, or all, and what is being loaded of it."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        source = Source(0.01)
        for drop in (lambda: cache.drop("a"), cache.clear):
            loading = asyncio.create_task(cache.get_or_load("a", source.load))
            await asyncio.sleep(0)
            drop()
            await loading
            assert len(cache) == 0
            await cache.get_or_load("a", source.load)
            drop()
            assert len(cache) == 0


async def test_closing_the_client_breaks_off_what_is_loaded() -> None:
    """Whoever waits for it is told, and so is who asks later; nothing is left running."""
    async with fake() as daemon, BustcallClient(daemon.url) as client:
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        loading = asyncio.create_task(cache.get_or_load("a", Source(60).load))
        await asyncio.sleep(0.01)
        await client.aclose()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "pybustcall-events"]
        assert not cache._flying
        with pytest.raises(ClientClosed):
            await loading
        with pytest.raises(ClientClosed):
            await cache.get_or_load("a", lambda: 1)
        with pytest.raises(ClientClosed):
            await cache.wait_trusted()


def test_a_cache_goes_on_in_the_next_loop_and_begins_empty() -> None:
    """In one that runs beside the first it says whose it is."""
    client = BustcallClient("http://127.0.0.1:1")
    cache = client.near_cache(ttl=None)
    troubles: list[BaseException] = []

    async def elsewhere() -> None:
        await cache.get_or_load("a", lambda: 1)

    def beside() -> None:
        try:
            asyncio.run(elsewhere())
        except RuntimeError as error:
            troubles.append(error)

    async def use() -> None:
        async with FakeDaemon(capabilities=["events.stream"]) as daemon:
            other = BustcallClient(daemon.url)
            async with other:
                nearby = other.near_cache(ttl=None)
                await nearby.wait_trusted(5)
        await cache.get_or_load("a", lambda: 1)
        thread = threading.Thread(target=beside)
        thread.start()
        await asyncio.to_thread(thread.join)

    asyncio.run(use())
    assert [str(error)[:45] for error in troubles] == ["this near cache belongs to another event loop"]
    asyncio.run(elsewhere())
    with asyncio.Runner() as runner:
        runner.run(elsewhere())
        with asyncio.Runner() as other:
            other.run(elsewhere())
            runner.run(asyncio.sleep(0.01))
        runner.run(elsewhere())
        runner.run(client.aclose())


async def test_what_another_thread_busts_with_the_same_client_is_dropped_soon() -> None:
    """In the loop of the cache."""
    async with fake(stream_plan=[live(0, "fake")]) as daemon, BustcallClient(daemon.url) as client:
        cache = client.near_cache(ttl=None)
        await cache.wait_trusted(5)
        await cache.get_or_load("a", lambda: 1)
        await asyncio.to_thread(asyncio.run, _bust(client))
        await eventually(lambda: not len(cache))


async def _bust(client: BustcallClient) -> None:
    await client.bust("a")


@pytest.mark.skipif(not hasattr(sys, "getrefcount"), reason="needs CPython")
async def test_a_forked_child_serves_nothing_of_its_parent() -> None:
    """It begins empty, and loads by itself until its own stream is live; the parent goes on."""
    program = """
    import asyncio, os, sys
    from pybustcall import BustcallClient

    client = BustcallClient(sys.argv[1])
    cache = client.near_cache(ttl=None)

    async def look(value):
        loaded = await cache.get_or_load("a", lambda: value)
        await cache.wait_trusted(10)
        again = await cache.get_or_load("a", lambda: value + " again")
        return loaded, again, await cache.get_or_load("a", lambda: "never"), cache.statistics().hits

    with asyncio.Runner() as runner:
        before = runner.run(look("parent"))
        assert before[2] == "parent again", before
        child = os.fork()
        if not child:
            held = len(cache)
            with asyncio.Runner() as own:
                found = own.run(look("child"))
                own.run(client.aclose())
            print(held, *found, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert runner.run(look("unused"))[2] == "parent again"
        runner.run(client.aclose())
    """
    async with fake() as daemon:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-c", textwrap.dedent(program), daemon.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, "")
    assert out.decode().split() == ["0", "child", "child", "again", "child", "again", "2"]


async def test_a_black_hole_between_the_daemon_and_the_cache_is_bypassed() -> None:
    """The connection stands, and nothing comes; it is given up after three heartbeats."""
    async with fake(heartbeat=0.1) as daemon, FaultyProxy(daemon.url) as proxy:
        async with BustcallClient(proxy.url) as client:
            cache = client.near_cache(ttl=None)
            await cache.wait_trusted(5)
            await cache.get_or_load("a", lambda: 1)
            proxy.trouble = Trouble(stall=True)
            daemon.tell("a")
            await eventually(lambda: not cache.is_trusted)
            assert await cache.get_or_load("a", lambda: 2) == 2
            proxy.heal()
            await cache.wait_trusted(5)
            assert await cache.get_or_load("a", lambda: 3) == 3
