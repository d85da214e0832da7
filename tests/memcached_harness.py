"""The harness of memcached for the conformance suite of backends: an application that stores as readers do.

All share one server, which is started for the first and emptied for each.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from pybustcall import memcached_layout as items
from pybustcall.daemon.backends import Backend
from pybustcall.daemon.backends.memcached import MemcachedBackend
from pybustcall.integrations.memcached import MemcachedCache
from pybustcall.memcached_connection import MemcachedServer
from pybustcall.memcached_layout import DEFAULT_PREFIX, Layout
from tests.backend_conformance import Fill, Harness, Seen
from tests.memcached_process import shared_memcached

__all__ = ["MemcachedHarness", "opened_memcached"]


class MemcachedHarness:
    """An application that stores through `MemcachedCache`."""

    tags = True

    def __init__(self, url: str) -> None:
        self.url = url
        self.backend: Backend = MemcachedBackend(url)
        self.server = MemcachedServer(url)
        self.caches: dict[str, MemcachedCache] = {}

    def cache(self, namespace: str) -> MemcachedCache:
        """Tell the tenant's own cache."""
        if namespace not in self.caches:
            self.caches[namespace] = MemcachedCache(self.url, namespace=namespace)
        return self.caches[namespace]

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        return await self.cache(namespace).set(key, b"x" * size, tags=tags, ttl=60.0)

    async def drop(self, namespace: str, key: str) -> None:
        await self.server.run([items.delete(Layout(DEFAULT_PREFIX, namespace).entry(key))])

    async def look(self, namespace: str, key: str) -> Seen:
        found = await self.cache(namespace).get(key)
        return "missing" if found is None else "stale" if found.stale else "fresh"

    async def miss(self, namespace: str, key: str, *, tags: Sequence[str] = ()) -> Fill | None:
        looked = await self.cache(namespace).lookup(key)
        assert looked.found is None

        async def fill() -> bool:
            return await self.cache(namespace).store(key, b"late", token=looked.token, tags=tags, ttl=60.0)

        return fill

    async def aclose(self) -> None:
        for cache in self.caches.values():
            await cache.aclose()
        await self.server.aclose()


@asynccontextmanager
async def opened_memcached(_: Path) -> AsyncIterator[Harness]:
    """Open a harness, and close it, with no descriptor left open."""
    shared_memcached().ask("flush_all")
    before = len(os.listdir("/proc/self/fd"))
    harness = MemcachedHarness(shared_memcached().url)
    await harness.backend.open()
    try:
        yield harness
    finally:
        await harness.backend.close()
        await harness.aclose()
    assert len(os.listdir("/proc/self/fd")) == before
