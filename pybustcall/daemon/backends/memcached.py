"""Entries in a memcached server, which readers store through `MemcachedCache`.

This module decides how a bust goes to a memcached server. How entries lie there, and what a late fill is refused by, is
said by `memcached_layout`.

Theory of operation. memcached cannot list keys, so nothing is looked for. `begin` and `fence` do all of it at once:
they bust the few items that stand for whatever a bust covers, and readers find out by these that their entries are
dead, or stale. So `select` tells nothing but of one key, and how many entries went, nobody can count.

How many of the keys themselves readers got until `begin` and `fence` is noted, and counted when `remove` names these.
`remove` itself drops what is still there and was stored before: what is dead takes memory until it is evicted. Older
and newer are told by the CAS number of a mark that `begin` puts. A server that was restarted counts from 1 again, and
everything looks old: that costs misses.
"""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar, final

from pybustcall import memcached_layout as items
from pybustcall.daemon.backends import NO_KEYS, BackendFailure, RefusedKey, Traits, check_for_readers
from pybustcall.memcached_connection import MemcachedServer, MemcachedUnavailable
from pybustcall.memcached_layout import DEFAULT_PREFIX, Command, Layout, check_prefix
from pybustcall.models import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from pybustcall.daemon.backends import Scope
    from pybustcall.memcached_layout import Answer, Reach

__all__ = ["MemcachedBackend"]

_T = TypeVar("_T")

_BATCH: Final = 500  # commands that are sent at a time
_VALUES: Final = 20  # entries that are read at a time, with their values
_TRIES: Final = 20  # to make something stale that others change at the same time
_MOST_NOTES: Final = 10_000  # busts of which it is noted what they found

_log = logging.getLogger("pybustcall.daemon")


