"""An application that stores through a readers' cache: what the harnesses of such caches share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from pybustcall.daemon.backends import Backend
from pybustcall.integrations.reading import ReadersCache
from tests.backend_conformance import Fill, Harness, Seen, opened

__all__ = ["ReadersHarness", "opened"]


class ReadersHarness(ABC):
    """An application with a cache of its own for each tenant."""

    tags = True

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.caches: dict[str, Any] = {}

    @abstractmethod
    def make(self, namespace: str) -> ReadersCache[Any]:
        """Make a tenant's cache."""

    @abstractmethod
    async def drop(self, namespace: str, key: str) -> None:
        """Lose an entry behind everybody's back."""

    def cache(self, namespace: str) -> Any:
        """Tell the tenant's own cache."""
        if namespace not in self.caches:
            self.caches[namespace] = self.make(namespace)
        return self.caches[namespace]

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        stored: bool = await self.cache(namespace).set(key, b"x" * size, tags=tags, ttl=60.0)
        return stored

    async def look(self, namespace: str, key: str) -> Seen:
        found = await self.cache(namespace).get(key)
        return "missing" if found is None else "stale" if found.stale else "fresh"

    async def miss(self, namespace: str, key: str, *, tags: Sequence[str] = ()) -> Fill | None:
        looked = await self.cache(namespace).lookup(key)
        assert looked.found is None

        async def fill() -> bool:
            stored: bool = await self.cache(namespace).store(key, b"late", token=looked.token, tags=tags, ttl=60.0)
            return stored

        return fill

    async def aclose(self) -> None:
        """Close what it has opened."""
        for cache in self.caches.values():
            await cache.aclose()


def opened_with_caches(harness: ReadersHarness) -> AbstractAsyncContextManager[Harness]:
    """Open a harness, and close it and the caches that its application has opened."""
    return opened(harness, harness.aclose)
