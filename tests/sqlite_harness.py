"""The harness of an SQLite file for the conformance suite of backends: an application that stores as readers do."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from pybustcall import sqlite_layout as layout
from pybustcall.daemon.backends import Backend
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.sqlite_file import SqliteFile
from pybustcall.sqlite_layout import Seen as Found
from pybustcall.sqlite_layout import Token
from tests.backend_conformance import Fill, Harness, Seen

__all__ = ["SqliteHarness", "opened_sqlite"]

ROOM = 1 << 30


class SqliteHarness:
    """An application that stores in the file, by connections of its own."""

    tags = True

    def __init__(self, path: Path) -> None:
        self.backend: Backend = SqliteBackend(path)
        self.file = SqliteFile(path, timeout=5.0)

    async def _store(
        self, namespace: str, key: str, value: bytes, tags: Sequence[str], token: Token | None = None
    ) -> bool:
        work = partial(
            layout.store,
            namespace=namespace,
            key=key,
            value=value,
            known=None,
            tags=tags,
            ttl=60.0,
            token=token,
            room=ROOM,
            now=time.time(),
        )
        return (await self.file.write(work)).stored

    async def _look(self, namespace: str, key: str) -> Found:
        work = partial(
            layout.look_up,
            namespace=namespace,
            key=key,
            known=None,
            now=time.time(),
            since_start=time.monotonic(),
            lease=10.0,
        )
        return await self.file.read(work)

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        return await self._store(namespace, key, b"x" * size, tags)

    async def drop(self, namespace: str, key: str) -> None:
        far = 1 << 62
        work = partial(layout.remove, namespace=namespace, keys=[key], generation=far, soft=False, now=time.time())
        await self.file.write(work)

    async def look(self, namespace: str, key: str) -> Seen:
        found = (await self._look(namespace, key)).entry
        return "missing" if found is None else "stale" if found.stale else "fresh"

    async def miss(self, namespace: str, key: str, *, tags: Sequence[str] = ()) -> Fill | None:
        looked = await self._look(namespace, key)
        assert looked.entry is None

        async def fill() -> bool:
            return await self._store(namespace, key, b"late", tags, looked.token)

        return fill


@asynccontextmanager
async def opened_sqlite(directory: Path) -> AsyncIterator[Harness]:
    """Open a harness, and close it, with no descriptor left open."""
    before = len(os.listdir("/proc/self/fd"))
    harness = SqliteHarness(directory / "cache.db")
    await harness.backend.open()
    try:
        yield harness
    finally:
        await harness.backend.close()
        await harness.file.aclose()
    assert len(os.listdir("/proc/self/fd")) == before
