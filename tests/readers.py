"""What tests of readers' caches need, whichever kind they are of: slow makers, readers in tasks, and busts."""

from __future__ import annotations

import asyncio
from typing import Any

from pybustcall.daemon.backends import Backend, Scope
from pybustcall.integrations.reading import ReadersCache
from pybustcall.models import Kind

__all__ = ["SHOP", "Maker", "bust", "never", "quick", "start", "waiting"]

SHOP = "shop"


class Maker:
    """Makes values as slowly as the test wants, and counts."""

    def __init__(self, value: bytes = b"v") -> None:
        self.value = value
        self.calls = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> bytes:
        self.calls += 1
        value = self.value
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return value


async def quick() -> bytes:
    """Make a value at once."""
    return b"v"


async def never() -> bytes:
    """Be not called."""
    raise AssertionError("it was called")


def start(cache: ReadersCache[Any], key: str, make: Maker, **more: Any) -> asyncio.Task[bytes]:
    """Ask for a value in a task."""
    return asyncio.create_task(cache.get_or_set(key, make, ttl=60.0, **more))


def waiting(cache: ReadersCache[Any], key: str) -> int:
    """Tell how many wait for a value."""
    return sum(flights[key].waiting for flights in cache._filling._flights.values() if key in flights)


async def bust(backend: Backend, kind: Kind, target: str = "*", *, soft: bool = False) -> int:
    """Bust in the shop as the engine does; tell how many entries that was."""
    scope, count = Scope(SHOP, kind, target), 0
    generation = await backend.begin(scope, soft=soft)
    if kind == "key":
        count += await backend.remove(SHOP, [target], generation=generation, soft=soft)
    else:
        async for keys in backend.select(scope):
            count += await backend.remove(SHOP, keys, generation=generation, soft=soft)
    await backend.end(scope, generation)
    return count
