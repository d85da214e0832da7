"""What readers' caches do whose server does not answer: it is asked no more after a few calls, and one tries again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest

from pybustcall.integrations.guard import Guard
from pybustcall.integrations.memcached import MemcachedCache, MemcachedUnavailable
from pybustcall.integrations.reading import Found
from pybustcall.integrations.redis import Breaker, RedisCache, RedisUnavailable
from pybustcall.testing.proxy import FaultyProxy, Trouble
from tests.conftest import PATIENCE, eventually
from tests.engines import free_port
from tests.memcached_process import shared_memcached
from tests.readers import SHOP, Maker, start
from tests.redis_harness import shared_redis

UNAVAILABLE = (RedisUnavailable, MemcachedUnavailable)
REFUSED = "has not answered, and is tried again"


class Clock:
    """A clock that goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Way:
    """A way to a server that can be a black hole, and a cache that goes this way. Its breaker has a clock of its own.

    `make` makes a cache at a port; `direct` goes straight to the server.
    """

    def __init__(self, make: Callable[..., Any], port: int, proxy: FaultyProxy) -> None:
        self.make = make
        self.proxy = proxy
        self.direct = make(port, timeout=PATIENCE)
        self.cache = self.through()
        self.clock = self.cache._guards.clock = Clock()

    def through(self, **more: Any) -> Any:
        """Make a cache that goes this way."""
        return self.make(int(self.proxy.url.rpartition(":")[2]), **{"timeout": PATIENCE, **more})

    def fall_silent(self) -> None:
        """Let nothing pass, and give up soon, since it is not slowness that keeps the answer back."""
        self.proxy.trouble = Trouble(stall=True)
        self._limit(0.05)

    def speak(self) -> None:
        """Let all pass, and have patience with a slow machine."""
        self.proxy.heal()
        self._limit(PATIENCE)

    def later(self) -> None:
        """Let the pause of the breaker be over."""
        self.clock.now += 10.0

    async def ask(self, count: int) -> list[str]:
        """Ask so often at once; tell what came of each call."""
        return await came_of(self.cache.get("k") for _ in range(count))

    def _limit(self, seconds: float) -> None:
        server = self.cache._server
        server._limit = seconds
        if isinstance(self.cache, MemcachedCache):
            server._connect_timeout = seconds


async def came_of(calls: Iterable[Awaitable[Any]]) -> list[str]:
    """Tell of each call whether it was "answered", "in vain", or "refused" before it was sent."""

    async def of(call: Awaitable[Any]) -> str:
        try:
            await call
        except UNAVAILABLE as error:
            return "refused" if REFUSED in str(error) else "in vain"
        return "answered"

    return list(await asyncio.gather(*map(of, calls)))


def redis_at(port: int, **more: Any) -> RedisCache:
    """Make a cache in Redis."""
    return RedisCache(f"redis://127.0.0.1:{port}/0", namespace=SHOP, **more)


def memcached_at(port: int, **more: Any) -> MemcachedCache:
    """Make a cache in memcached."""
    return MemcachedCache(f"memcached://127.0.0.1:{port}", namespace=SHOP, **more)


@pytest.fixture(params=["redis", "memcached"])
async def way(request: pytest.FixtureRequest) -> AsyncIterator[Way]:
    """A way to an empty server of each kind, with an entry."""
    make: Callable[..., Any]
    if request.param == "redis":
        shared_redis().ask("FLUSHALL")
        port, make = shared_redis().port, redis_at
    else:
        shared_memcached().ask("flush_all")
        port, make = shared_memcached().port, memcached_at
    async with FaultyProxy(f"http://127.0.0.1:{port}") as proxy:
        made = Way(make, port, proxy)
        made.speak()
        async with made.direct, made.cache:
            await made.cache.set("k", b"old", ttl=None)
            yield made


