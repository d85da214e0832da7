"""The harnesses of Redis for the conformance suite of backends: an application of ours, and one that knows us not.

All share one server, which is started for the first and emptied for each.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from pathlib import Path

from pybustcall.daemon.backends import Backend
from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.integrations.redis import RedisCache
from pybustcall.models import DEFAULT_NAMESPACE
from pybustcall.redis_connection import RedisServer
from tests.backend_conformance import Fill, Harness, Seen
from tests.engines import RedisProcess

__all__ = ["ForeignHarness", "RedisHarness", "opened_foreign", "opened_redis", "shared_redis"]


@cache
def shared_redis() -> RedisProcess:
    """Start a server for all tests of this process; it ends with it."""
    directory = Path(tempfile.mkdtemp(prefix="redis-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return RedisProcess(directory)


class RedisHarness:
    """An application that stores through `RedisCache`."""

    tags = True

    def __init__(self, url: str) -> None:
        self.url = url
        self.backend: Backend = RedisBackend(url)
        self.server = RedisServer(url)
        self.caches: dict[str, RedisCache] = {}

    def cache(self, namespace: str) -> RedisCache:
        """Tell the tenant's own cache."""
        if namespace not in self.caches:
            self.caches[namespace] = RedisCache(self.url, namespace=namespace)
        return self.caches[namespace]

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        return await self.cache(namespace).set(key, b"x" * size, tags=tags, ttl=60.0)

    async def drop(self, namespace: str, key: str) -> None:
        await self.server.execute("DEL", f"bustcall:{{{namespace}}}:e:{key}")

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
        for cache_ in self.caches.values():
            await cache_.aclose()
        await self.server.aclose()


class ForeignHarness(RedisHarness):
    """An application that has plain keys in the server, beside one of ours: each key belongs to either."""

    tags = False

    def __init__(self, url: str, foreign: str) -> None:
        super().__init__(url)
        self.backend = RedisBackend(url, foreign=foreign)
        self.foreign = foreign if "{key}" in foreign else foreign + "{key}"

    def plain(self, namespace: str, key: str) -> str | None:
        """Tell the name of a plain key; None if the key is ours."""
        has_plain_keys = "{namespace}" in self.foreign or namespace == DEFAULT_NAMESPACE
        if not has_plain_keys or sum(key.encode()) % 3 == 0:
            return None
        return self.foreign.replace("{namespace}", namespace).replace("{key}", key)

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        if (name := self.plain(namespace, key)) is None:
            return await super().put(namespace, key, tags=tags, size=size)
        await self.server.execute("SET", name, b"x" * size)
        return True

    async def drop(self, namespace: str, key: str) -> None:
        name = self.plain(namespace, key)
        await (super().drop(namespace, key) if name is None else self.server.execute("DEL", name))

    async def look(self, namespace: str, key: str) -> Seen:
        if (name := self.plain(namespace, key)) is None:
            return await super().look(namespace, key)
        return "fresh" if await self.server.execute("EXISTS", name) else "missing"

    async def miss(self, namespace: str, key: str, *, tags: Sequence[str] = ()) -> Fill | None:
        return None


@asynccontextmanager
async def _opened(harness: RedisHarness) -> AsyncIterator[Harness]:
    shared_redis().ask("FLUSHALL")
    before = len(os.listdir("/proc/self/fd"))
    await harness.backend.open()
    try:
        yield harness
    finally:
        await harness.backend.close()
        await harness.aclose()
    assert len(os.listdir("/proc/self/fd")) == before


def opened_redis(_: Path) -> AbstractAsyncContextManager[Harness]:
    """Open a harness, and close it, with no descriptor left open."""
    return _opened(RedisHarness(shared_redis().url))


def opened_foreign(foreign: str) -> Callable[[Path], AbstractAsyncContextManager[Harness]]:
    """Tell how to open a harness with keys of others that look like this."""
    return lambda _: _opened(ForeignHarness(shared_redis().url, foreign))
