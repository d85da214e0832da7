"""Every backend of ours passes the conformance suite of backends, and the suite can tell one that does not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from pybustcall.daemon.backends import Backend, Scope
from pybustcall.daemon.backends.files import FilesBackend
from pybustcall.daemon.backends.memory import MemoryBackend
from pybustcall.daemon.index import Indexes
from pybustcall.models import DEFAULT_NAMESPACE as HERE
from tests.backend_conformance import CHECKS, Check, Fill, Harness, Seen, opened
from tests.memcached_harness import opened_memcached
from tests.redis_harness import opened_foreign, opened_redis
from tests.sqlite_harness import opened_sqlite


class MemoryHarness:
    """An application that registers what it holds."""

    tags = True

    def __init__(self) -> None:
        self.indexes = Indexes()
        self.backend: Backend = MemoryBackend(self.indexes)

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        self.indexes.of(namespace).add(key, tags=tags)
        return True

    async def drop(self, namespace: str, key: str) -> None:
        self.indexes.of(namespace).remove(key)

    async def look(self, namespace: str, key: str) -> Seen:
        index = self.indexes.of(namespace)
        return "missing" if key not in index else "stale" if index.is_stale(key) else "fresh"

    async def miss(self, namespace: str, key: str, *, tags: Sequence[str] = ()) -> Fill | None:
        return None


class FilesHarness:
    """An application that writes files, each tenant's below a directory of its own, or all below one."""

    tags = False

    def __init__(self, root: str) -> None:
        self.root = root
        self.backend: Backend = FilesBackend(root)

    def path(self, namespace: str, key: str) -> Path:
        return Path(self.root.replace("{namespace}", namespace), key)

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        path = self.path(namespace, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * size)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            return False
        return True

    async def drop(self, namespace: str, key: str) -> None:
        self.path(namespace, key).unlink(missing_ok=True)

    async def look(self, namespace: str, key: str) -> Seen:
        return "fresh" if self.path(namespace, key).is_file() else "missing"

    async def miss(self, namespace: str, key: str, *, tags: Sequence[str] = ()) -> Fill | None:
        return None


Making = Callable[[Path], AbstractAsyncContextManager[Harness]]


def made_in(where: str) -> Making:
    """Make a harness of files with a root below the directory of the test."""

    def make(directory: Path) -> AbstractAsyncContextManager[Harness]:
        (directory / "cache").mkdir()
        return opened(FilesHarness(str(directory / "cache" / where)))

    return make


HARNESSES: dict[str, Making] = {
    "memory": lambda _: opened(MemoryHarness()),
    "files": made_in("."),
    "files of tenants": made_in("{namespace}"),
    "files deep in tenants": made_in("{namespace}/deep/pages"),
    "sqlite": opened_sqlite,
    "memcached": opened_memcached,
    "redis": opened_redis,
    "redis with keys of others": opened_foreign("app:"),
    "redis with keys of others by tenants": opened_foreign("[app]*:{namespace}:{key}"),
}
"""How to make, in a directory of its own, the harness of each backend."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@pytest.mark.parametrize("kind", HARNESSES)
async def test_every_backend_does_what_the_engine_relies_on(kind: str, check: Check, tmp_path: Path) -> None:
    """Each check, over an empty cache."""
    async with HARNESSES[kind](tmp_path) as harness:
        if why := check.excluded(harness):
            pytest.skip(why)
        await check.run(harness)


def test_every_check_says_something_of_its_own() -> None:
    """Names are told apart."""
    assert len({check.name for check in CHECKS}) == len(CHECKS)


# Backends that get it wrong


class Altered:
    """A backend in memory of which something was altered."""

    def __init__(self, indexes: Indexes) -> None:
        self.indexes = indexes
        self.sound = MemoryBackend(indexes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sound, name)


class WholeBatch(Altered):
    """Tells all in one batch."""

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        found = [key async for batch in self.sound.select(scope) for key in batch]
        if found:
            yield found


class TellsTwice(Altered):
    """Tells some keys again."""

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        async for batch in self.sound.select(scope):
            yield batch
            yield batch[:1]


class PartsOfSegments(Altered):
    """Takes a prefix for any beginning, and tags for nothing."""

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        for key in self.indexes.of(scope.namespace):
            if key.startswith(scope.target) if scope.kind == "prefix" else scope.covers(key):
                yield [key]


class Globs(Altered):
    """Takes keys for patterns."""

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        for key in self.indexes.of(scope.namespace):
            if fnmatchcase(key, scope.target) if scope.kind == "key" else scope.covers(key):
                yield [key]


class OneTenant(Altered):
    """Looks for variants among one tenant's entries."""

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        return await self.sound.variants(HERE, keys)


class CountsMissing(Altered):
    """Counts what it was given."""

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        await self.sound.remove(namespace, keys, generation=generation, soft=soft)
        return len(keys)


class RemovesNew(Altered):
    """Removes what is newer than the bust, too."""

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        return await self.sound.remove(namespace, keys, generation=generation + 1000, soft=soft)


class NeverSoft(Altered):
    """Removes where it should mark."""

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        return await self.sound.remove(namespace, keys, generation=generation, soft=False)


class HoldsStale(Altered):
    """Takes stale entries for fresh ones."""

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        return await self.sound.held(namespace, keys, generation=generation, stale=True)


class VariantOfItself(Altered):
    """Takes a key for its own variant."""

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        return [*(await self.sound.variants(namespace, keys)), *keys]


class MinimumSize(Altered):
    """Tells the size of one entry."""

    async def size_bytes(self) -> int:
        return max(map(len, self.indexes.of(HERE)), default=0)


class Guesses(Altered):
    """Estimates one, always."""

    async def estimate(self, scope: Scope) -> int | None:
        return 1


@pytest.mark.parametrize(
    ("wrong", "told_by"),
    [
        (WholeBatch, "finds many in batches, each once"),
        (TellsTwice, "finds a branch by whole segments"),
        (PartsOfSegments, "finds a branch by whole segments"),
        (PartsOfSegments, "busts by tag, and nothing beside it"),
        (Globs, "takes characters of globs for characters"),
        (OneTenant, "keeps namespaces apart"),
        (OneTenant, "holds nothing in a namespace that nobody uses"),
        (CountsMissing, "counts what it removed, once"),
        (RemovesNew, "leaves alone what was stored after the bust began"),
        (RemovesNew, "marks nothing that was stored after the bust began"),
        (NeverSoft, "marks as stale, and counts each mark once"),
        (HoldsStale, "marks as stale, and counts each mark once"),
        (VariantOfItself, "finds the variants of keys, each once, and not the keys themselves"),
        (MinimumSize, "tells its size, in all namespaces"),
        (Guesses, "finds many in batches, each once"),
    ],
)
async def test_the_suite_can_tell_a_backend_that_gets_it_wrong(wrong: type[Altered], told_by: str) -> None:
    """Each way of getting it wrong is told by a check that says so."""
    harness = MemoryHarness()
    harness.backend = wrong(harness.indexes)
    (check,) = (check for check in CHECKS if check.name == told_by)
    with pytest.raises(AssertionError):
        await check.run(harness)
