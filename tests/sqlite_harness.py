"""The harness of an SQLite file for the conformance suite of backends: an application that stores as readers do."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from pybustcall import sqlite_layout as layout
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.integrations.sqlite import SqliteCache
from pybustcall.sqlite_file import SqliteFile
from tests.backend_conformance import Harness
from tests.readers_harness import ReadersHarness, opened_with_caches

__all__ = ["SqliteHarness", "opened_sqlite"]

FAR = 1 << 62  # a generation after all others


class SqliteHarness(ReadersHarness):
    """An application that stores through `SqliteCache`, and loses entries by a connection of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__(SqliteBackend(path))
        self.path = path
        self.file = SqliteFile(path, timeout=5.0)

    def make(self, namespace: str) -> SqliteCache:
        return SqliteCache(self.path, namespace=namespace, timeout=5.0)

    async def drop(self, namespace: str, key: str) -> None:
        work = partial(layout.remove, namespace=namespace, keys=[key], generation=FAR, soft=False, now=time.time())
        await self.file.write(work)

    async def aclose(self) -> None:
        await super().aclose()
        await self.file.aclose()


def opened_sqlite(directory: Path) -> AbstractAsyncContextManager[Harness]:
    """Open a harness, and close it."""
    return opened_with_caches(SqliteHarness(directory / "cache.db"))
