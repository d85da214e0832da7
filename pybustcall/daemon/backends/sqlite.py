"""Entries in an SQLite file on this machine: those that readers store through `SqliteCache`.

This module decides how a bust goes to such a file. How entries lie there, what a late fill is refused by, and what
happens if the file is damaged or went back, is said by `sqlite_layout` and `sqlite_file`.

Theory of operation. What a bust names is found by ranges, in pages of at most 500 keys, each beginning behind the last
key of the one before: entries may come and go meanwhile. Late fills are refused by fences, and readers miss what is
named as soon as the bust has begun, which is on the disk by then. What is removed after it is so at the latest when the
bust ends.

While the daemon writes, no reader can store. So it removes in portions of some milliseconds, and after each it pauses
for as long as that one took: a sweep leaves readers half of the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, final

from pybustcall import sqlite_layout as layout
from pybustcall.daemon.backends import NO_KEYS, BackendFailure, RefusedKey, Traits, check_for_readers
from pybustcall.sqlite_file import SqliteFile, SqliteUnavailable
from pybustcall.sqlite_layout import EVERY, MAX_FENCES, ranges_of_prefix

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from pybustcall.daemon.backends import Scope
    from pybustcall.models import Kind
    from pybustcall.sqlite_layout import Page, Range, Token

__all__ = ["SqliteBackend"]

_BATCH: Final = 500  # keys that one look finds
_REMOVED: Final = 100  # entries that one transaction removes
_WITH_VARIANTS: Final = 50  # keys whose variants one look finds, each in nine ranges
_FENCED: Final = 100  # keys that one transaction puts up fences for
_COUNTED: Final = 200_000  # keys beyond which they are not counted in advance
_TIDIED: Final = 50  # entries that are over, which one transaction drops
_WHOLE: Final = 128  # the cost of what has a transaction of its own
_PAUSE: Final = 5.0  # seconds between two looks at what is over
_BREATH: Final = 0.01  # seconds between two portions of it
_MOST_NAMESPACES: Final = 10_000  # of which it is remembered how far they were

_log = logging.getLogger("pybustcall.daemon")


@final
class SqliteBackend:
    """Removes entries in the SQLite file at `path`, or marks them as stale; drops what is over.

    - `path`: a file on a local disk, which `SqliteCache` names, too; it is made if it is missing, its directory is not
    - `timeout`: seconds that another process may keep the file locked
    - `fences`: how many things that were busted are remembered in each namespace, to refuse late fills; beyond that
      more fills than necessary are refused

    Raises `ConfigurationError` if a setting cannot be used. A file that cannot be used is a `BackendFailure` of each
    operation, and `unreachable`.
    """

    name: Final = "sqlite"
    traits: Final = Traits(soft=True, fences=True)

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 1.0, fences: int = MAX_FENCES) -> None:
        self._file = SqliteFile(path, timeout=timeout)
        self._fences = fences
        self._known: dict[str, Token] = {}
        self._tidying: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"SqliteBackend({self._file.path!r})"

    @property
    def path(self) -> str:
        """Where the file is, as an absolute path."""
        return self._file.path

    def check(self, namespace: str, key: str) -> None:  # noqa: ARG002 - all hold the same
        """Raise `RefusedKey` if no reader could store under `key`."""
        check_for_readers(key)

    async def open(self) -> None:
        """Begin to drop what is over, now and then; the file is opened when it is needed."""
        self._tidying = asyncio.create_task(self._keep_tidy())

    async def close(self) -> None:
        """Close the file."""
        tidying, self._tidying = self._tidying, None
        try:
            if tidying is not None:
                tidying.cancel()
                await asyncio.wait({tidying})
        finally:
            await self._file.aclose()

    async def check_ready(self) -> None:
        """Raise `BackendFailure` if the file cannot be written to."""
        with _translated():
            await self._file.write(_nothing)

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        """Begin a bust: refuse late fills, and, unless it is soft, let readers miss what is named."""
        known = self._known.get(scope.namespace)

        def work(db: sqlite3.Connection) -> Token:
            kind, target = scope.kind, scope.target
            return layout.begin(db, scope.namespace, kind, target, known, soft=soft, wide=wide, most=self._fences)

        with _translated():
            told = await self._file.write(work, safe=True, cost=10)
        self._known[scope.namespace] = told.newest(self._known.get(scope.namespace))
        if len(self._known) > _MOST_NAMESPACES:
            del self._known[next(iter(self._known))]
        return told.generation

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None:
        """Refuse late fills of these keys and of their variants, too, and let readers miss them unless it is soft."""
        sound, _ = self._sifted(namespace, keys)
        for some in _cut(sound, _FENCED):
            work = partial(_fenced, namespace=namespace, keys=some, generation=generation, soft=soft, most=self._fences)
            with _translated():
                await self._file.write(work, cost=_WHOLE)

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None:
        """End a bust; what another daemon has begun since goes on."""
        sound, _ = self._sifted(scope.namespace, list(keys))
        fences: list[tuple[Kind, str, int]] = [("key", key, keys[key]) for key in sound]
        if named:
            fences.insert(0, (scope.kind, scope.target, generation))
        for begin in range(0, len(fences), _FENCED):
            work = partial(_ended, namespace=scope.namespace, fences=fences[begin : begin + _FENCED])
            with _translated():
                await self._file.write(work, safe=True)

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        """Find what is held, in the order of the keys' bytes."""
        if scope.kind == "key":
            if found := await self.held(scope.namespace, [scope.target], stale=True):
                yield found
            return
        ranges, tag = _ranges_of(scope)
        while ranges:
            page = await self._page(scope.namespace, ranges, tag)
            ranges = page.rest
            if page.keys:
                yield page.keys

    async def estimate(self, scope: Scope) -> int | None:
        """Tell how many keys there are, those that are over included; None if there are very many."""
        if scope.kind == "key":
            return len(await self.held(scope.namespace, [scope.target], stale=True))
        ranges, tag = _ranges_of(scope)
        with _translated():
            return await self._file.read(lambda db: layout.count(db, scope.namespace, ranges, tag=tag, most=_COUNTED))

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        """List the variants held of any of `keys`, each once."""
        sound, _ = self._sifted(namespace, keys)
        found: dict[str, None] = {}
        for some in _cut(sound, _WITH_VARIANTS):
            work = partial(_variants, namespace=namespace, keys=some)
            with _translated():
                found.update(dict.fromkeys(await self._file.read(work)))
        return list(found)

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        """Remove these entries, or mark as stale what is fresh; tell how many of them there were.

        Raises `RefusedKey` for a single key that cannot be held here, and `BackendFailure` if several were given and
        any could not be removed, for whatever reason.
        """
        sound, refused = self._sifted(namespace, keys)
        if refused and len(keys) == 1:
            raise refused[0]
        removed = done = 0
        try:
            for some in _cut(sound, _REMOVED):
                begun = time.monotonic()
                work = partial(_removed, namespace=namespace, keys=some, generation=generation, soft=soft)
                removed += await self._file.write(work, cost=len(some))
                done += len(some)
                if len(some) == _REMOVED:
                    await asyncio.sleep(time.monotonic() - begun)
        except SqliteUnavailable as error:
            raise BackendFailure(str(error), removed=removed, failed=len(keys) - done, unreachable=True) from error
        if refused:
            raise BackendFailure(f"a key {refused[0]}", removed=removed, failed=len(refused)) from refused[0]
        return removed

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        """List those of `keys` that are held."""
        sound, _ = self._sifted(namespace, keys)
        if not sound:
            return []
        with _translated():
            return await self._file.read(
                lambda db: layout.held(db, namespace, sound, generation=generation, stale=stale, now=time.time())
            )

    async def size_bytes(self) -> int:
        """Tell how many bytes of the file are in use."""
        with _translated():
            return await self._file.read(layout.used_bytes)

    async def _page(self, namespace: str, ranges: tuple[Range, ...], tag: str | None) -> Page:
        with _translated():
            return await self._file.read(
                lambda db: layout.page(db, namespace, ranges, tag=tag, limit=_BATCH, now=time.time())
            )

    async def _keep_tidy(self) -> None:
        """Drop what is over, and give room back, now and then."""
        more = False
        while True:
            await asyncio.sleep(_BREATH if more else _PAUSE)
            more = False
            try:
                more = await self._file.write(_tidied, cost=_WHOLE)
            except SqliteUnavailable as error:
                _log.debug("what is over in a cache was not dropped: %s", error)  # busts and readiness tell of it

    def _sifted(self, namespace: str, keys: Sequence[str]) -> tuple[list[str], list[RefusedKey]]:
        sound: list[str] = []
        refused: list[RefusedKey] = []
        for key in keys:
            try:
                self.check(namespace, key)
            except RefusedKey as error:
                refused.append(error)
            else:
                sound.append(key)
        return sound, refused