@final
class MemcachedBackend:
    """Removes entries in the memcached server at `url`, or marks them as stale.

    - `url`: memcached://HOST, memcached://HOST:PORT or unix:///PATH: one server, 1.6.10 or later, run with CAS (not -C)
    - `prefix`: what the names of all our items begin with; `MemcachedCache` has the same
    - `timeout`: seconds that the server has to answer; `connect_timeout`: more, to open a connection
    - `connections`: how many are open at most

    Raises `ConfigurationError` if a setting cannot be used. A server that does not answer is a `BackendFailure` of each
    operation, and `unreachable`.
    """

    name: Final = "memcached"
    traits: Final = Traits(soft=True, fences=True, remote=True, counts=False)

    def __init__(
        self,
        url: str,
        *,
        prefix: str = DEFAULT_PREFIX,
        timeout: float = 1.0,
        connect_timeout: float = 1.0,
        connections: int = 16,
    ) -> None:
        self._prefix = check_prefix(prefix)
        self._server = MemcachedServer(url, timeout=timeout, connect_timeout=connect_timeout, connections=connections)
        self._notes: dict[int, dict[str, int]] = {}
        self._warned = False

    def __repr__(self) -> str:
        return f"MemcachedBackend({self._server.where})"

    def check(self, namespace: str, key: str) -> None:  # noqa: ARG002 - all hold the same
        """Raise `RefusedKey` if no reader could store under `key`."""
        check_for_readers(key)

    async def open(self) -> None:
        """Do nothing: connections are opened when they are needed."""

    async def close(self) -> None:
        """Close the connections."""
        await self._server.aclose()

    async def check_ready(self) -> None:
        """Raise `BackendFailure` if the server cannot be used; one that may evict nothing is warned of, once."""
        await self._put_mark()
        if not self._warned and "STAT evictions off" in await self._told(b"stats settings"):
            self._warned = True
            _log.warning(
                "%s evicts nothing (-M): once it is full, readers store nothing, and no bust can be made; start it"
                " without -M",
                self._server.where,
            )

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        """Bust what is named: readers miss it, or take it for stale, and late fills are refused."""
        layout = self._at(scope.namespace)
        (found,) = await self._bust(layout, [layout.reach(scope.kind, scope.target, wide=wide)], soft=soft)
        # It comes last: what has just been marked as stale has a number of now, and is older all the same.
        generation = 2 * await self._put_mark() + soft
        if len(self._notes) >= _MOST_NOTES:
            del self._notes[next(iter(self._notes))]
        self._notes[generation] = {scope.target: found}
        return generation

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None:
        """Bust these keys and their variants as well."""
        layout = self._at(namespace)
        sound, _ = self._sifted(namespace, keys)
        found = await self._bust(layout, [layout.reach("key", key, wide=True) for key in sound], soft=soft)
        notes = self._notes.get(generation, {})
        for key, count in zip(sound, found, strict=True):
            notes[key] = notes.get(key, 0) + count

    async def end(
        self,
        scope: Scope,  # noqa: ARG002 - nothing is left behind in the server
        generation: int,
        *,
        named: bool = True,
        keys: Mapping[str, int] = NO_KEYS,  # noqa: ARG002 - likewise
    ) -> None:
        """Forget what the bust found."""
        if named:
            self._notes.pop(generation, None)

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        """Tell a key if it is held; of all else nobody knows what it covers."""
        if scope.kind == "key" and (held := await self.held(scope.namespace, [scope.target], stale=True)):
            yield held

    async def estimate(self, scope: Scope) -> int | None:
        """Tell whether a key is held, as a number; None for all else."""
        if scope.kind != "key":
            return None
        return len(await self.held(scope.namespace, [scope.target], stale=True))

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        """List the other encodings held of any of `keys`, each once; variants with a query cannot be listed."""
        layout = self._at(namespace)
        sound, _ = self._sifted(namespace, keys)
        found = dict.fromkeys(it for key in sound for it in layout.encodings(key))
        wanted, _ = self._sifted(namespace, list(found))
        there = await self._got(layout, wanted, stale=True)
        return [key for key in wanted if key in there]

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        """Remove these entries, or mark as stale what is fresh; tell how many there were when the bust named them.

        Raises `RefusedKey` for a single key that cannot be held here, and `BackendFailure` if several were given and
        any could not be removed, for whatever reason.
        """
        sound, refused = self._sifted(namespace, keys)
        if refused and len(keys) == 1:
            raise refused[0]
        notes = self._notes.get(generation, {})
        names = {key: self._at(namespace).entry(key) for key in sound}
        removed = done = 0
        try:
            for some in _cut(list(names), _BATCH):
                told = await self._server.run([items.inspect(names[key]) for key in some])
                old = [
                    (names[key], answer)
                    for key, answer in zip(some, told, strict=True)
                    if 0 < answer.cas < generation // 2 and not (soft and "X" in answer.flags)
                ]
                if old:
                    busts = [items.bust(name, soft=soft, cas=answer.cas) for name, answer in old]
                    gone = await self._server.run(busts)
                    removed += sum(
                        it.done and items.is_entry(answer) for it, (_, answer) in zip(gone, old, strict=True)
                    )
                removed += sum(notes.pop(key, 0) for key in some)
                done += len(some)
        except MemcachedUnavailable as error:
            failed = len(names) - done + len(refused)
            raise BackendFailure(str(error), removed=removed, failed=failed, unreachable=error.whole) from error
        if refused:
            raise BackendFailure(f"a key {refused[0]}", removed=removed, failed=len(refused)) from refused[0]
        return removed

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        """List those of `keys` that are held; with a `generation` also what is dead, and takes memory only."""
        layout = self._at(namespace)
        sound, _ = self._sifted(namespace, keys)
        if generation is None:
            return [key for some in _cut(sound, _VALUES) for key in await self._alive(layout, some, stale=stale)]
        answers = await self._run([items.inspect(layout.entry(key)) for key in sound])
        return [
            key
            for key, answer in zip(sound, answers, strict=True)
            if items.is_entry(answer) and answer.cas < generation // 2 and (stale or "X" not in answer.flags)
        ]

    async def size_bytes(self) -> int:
        """Tell how many bytes the server uses for items, whosever they are."""
        found = re.search(r"^STAT bytes (\d+)$", await self._told(b"stats"), re.MULTILINE)
        if found is None:
            raise BackendFailure(f"{self._server.where} does not tell how many bytes it uses")
        return int(found[1])

    # What is asked of the server

    async def _bust(self, layout: Layout, reaches: Sequence[Reach], *, soft: bool) -> list[int]:
        """Bust these; tell for each how many entries readers got under its own keys, and as fresh if it is soft."""
        found = [0] * len(reaches)
        got = await self._got(layout, [key for reach in reaches for key in reach.keys], stale=not soft)
        await self._run([items.delete(name) for reach in reaches for name in reach.before])
        named = [
            (place, it) for place, reach in enumerate(reaches) for it in zip(reach.keys, reach.entries, strict=True)
        ]
        answers = await self._run(
            [it for _, (_, name) in named for it in (items.inspect(name), items.bust(name, soft=soft))]
        )
        for (place, (key, _)), answer in zip(named, answers[::2], strict=True):
            found[place] += key in got and items.is_entry(answer) and not (soft and "X" in answer.flags)
        generations = list(dict.fromkeys(name for reach in reaches for name in reach.generations))
        if soft:
            await self._soften(generations)
        else:
            await self._run([items.delete(name) for name in generations])
        return found

    async def _got(self, layout: Layout, keys: Sequence[str], *, stale: bool) -> set[str]:
        """Tell which of these keys readers get now. What is dead takes memory only, since an earlier bust."""
        answers = await self._run([items.inspect(layout.entry(key)) for key in keys])
        there = [key for key, answer in zip(keys, answers, strict=True) if items.is_entry(answer)]
        return {key for some in _cut(there, _VALUES) for key in await self._alive(layout, some, stale=stale)}

    async def _soften(self, names: Sequence[bytes]) -> None:
        """Make stale what these generations cover. Under one that is missing, everything is dead."""
        left = list(names)
        for _ in range(_TRIES):
            answers = await self._run([items.read(name) for name in left])
            there = [(name, it) for name, it in zip(left, answers, strict=True) if items.generation_of(it) is not None]
            told = await self._run([items.soften(name, answer) for name, answer in there])
            left = [name for (name, _), answer in zip(there, told, strict=True) if answer.code == "EX"]
            if not left:
                return
        raise BackendFailure(
            f"{self._server.where}: others bust the same, again and again; nobody knows if it is stale"
        )

    async def _alive(self, layout: Layout, keys: Sequence[str], *, stale: bool) -> list[str]:
        """List those of a few keys that a reader gets."""
        answers = await self._run([items.read(layout.entry(key)) for key in keys])
        entries = {
            key: entry
            for key, answer in zip(keys, answers, strict=True)
            if (entry := layout.unpack(key, answer)) is not None
        }
        covering = {key: layout.covering(key, entry.tags) for key, entry in entries.items()}
        names = list(dict.fromkeys(name for some in covering.values() for name in some))
        read = await self._run([items.read(name) for name in names])
        now = dict(zip(names, map(items.generation_of, read), strict=True))
        wanted = {"fresh", "stale"} if stale else {"fresh"}
        return [
            key for key, entry in entries.items() if items.judge(entry, [now[it] for it in covering[key]]) in wanted
        ]

    async def _put_mark(self) -> int:
        """Tell a CAS number that is higher than all so far."""
        (answer,) = await self._run([items.put_mark(self._at(DEFAULT_NAMESPACE).mark)])
        if not answer.cas:
            raise BackendFailure(
                f"{self._server.where} was started without CAS (-C), by which late fills are refused; start it without"
                " -C",
                unreachable=True,
            )
        return answer.cas

    async def _told(self, question: bytes) -> str:
        (answer,) = await self._run([Command(question, until=b"END")])
        return answer.text

    async def _run(self, commands: Sequence[Command]) -> list[Answer]:
        """Run any number of commands, in their order."""
        answers: list[Answer] = []
        with _translated():
            for some in _cut(commands, _BATCH):
                answers += await self._server.run(some)
        return answers

    def _at(self, namespace: str) -> Layout:
        return Layout(self._prefix, namespace)

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


def _cut(things: Sequence[_T], most: int) -> Iterator[Sequence[_T]]:
    for begin in range(0, len(things), most):
        yield things[begin : begin + most]


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except MemcachedUnavailable as error:
        raise BackendFailure(str(error), unreachable=error.whole) from error
