"""Near caches over random histories, in virtual time, judged by a checker that finds what is planted for it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import looptime
import pytest

from pybustcall.events import BustEvent, Feed, Wanted
from pybustcall.faults import AttemptFailed, Fault, FaultKind
from pybustcall.near_cache import NearCache
from tests.event_wires import dated, live
from tests.staleness import Bust, Read, stale_reads

KEYS: Final = ("a", "b/c")
LATE: Final = 0.05  # seconds that an event takes on its way at most
GRACE: Final = 2.0
SAID: Final = {"namespace": "default"}
KEPT: Final = 4  # events that the daemon keeps


class World:
    """A database, a daemon that tells of busts, and streams that break.

    `slow`: seconds that bytes may be on their way over a stream; if that is long, the daemon dates what it writes, by a
    clock that is set otherwise.
    """

    def __init__(self, chance: random.Random, slow: float) -> None:
        self.chance = chance
        self.slow = slow
        self.now: Callable[[], float] = asyncio.get_running_loop().time
        self.versions = dict.fromkeys(KEYS, 1)
        self.log: list[tuple[str, str]] = []
        self.is_up = True
        self.cuts: set[asyncio.Event] = set()
        self.wakes: set[asyncio.Event] = set()
        self.reads: list[Read] = []
        self.busts: list[Bust] = []

    @asynccontextmanager
    async def stream(
        self, path: str, /, *, after: str | None, until: float
    ) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        """Open the daemon's stream: what was missed, or a reset, then live, then events, each a little late."""
        await asyncio.sleep(self.chance.random() * LATE)
        if not self.is_up:
            raise AttemptFailed(Fault(FaultKind.UNREACHABLE, "http://0", "down", "no"))
        seen = len(self.log) if after is None else int(after.rpartition("-")[2])
        cut, wake = asyncio.Event(), asyncio.Event()
        self.cuts.add(cut)
        self.wakes.add(wake)
        sent: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        text = b""
        if seen < len(self.log) - KEPT:
            seen = len(self.log)
            text = f'id: e-{seen}\nevent: reset\ndata: {{"reason": "gone"}}\n\n'.encode()

        due = 0.0

        def send(text: bytes) -> None:
            nonlocal due
            due = max(due, self.now()) + self.chance.random() * self.slow
            sent.put_nowait((due, self.dated(text)))

        async def write() -> None:
            nonlocal seen
            send(text + self.told(seen) + live(len(self.log)))
            seen = len(self.log)
            while not cut.is_set():
                wake.clear()
                try:
                    async with asyncio.timeout(1.0):
                        await wake.wait()
                except TimeoutError:
                    pass
                send(self.told(seen) or f"id: e-{seen}\n\n".encode())
                seen = len(self.log)

        async def read() -> bytes:
            until, text = await sent.get()
            await asyncio.sleep(until - self.now())
            return b"" if cut.is_set() else text

        writing = asyncio.create_task(write())
        try:
            yield read
        finally:
            writing.cancel()
            self.cuts.discard(cut)
            self.wakes.discard(wake)

    def dated(self, text: bytes) -> bytes:
        """Say when it was written, where it may be long on its way."""
        return text if self.slow <= LATE else dated(text, self.now() + 1000.0)

    def told(self, seen: int) -> bytes:
        """Write the events after one of them."""
        return b"".join(
            f"id: e-{number}\nevent: bust\ndata: {json.dumps({**SAID, 'kind': kind, 'target': target})}\n\n".encode()
            for number, (kind, target) in enumerate(self.log[seen:], seen + 1)
        )

    def wake(self) -> None:
        """Have all streams look again."""
        for wake in self.wakes:
            wake.set()

    async def spoil(self) -> None:
        """Cut streams, and let the daemon be down for a while."""
        while True:
            await asyncio.sleep(self.chance.expovariate(1.0 if self.slow <= LATE else 0.1))
            self.is_up = self.chance.random() < 0.5
            for cut in list(self.cuts):
                if not self.is_up or self.chance.random() < 0.5:
                    cut.set()
            self.wake()
            if not self.is_up:
                await asyncio.sleep(self.chance.choice([0.1, 1.0, 4.0]))
                self.is_up = True

    async def write(self, who: str, cache: NearCache) -> None:
        """Write, and bust: it is told of, then acknowledged, also where the daemon can be reached by others alone."""
        while True:
            await asyncio.sleep(self.chance.expovariate(2.0))
            kind, target = self.chance.choice([("key", "a"), ("key", "b/c"), ("tag", "t"), ("prefix", "b")])
            keys = KEYS if kind == "tag" else ("b/c",) if kind == "prefix" else (target,)
            for key in keys:
                self.versions[key] += 1
            written = {key: self.versions[key] for key in keys}
            await asyncio.sleep(self.chance.random() * LATE)
            self.log.append((kind, target))
            self.wake()
            await asyncio.sleep(self.chance.random() * LATE / 2)
            cache.bust_here(BustEvent(kind=kind, target=target))  # type: ignore[arg-type]
            self.busts += [Bust(key, version, self.now(), who) for key, version in written.items()]

    async def read(self, who: str, cache: NearCache, feed: Feed) -> None:
        """Read at random, and note it."""
        while True:
            await asyncio.sleep(self.chance.expovariate(8.0))
            key = self.chance.choice(KEYS)
            asked, trusted = self.now(), cache.is_trusted
            version = await cache.get_or_load(key, partial(self.load, key), tags=["t"])
            [follower] = feed.followers
            since = follower.opened if follower.is_live else None
            self.reads.append(Read(key, version, asked, self.now(), who, since, trusted and cache.is_trusted))

    async def load(self, key: str) -> int:
        """Load a version, sooner or later."""
        await asyncio.sleep(self.chance.choice([0.0, 0.01]))
        version = self.versions[key]
        await asyncio.sleep(self.chance.choice([0.0, 0.01, 0.5, 3.0]))
        return version