def _nothing(_: sqlite3.Connection) -> None:
    """Do nothing, in a transaction that writes."""


def _fenced(
    db: sqlite3.Connection, *, namespace: str, keys: Sequence[str], generation: int, soft: bool, most: int
) -> None:
    layout.fence(db, namespace, keys, generation=generation, soft=soft, most=most)


def _ended(db: sqlite3.Connection, *, namespace: str, fences: Sequence[tuple[Kind, str, int]]) -> None:
    layout.end(db, namespace, fences)


def _removed(db: sqlite3.Connection, *, namespace: str, keys: Sequence[str], generation: int, soft: bool) -> int:
    return layout.remove(db, namespace, keys, generation=generation, soft=soft, now=time.time())


def _variants(db: sqlite3.Connection, *, namespace: str, keys: Sequence[str]) -> tuple[str, ...]:
    return layout.variants(db, namespace, keys, now=time.time())


def _tidied(db: sqlite3.Connection) -> bool:
    """Drop a portion of what is over, or give a portion of room back; tell whether there may be more."""
    return layout.tidy(db, most=_TIDIED, now=time.time()) == _TIDIED or layout.shrink(db)


def _ranges_of(scope: Scope) -> tuple[tuple[Range, ...], str | None]:
    """Tell the ranges of keys that a scope names, and the tag that they must have."""
    if scope.kind == "prefix":
        return ranges_of_prefix(scope.target), None
    return (EVERY,), scope.target if scope.kind == "tag" else None


def _cut(keys: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    for begin in range(0, len(keys), most):
        yield keys[begin : begin + most]


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SqliteUnavailable as error:
        raise BackendFailure(str(error), unreachable=True) from error