async def test_a_black_hole_is_asked_no_more_after_a_few_calls(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """Values are made at once, nothing that the server holds is served, and nothing is stored."""
    way.fall_silent()
    assert await way.ask(3) == ["in vain"] * 3
    tried = way.proxy.connections
    looked = await way.direct.lookup("other")
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            assert await way.cache.get_or_set("k", str(number).encode, ttl=None) == b"%d" % number
    for call in (
        way.cache.get("k"),
        way.cache.lookup("k"),
        way.cache.store("other", b"v", token=looked.token, ttl=None),
        way.cache.set("other", b"v", ttl=None),
    ):
        with pytest.raises(UNAVAILABLE, match=REFUSED + r" in \d\.\d s; nothing") as caught:
            await call
        assert [getattr(caught.value, name) for name in ("applied", "whole", "answered")] == ["no", True, False]
    assert way.proxy.connections == tried, "nobody has asked"
    assert len(caplog.records) == 1
    assert await way.direct.get("k") == Found(b"old", stale=False)
    assert await way.direct.get("other") is None


async def test_a_value_that_was_being_made_when_the_server_fell_silent_is_not_stored(way: Way) -> None:
    """Whoever waits for it gets it."""
    make = Maker()
    task = start(way.cache, "other", make)
    await eventually(lambda: make.calls)
    way.fall_silent()
    await way.ask(3)
    tried = way.proxy.connections
    make.go.set()
    assert await task == b"v"
    assert way.proxy.connections == tried
    assert await way.direct.get("other") is None


async def test_one_call_tries_again_after_a_pause(way: Way) -> None:
    """While the others fail at once; if it fails, there is another pause, and else all goes on."""
    way.fall_silent()
    await way.ask(3)
    for _ in range(3):
        way.later()
        tried = way.proxy.connections
        assert sorted(await way.ask(10)) == ["in vain", *["refused"] * 9]
        assert await way.ask(10) == ["refused"] * 10
        assert way.proxy.connections == tried + 1
    way.speak()
    way.later()
    assert sorted(await way.ask(10)) == ["answered", *["refused"] * 9]
    assert await way.ask(10) == ["answered"] * 10
    assert await way.cache.get("k") == Found(b"old", stale=False)


async def test_a_trial_that_is_cancelled_lets_the_next_call_try(way: Way) -> None:
    """It says nothing of the server."""
    way.fall_silent()
    await way.ask(3)
    way.later()
    task = asyncio.create_task(way.cache.get("k"))
    await asyncio.sleep(0)
    with pytest.raises(UNAVAILABLE, match="by another call just now"):
        await way.cache.get("k")
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert await way.ask(1) == ["in vain"]


async def test_a_breaker_can_be_left_out(way: Way) -> None:
    """Then each call waits for itself."""
    async with way.through(timeout=0.02, connect_timeout=0.02, breaker=None) as cache:
        way.proxy.trouble = Trouble(stall=True)
        for count in (20, 1):
            assert await came_of(cache.get("k") for _ in range(count)) == ["in vain"] * count


@pytest.mark.parametrize("make", [redis_at, memcached_at])
def test_each_loop_finds_out_for_itself(make: Callable[..., Any]) -> None:
    """What one has found out, or has left open when it ended, is in no other's way."""
    cache = make(free_port(), breaker=Breaker(incidents=3, open=60.0))

    async def use() -> list[str]:
        return [(await came_of([cache.get("k")]))[0] for _ in range(4)]

    for _ in range(2):
        assert asyncio.run(use()) == ["in vain", "in vain", "in vain", "refused"]


def test_calls_from_before_the_breaker_opened_do_not_open_it_again() -> None:
    """They may end long after the server has come back."""
    guard = Guard(Breaker(incidents=2, open=1.0, cap=1.0, proofs=1), "redis://h", RuntimeError)
    old = [guard.begin(0.0) for _ in range(9)]
    for trial in old[:3]:
        guard.silent(0.0, 2.0, trial=trial)
    with pytest.raises(RuntimeError):
        guard.begin(2.0)
    trial = guard.begin(4.0)
    assert trial
    guard.silent(0.0, 4.5, trial=old[3])
    guard.answered(5.0, trial=trial)
    for late in old[4:]:
        guard.silent(0.0, 6.0, trial=late)
    new = guard.begin(7.0)
    assert not new
    guard.silent(7.0, 9.0, trial=new)
    guard.answered(9.0, trial=guard.begin(9.0))
    guard.silent(9.0, 10.0, trial=guard.begin(9.0))
    guard.silent(9.0, 10.0, trial=guard.begin(9.0))
    with pytest.raises(RuntimeError):
        guard.begin(10.0)


def test_calls_half_of_which_get_no_answer_open_the_breaker() -> None:
    """By default, and if there are at least 20 within 10 seconds; also where never three in a row did."""
    cache = RedisCache("redis://h")
    guard = Guard(cache._guards.policy, "redis://h", RuntimeError)
    for number in range(20):
        trial = guard.begin(float(number) / 4)
        if number % 2:
            guard.silent(number / 4, number / 4 + 0.1, trial=trial)
        else:
            guard.answered(number / 4 + 0.1, trial=trial)
    with pytest.raises(RuntimeError):
        guard.begin(5.1)