Plant = Callable[[NearCache], None]


async def history(seed: int, plant: Plant, slow: float) -> tuple[int, int]:
    """Let two near caches be used for a minute; tell how many reads were hits, and how many were stale."""
    world = World(random.Random(seed), slow)
    tasks, feeds, hits = [], [], 0
    caches = []
    for who in ("first", "second"):
        feed = Feed([("http://0", world.stream)], Wanted(), random=world.chance.random, clock=world.now)
        cache = NearCache(_join(feed), maxsize=10, ttl=None, namespace=None, grace=GRACE, needed=1, clock=world.now)
        feed.start()
        await cache.wait_trusted()
        plant(cache)
        feeds.append(feed)
        caches.append(cache)
        tasks += [asyncio.create_task(world.read(who, cache, feed)) for _ in range(4)]
        tasks.append(asyncio.create_task(world.write(who, cache)))
    tasks.append(asyncio.create_task(world.spoil()))
    await asyncio.sleep(60)
    hits = sum(cache.statistics().hits for cache in caches)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for feed in feeds:
        await feed.aclose()
    # Where nothing is dated, what a healthy stream says next may be on its way.
    return hits, len(stale_reads(world.reads, world.busts, GRACE + (2 * LATE if slow <= LATE else 0.001)))


def _join(feed: Feed) -> Any:
    async def join(namespace: str, /) -> Feed:
        return feed

    return join


def run(seed: int, plant: Plant, slow: float = LATE) -> tuple[int, int]:
    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        return runner.run(history(seed, plant, slow))


def nothing(cache: NearCache) -> None:
    """Plant nothing."""


def ignore_busts(cache: NearCache) -> None:
    cache._shelf.concerned = lambda event: set()  # type: ignore[method-assign] # noqa: ARG005


def store_late_fills(cache: NearCache) -> None:
    arrive = cache._arrive

    def store(flight: Any, value: object) -> None:
        flight.refused = False
        arrive(flight, value)

    cache._arrive = store  # type: ignore[method-assign]


def give_all_the_same_value(cache: NearCache) -> None:
    arrive = cache._arrive

    def give(flight: Any, value: object) -> None:
        arrive(flight, value)
        flight.is_sound = True

    cache._arrive = give  # type: ignore[method-assign]


def trust_for_ever(cache: NearCache) -> None:
    cache.changed = lambda: None  # type: ignore[method-assign]
    cache._until = 1e9


def ignore_resets(cache: NearCache) -> None:
    cache.reset = lambda *_, **__: None  # type: ignore[method-assign]


def keep_what_was_busted_here(cache: NearCache) -> None:
    cache.bust_here = lambda event: None  # type: ignore[method-assign] # noqa: ARG005


def take_what_comes_for_new(cache: NearCache) -> None:
    assert cache._feed is not None
    for follower in cache._feed.followers:
        follower._date = lambda at, now, follower=follower: setattr(follower, "sound", now)  # type: ignore[misc, method-assign] # noqa: ARG005


@pytest.mark.parametrize("slow", [LATE, 0.3, 1.4])
def test_no_near_cache_returns_what_was_busted_before(slow: float) -> None:
    """Whatever is cut, slow or busted at random; and many reads are hits, or nothing would be shown by that."""
    found = [run(seed, nothing, slow) for seed in range(20)]
    assert [stale for _, stale in found] == [0] * 20
    assert sum(hits for hits, _ in found) > 20 * (100 if slow < 1 else 30)


def test_what_is_old_when_it_comes_is_found_if_it_is_taken_for_new() -> None:
    """By the same checker."""
    assert any(run(seed, take_what_comes_for_new, 1.4)[1] for seed in range(40))


@pytest.mark.parametrize(
    "plant",
    [
        ignore_busts,
        store_late_fills,
        give_all_the_same_value,
        trust_for_ever,
        ignore_resets,
        keep_what_was_busted_here,
    ],
)
def test_what_is_planted_is_found(plant: Plant) -> None:
    """A near cache without one of its rules returns stale values, and the checker finds them."""
    assert any(run(seed, plant)[1] for seed in range(40))


def test_a_read_must_see_what_was_acknowledged_early_enough() -> None:
    """Before its stream began, long ago, by itself, or at all if nothing is served."""
    busts = [Bust("a", 2, 10.0, "first"), Bust("a", 4, 20.0, "first"), Bust("a", 3, 21.0, "second")]

    def is_stale(version: int, asked: float, who: str = "third", **more: Any) -> bool:
        told = {"returned": asked, "live_since": None, "trusted": True, **more}
        return bool(stale_reads([Read("a", version, asked, who=who, **told)], busts, bound=5.0))

    assert [is_stale(1, 15.0), is_stale(1, 14.9), is_stale(2, 15.0)] == [True, False, False]
    assert [is_stale(1, 11.0, live_since=10.0), is_stale(1, 11.0, live_since=9.9)] == [True, False]
    assert [is_stale(3, 20.0, trusted=False), is_stale(4, 20.0, trusted=False)] == [True, False]
    assert [is_stale(1, 10.0, "first"), is_stale(1, 10.0, "second"), is_stale(2, 21.0, "second")] == [True, False, True]
    assert [is_stale(1, 11.0, returned=16.0), is_stale(1, 9.0, returned=99.0, live_since=50.0)] == [True, False]
    assert is_stale(3, 26.0)
    assert not stale_reads([Read("b", 0, 99.0, 99.0, "first", None, trusted=False)], busts, bound=5.0)
