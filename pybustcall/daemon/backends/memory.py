"""A cache that is nothing but its registry: what is registered is held, and removing an entry forgets it.

This backend decides nothing: it says of the indexes what a cache of files or a server says of its contents. It needs no
fence: nobody stores in it but by registering, and what was registered after a bust began is newer than that.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, final

from pybustcall.daemon.backends import NO_KEYS, Traits

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from pybustcall.daemon.backends import Scope
    from pybustcall.daemon.index import Index, Indexes

__all__ = ["MemoryBackend"]

_BATCH: Final = 500  # keys


@final
class MemoryBackend:
    """Holds every entry of `indexes`, and any key is possible. Give the engine the same indexes.

    A namespace without entries costs nothing, however often it is busted.
    """

    name: Final = "memory"
    traits: Final = Traits(soft=True, registry=True)

    def __init__(self, indexes: Indexes) -> None:
        self._indexes = indexes

    def __repr__(self) -> str:
        return f"MemoryBackend({self._indexes!r})"

    def check(self, namespace: str, key: str) -> None:
        """Accept every key."""

    async def open(self) -> None:
        """Be ready, always."""

    async def close(self) -> None:
        """Keep all entries: they are the daemon's, whatever becomes of this backend."""

    async def check_ready(self) -> None:
        """Be ready, always."""

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:  # noqa: ARG002 - as the others do
        """Begin a generation: what is registered from now on is left alone by this bust."""
        self._indexes.expire()  # busts of keys ask nothing else that would drop what is over
        return self._indexes.begin()

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None:
        """Do nothing: see the module."""

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None:
        """Do nothing: a generation needs no end."""

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        """Find the entries that `scope` names, in order, in batches; the event loop has its turn between two."""
        after: str | None = None
        while (index := self._indexes.peek(scope.namespace)) is not None:
            if index.expire():  # all that is over goes first, or one batch might have to pass by any number of those
                await asyncio.sleep(0)
                continue
            batch = _some(index, scope, after)
            if batch:
                yield batch
            if len(batch) < _BATCH:
                return
            after = batch[-1]
            await asyncio.sleep(0)

    async def estimate(self, scope: Scope) -> int | None:
        """Tell how many entries `scope` names now, of those that are over some too many."""
        index = self._indexes.peek(scope.namespace)
        if index is None:
            return 0
        match scope.kind:
            case "key":
                return int(scope.target in index)
            case "prefix":
                return index.count_under(scope.target)
            case "tag":
                return index.count_tagged(scope.target)
            case "all":
                return len(index)

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        """List the registered variants of any of `keys`, each once."""
        index = self._indexes.peek(namespace)
        return [] if index is None else list(dict.fromkeys(name for key in keys for name in index.variants(key)))

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        """Forget these entries with what they depend on, or mark them as stale; tell how many changed by that."""
        index = self._indexes.peek(namespace)
        if index is None:
            return 0
        act = index.mark_stale if soft else index.remove
        return sum(act(key) for key in keys if _was_there(index, key, generation))

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        """List those of `keys` that are registered; what is marked as stale only if `stale` says so."""
        index = self._indexes.peek(namespace)
        if index is None:
            return []
        return [key for key in keys if _was_there(index, key, generation) and (stale or not index.is_stale(key))]

    async def size_bytes(self) -> int:
        """Tell how many bytes of UTF-8 the registered keys have."""
        return self._indexes.size_bytes


def _some(index: Index, scope: Scope, after: str | None) -> list[str]:
    match scope.kind:
        case "key":
            return [scope.target] if scope.target in index else []
        case "prefix":
            return index.under(scope.target, after=after, limit=_BATCH)
        case "tag":
            return index.tagged(scope.target, after=after, limit=_BATCH)
        case "all":
            return index.keys(after=after, limit=_BATCH)


def _was_there(index: Index, key: str, generation: int | None) -> bool:
    """Tell whether `key` is an entry, and was one before `generation` began."""
    born = index.born(key)
    return born is not None and (generation is None or born < generation)
