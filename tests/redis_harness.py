"""The harnesses of Redis for the conformance suite of backends: an application of ours, and one that knows us not.

All share one server, which is started for the first and emptied for each.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import cache
from pathlib import Path

from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.integrations.redis import RedisCache
from pybustcall.models import DEFAULT_NAMESPACE
from pybustcall.redis_connection import RedisServer
from tests.backend_conformance import Fill, Harness, Seen
from tests.engines import RedisProcess
from tests.readers_harness import ReadersHarness, opened_with_caches

__all__ = ["ForeignHarness", "RedisHarness", "opened_foreign", "opened_redis", "shared_redis"]


@cache
def shared_redis() -> RedisProcess:
    """Start a server for all tests of this process; it ends with it."""
    directory = Path(tempfile.mkdtemp(prefix="redis-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return RedisProcess(directory)


class RedisHarness(ReadersHarness):
    """An application that stores through `RedisCache`."""

    def __init__(self, url: str) -> None:
        super().__init__(RedisBackend(url))
        self.url = url
        self.server = RedisServer(url)

    def make(self, namespace: str) -> RedisCache:
        return RedisCache(self.url, namespace=namespace)

    async def drop(self, namespace: str, key: str) -> None:
        await self.server.execute("DEL", f"bustcall:{{{namespace}}}:e:{key}")

    async def aclose(self) -> None:
        await super().aclose()
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


def opened_redis(_: Path) -> AbstractAsyncContextManager[Harness]:
    """Open a harness, and close it."""
    shared_redis().ask("FLUSHALL")
    return opened_with_caches(RedisHarness(shared_redis().url))


def opened_foreign(foreign: str) -> Callable[[Path], AbstractAsyncContextManager[Harness]]:
    """Tell how to open a harness with keys of others that look like this."""

    def open_(_: Path) -> AbstractAsyncContextManager[Harness]:
        shared_redis().ask("FLUSHALL")
        return opened_with_caches(ForeignHarness(shared_redis().url, foreign))

    return open_
