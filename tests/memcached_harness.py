"""The harness of memcached for the conformance suite of backends: an application that stores as readers do.

All share one server, which is started for the first and emptied for each.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pybustcall import memcached_layout as items
from pybustcall.daemon.backends.memcached import MemcachedBackend
from pybustcall.integrations.memcached import MemcachedCache
from pybustcall.memcached_connection import MemcachedServer
from pybustcall.memcached_layout import DEFAULT_PREFIX, Layout
from tests.backend_conformance import Harness
from tests.memcached_process import shared_memcached
from tests.readers_harness import ReadersHarness, opened_with_caches

__all__ = ["MemcachedHarness", "opened_memcached"]


class MemcachedHarness(ReadersHarness):
    """An application that stores through `MemcachedCache`."""

    def __init__(self, url: str) -> None:
        super().__init__(MemcachedBackend(url))
        self.url = url
        self.server = MemcachedServer(url)

    def make(self, namespace: str) -> MemcachedCache:
        return MemcachedCache(self.url, namespace=namespace)

    async def drop(self, namespace: str, key: str) -> None:
        await self.server.run([items.delete(Layout(DEFAULT_PREFIX, namespace).entry(key))])

    async def aclose(self) -> None:
        await super().aclose()
        await self.server.aclose()


def opened_memcached(_: Path) -> AbstractAsyncContextManager[Harness]:
    """Open a harness, and close it."""
    shared_memcached().ask("flush_all")
    return opened_with_caches(MemcachedHarness(shared_memcached().url))
