"""The backend in memory: it holds what is registered. What every backend does is in the conformance suite."""

from __future__ import annotations

import asyncio
import itertools

from pybustcall.daemon.backends import Scope
from pybustcall.daemon.backends.memory import MemoryBackend
from pybustcall.daemon.index import Entry, Indexes
from pybustcall.models import DEFAULT_NAMESPACE, EVERYTHING, KINDS

HERE = DEFAULT_NAMESPACE


class Clock:
    """Tells the seconds it is set to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_can_do_all_there_is() -> None:
    """And any key is possible."""
    backend = MemoryBackend(Indexes())
    traits = backend.traits
    assert (backend.name, traits.kinds) == ("memory", frozenset(KINDS))
    assert (traits.soft, traits.namespaces, traits.fences, traits.remote, traits.settle) == (
        True,
        True,
        False,
        False,
        0,
    )
    for key in ("", "../x", "\ud800", "x" * 100_000):
        backend.check("any", key)
    assert repr(backend) == "MemoryBackend(Indexes(0 namespaces, 0 entries, 0 bytes of keys))"


async def test_what_has_outlived_its_lifetime_is_not_held() -> None:
    """It is found by nothing, counts for nothing, and takes no room."""
    clock = Clock()
    indexes = Indexes(clock=clock)
    backend = MemoryBackend(indexes)
    indexes.of(HERE).add("a", tags=["t"], ttl=5)
    indexes.of(HERE).add("a.gz", ttl=5)
    scopes = [Scope(HERE, "key", "a"), Scope(HERE, "prefix", "a"), Scope(HERE, "tag", "t"), Scope(HERE, "all", "*")]
    assert [await backend.estimate(scope) for scope in scopes] == [1, 1, 1, 2]
    assert await backend.size_bytes() == 5
    clock.now += 5
    assert [await backend.estimate(scope) for scope in scopes] == [0, 0, 0, 0]
    assert [batch for scope in scopes async for batch in backend.select(scope)] == []
    assert await backend.variants(HERE, ["a"]) == []
    assert await backend.remove(HERE, ["a", "a.gz"], generation=9, soft=False) == 0
    assert await backend.size_bytes() == 0


async def test_the_loop_has_its_turn_however_many_lifetimes_end_in_one_moment() -> None:
    """A sweep drops them in slices first, and finds what is left."""
    clock = Clock()
    indexes = Indexes(clock=clock)
    backend = MemoryBackend(indexes)
    indexes.of(HERE).update({f"p/{number:05}": Entry(ttl=1.0) for number in range(10_000)})
    indexes.of(HERE).add("p/alive")
    clock.now += 1.0
    overdue: list[int] = []
    done = asyncio.Event()

    async def turn() -> None:
        while not done.is_set():
            overdue.append(indexes.overdue)
            await asyncio.sleep(0)

    turning = asyncio.create_task(turn())
    await backend.begin(Scope(HERE, "prefix", "p"), soft=False)
    assert [batch async for batch in backend.select(Scope(HERE, "prefix", "p"))] == [["p/alive"]]
    done.set()
    await turning
    assert max(before - after for before, after in itertools.pairwise([10_000, *overdue])) <= 500
    assert overdue[-1] == 0


async def test_removing_tells_whoever_watches_the_index() -> None:
    """So that the registry forgets it, too; a mark is not told."""
    indexes = Indexes()
    backend = MemoryBackend(indexes)
    indexes.of("tenant").add("a")
    told: list[tuple[str, str]] = []
    indexes.watch(lambda namespace, key, _: told.append((namespace, key)))
    generation = await backend.begin(Scope("tenant", "key", "a"), soft=False)
    assert await backend.remove("tenant", ["a"], generation=generation, soft=True) == 1
    assert told == []
    assert await backend.remove("tenant", ["a"], generation=generation, soft=False) == 1
    assert told == [("tenant", "a")]


async def test_busting_a_namespace_that_nobody_uses_makes_none() -> None:
    """However many of them are named."""
    indexes = Indexes()
    backend = MemoryBackend(indexes)
    for number in range(20):
        scope = Scope(f"tenant{number}", "all", EVERYTHING)
        generation = await backend.begin(scope, soft=False)
        assert [batch async for batch in backend.select(scope)] == []
        assert await backend.remove(scope.namespace, ["a"], generation=generation, soft=False) == 0
        await backend.end(scope, generation)
    assert list(indexes) == []


async def test_the_loop_has_its_turn_between_batches() -> None:
    """And entries that go meanwhile, even the last one told, do not break it off."""
    indexes = Indexes()
    backend = MemoryBackend(indexes)
    for number in range(1400):
        indexes.of(HERE).add(f"a:{number:04}")
    turns: list[int] = []
    done = asyncio.Event()

    async def count() -> None:
        while not done.is_set():
            turns.append(1)
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    batches = []
    async for batch in backend.select(Scope(HERE, "prefix", "a")):
        batches.append(batch)
        assert await backend.remove(HERE, batch, generation=9, soft=False) == len(batch)
    done.set()
    await counting
    assert [len(batch) for batch in batches] == [500, 500, 400]
    assert len(turns) >= 2


async def test_a_generation_protects_what_was_registered_after_it_began_in_any_namespace() -> None:
    """Whichever bust began last."""
    indexes = Indexes()
    backend = MemoryBackend(indexes)
    indexes.of(HERE).add("old")
    first = await backend.begin(Scope(HERE, "all", EVERYTHING), soft=False)
    indexes.of(HERE).add("between")
    second = await backend.begin(Scope("tenant", "all", EVERYTHING), soft=False)
    indexes.of(HERE).add("new")
    assert first < second
    keys = ["old", "between", "new"]
    assert await backend.held(HERE, keys, generation=first) == ["old"]
    assert await backend.held(HERE, keys, generation=second) == ["old", "between"]
    assert await backend.remove(HERE, keys, generation=second, soft=True) == 2
    assert await backend.held(HERE, keys) == ["new"]
    assert await backend.held(HERE, keys, stale=True) == keys
    assert await backend.remove(HERE, keys, generation=first, soft=False) == 1
    assert await backend.held(HERE, keys, stale=True) == ["between", "new"]
