"""Small caches for tests, behind the seam that the engine knows: what a test wants to tell takes three methods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from pybustcall.daemon import Backend, Engine, Indexes, Layer
from pybustcall.daemon.backends import NO_KEYS, BackendFailure, RefusedKey, Scope, Traits
from pybustcall.daemon.index import Index
from pybustcall.daemon.journal import Wish
from pybustcall.models import DEFAULT_NAMESPACE


class PlainCache(Protocol):
    """A cache that looks at one key at a time, and may block."""

    name: str

    def check(self, key: str) -> None: ...

    def check_ready(self) -> None: ...

    def variants(self, key: str) -> list[str]: ...

    def remove(self, key: str) -> bool: ...

    def size_bytes(self) -> int: ...


class Plain:
    """A plain cache as a backend; all that it does is done in a thread. It finds nothing by itself but single keys."""

    def __init__(self, cache: PlainCache, traits: Traits | None = None) -> None:
        self.cache = cache
        self.name = cache.name
        self.traits = traits or Traits(namespaces=False)
        self.opened = 0

    def check(self, namespace: str, key: str) -> None:
        self.cache.check(key)

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.opened -= 1

    async def check_ready(self) -> None:
        await asyncio.to_thread(self.cache.check_ready)

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        return 0

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None: ...

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None: ...

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        for _ in range(0):
            yield []

    async def estimate(self, scope: Scope) -> int | None:
        return None

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        return await asyncio.to_thread(lambda: [name for key in keys for name in self.cache.variants(key)])

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        return await asyncio.to_thread(self._remove, keys)

    def _remove(self, keys: Sequence[str]) -> int:
        removed, failures = 0, []
        for key in keys:
            try:
                removed += self.cache.remove(key)
            except (BackendFailure, RefusedKey) as error:
                if isinstance(error, RefusedKey) and len(keys) == 1:
                    raise
                told = error if isinstance(error, BackendFailure) else BackendFailure(f"a key {error}")
                failures.append(told)
        if failures:
            first = failures[0]
            raise BackendFailure(
                str(first), removed=removed, failed=len(failures), unreachable=first.unreachable
            ) from first
        return removed

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        return []

    async def size_bytes(self) -> int:
        return await asyncio.to_thread(self.cache.size_bytes)


def engine_over(cache: Any, indexes: Indexes | None = None, **layer: Any) -> Engine:
    """Make an engine of one layer without a second bust: over a backend, or over a plain cache."""
    backend: Backend = Plain(cache) if hasattr(cache, "blocking") else cache
    made = Layer(name=backend.name, number=0, backend=backend, **{"settle": 0, **layer})
    return Engine([made], Indexes() if indexes is None else indexes)


def index_of(engine: Engine, namespace: str = DEFAULT_NAMESPACE) -> Index:
    """Tell what an engine knows of a namespace."""
    return engine.indexes.of(namespace)


@asynccontextmanager
async def opened(engine: Engine) -> AsyncIterator[Engine]:
    """Have an engine's backends open for a while."""
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def busted(engine: Engine, target: str, strategy: str = "dimensional", **wish: Any) -> int:
    """Bust at every layer of an engine; tell how many entries went."""
    asked = Wish(**{"namespace": DEFAULT_NAMESPACE, "kind": "key", "target": target, "strategy": strategy, **wish})
    engine.check(asked)
    bust = engine.bust(asked)
    for layer in engine.layers:
        await bust.visit(layer)
    return sum(bust.removed.values())
