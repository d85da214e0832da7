"""Entries in a Redis server: those that readers store through `RedisCache`, and plain keys of other programs.

This module decides how a bust goes to a Redis server. How entries lie there, what a late fill is refused by, and what
happens if the server forgets a part, is said by `redis_layout`.

Theory of operation. Entries of ours have an index in the server, so what a bust names is found by ranges, in pages of
at most 500 keys, each beginning behind the last key of the one before: entries may come and go meanwhile. Late fills
are refused by fences, and readers miss what is named as soon as the bust has begun.

Other programs' keys (`foreign`) have none of that. They are found by going through all keys of the server, and a second
bust, after `settle`, drops what a slow reader stored meanwhile. No tag leads to them, and they cannot be stale.

A server has one thread. So no script of ours takes more than some milliseconds: what is long is cut up, and where
entries have very many tags, scripts end early and are run again for the rest.
"""

from __future__ import annotations

import logging
import re
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

from pybustcall.daemon.backends import NO_KEYS, BackendFailure, RefusedKey, Traits, check_for_readers
from pybustcall.errors import ConfigurationError
from pybustcall.keys import is_variant
from pybustcall.models import DEFAULT_NAMESPACE
from pybustcall.redis_connection import RedisServer, RedisUnavailable
from pybustcall.redis_layout import (
    DEFAULT_PREFIX,
    EVERY,
    MAX_FENCES,
    Layout,
    Page,
    Token,
    check_prefix,
    exists,
    ranges_of_prefix,
    ranges_of_variants,
    unlink,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence

    from pybustcall.daemon.backends import Scope
    from pybustcall.models import Kind
    from pybustcall.redis_layout import Range

__all__ = ["RedisBackend"]

_BATCH: Final = 500  # keys that one script looks at
_REMOVED: Final = 50  # entries that one script removes at most
_WITH_VARIANTS: Final = 50  # keys whose variants one script looks for, each in nine ranges
_FENCED: Final = 250  # keys that one script puts up fences for
_YES: Final = ord("1")  # as scripts tell it of each key
_MOST_NAMESPACES: Final = 10_000  # of which it is remembered how far they were

_log = logging.getLogger("pybustcall.daemon")


@final
class RedisBackend:
    """Removes entries in the Redis server at `url`, or marks them as stale.

    - `prefix`: what the names of all our keys begin with; `RedisCache` has the same
    - `foreign`: what the names of other programs' keys look like that are busted, too, such as
      "shop:{namespace}:{key}"; `{key}` may be left out, and stands at the end. Without `{namespace}` they belong to the
      default namespace. With `foreign` nothing can be marked as stale. To find them takes a walk through all keys of
      the server, for a prefix, for everything, and for variants; `direct` busts of keys take none. Keys of ours, and
      those of which the name is not UTF-8, are left alone
    - `timeout`: seconds that the server has to answer; `connect_timeout`: more, to open a connection
    - `connections`: how many are open at most
    - `fences`: how many things that were busted are remembered in each namespace, to refuse late fills; beyond that
      more fills than necessary are refused

    Raises `ConfigurationError` if a setting cannot be used. A server that does not answer is a `BackendFailure` of each
    operation, and `unreachable`.
    """

    name: Final = "redis"

    def __init__(
        self,
        url: str,
        *,
        prefix: str = DEFAULT_PREFIX,
        foreign: str | None = None,
        timeout: float = 1.0,
        connect_timeout: float = 1.0,
        connections: int = 16,
        fences: int = MAX_FENCES,
    ) -> None:
        self._prefix = check_prefix(prefix)
        self._foreign = None if foreign is None else _Foreign(foreign, ours=f"{prefix}:{{")
        self._server = RedisServer(url, timeout=timeout, connect_timeout=connect_timeout, connections=connections)
        self._fences = fences
        self._known: dict[str, Token] = {}
        self._warned = False
        plain = foreign is None
        self.traits: Final = Traits(soft=plain, fences=plain, remote=True, settle=0.0 if plain else 1.0)

    def __repr__(self) -> str:
        return f"RedisBackend({self._server.where})"

    def check(self, namespace: str, key: str) -> None:  # noqa: ARG002 - all hold the same
        """Raise `RefusedKey` if no reader could store under `key`; other programs can under any that is UTF-8."""
        if self._foreign is None or not key or not _is_utf8(key):
            check_for_readers(key)

    async def open(self) -> None:
        """Do nothing: connections are opened when they are needed."""

    async def close(self) -> None:
        """Close the connections."""
        await self._server.aclose()

    async def check_ready(self) -> None:
        """Raise `BackendFailure` if the server does not let itself be written to.

        A server that may evict what is needed to find entries, or does not tell of its restarts, is warned of, once.
        """
        with _translated():
            await self._server.execute("HDEL", f"{Layout(self._prefix, DEFAULT_NAMESPACE).root}:m", "")
        if not self._warned:
            await self._warn()

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        """Begin a bust: refuse late fills, and, unless it is soft, let readers miss what is named."""
        layout, known = self._at(scope.namespace)
        with _translated():
            reply = await self._server.run(
                layout.begin(_fresh(), known, scope.kind, scope.target, soft=soft, wide=wide, most=self._fences)
            )
        told = Token.of(reply)
        if told.epoch:
            self._known[scope.namespace] = told.newest(known)
            if len(self._known) > _MOST_NAMESPACES:
                del self._known[next(iter(self._known))]
        return told.generation

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None:
        """Refuse late fills of these keys and of their variants, too, and let readers miss them unless it is soft."""
        layout, known = self._at(namespace)
        sound, _ = self._sifted(namespace, keys)
        for some in _cut(sound, _FENCED):
            call = layout.fence(_fresh(), known, some, generation=generation, soft=soft, most=self._fences)
            with _translated():
                await self._server.run(call)

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None:
        """End a bust; what another daemon has begun since goes on."""
        layout, known = self._at(scope.namespace)
        sound, _ = self._sifted(scope.namespace, list(keys))
        fences: list[tuple[Kind, str, int]] = [("key", key, keys[key]) for key in sound]
        if named:
            fences.insert(0, (scope.kind, scope.target, generation))
        for begin in range(0, len(fences), _FENCED):
            with _translated():
                await self._server.run(layout.end(_fresh(), known, fences[begin : begin + _FENCED]))

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        """Find what is held, in the order of the keys' bytes; other programs' keys after ours, in no order.

        To tell none of those twice it remembers all that it told.
        """
        if scope.kind == "key":
            if held := await self.held(scope.namespace, [scope.target], stale=True):
                yield held
            return
        base = self._base(scope.namespace) if scope.kind != "tag" else None
        told: set[str] = set()
        ranges = (EVERY,) if scope.kind != "prefix" else ranges_of_prefix(scope.target)
        tag = scope.target if scope.kind == "tag" else None
        while ranges:
            page = await self._page(scope.namespace, ranges, tag)
            ranges = page.rest
            if page.keys:
                if base is not None:
                    told.update(page.keys)
                yield page.keys
        if scope.kind == "all":
            await self._free(scope.namespace)
        if base is not None:
            async for keys in self._scan(base, "" if scope.kind == "all" else scope.target):
                new = [key for key in keys if scope.covers(key) and key not in told]
                told.update(new)
                for some in _cut(list(dict.fromkeys(new)), _BATCH):
                    yield some

    async def estimate(self, scope: Scope) -> int | None:
        """Tell how many keys the index has, ended ones included; None where all keys had to be gone through."""
        if scope.kind == "key":
            return len(await self.held(scope.namespace, [scope.target], stale=True))
        if scope.kind != "tag" and self._base(scope.namespace) is not None:
            return None
        layout, _ = self._at(scope.namespace)
        with _translated():
            if scope.kind == "prefix":
                counts = [
                    await self._server.execute("ZLEXCOUNT", layout.index(), low, high)
                    for low, high in ranges_of_prefix(scope.target)
                ]
                return int(sum(counts))
            index = layout.index(scope.target if scope.kind == "tag" else None)
            return int(await self._server.execute("ZCARD", index))

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        """List the variants held of any of `keys`, each once."""
        sound, _ = self._sifted(namespace, keys)
        found: dict[str, None] = {}
        for some in _cut(sound, _WITH_VARIANTS):
            ranges = tuple(it for key in some for it in ranges_of_variants(key))
            while ranges:
                page = await self._page(namespace, ranges, None)
                ranges = page.rest
                found.update(dict.fromkeys(page.keys))
        if sound and (base := self._base(namespace)) is not None:
            wanted = frozenset(sound)
            async for more in self._scan(base, _beginning(sound)):
                found.update((key, None) for key in more if _is_variant_of_any(wanted, key))
        return list(found)

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        """Remove these entries, or mark as stale what is fresh; tell how many of them there were.

        Raises `RefusedKey` for a single key that cannot be held here, and `BackendFailure` if several were given and
        any could not be removed, for whatever reason.
        """
        sound, refused = self._sifted(namespace, keys)
        if refused and len(keys) == 1:
            raise refused[0]
        layout, known = self._at(namespace)
        base = self._base(namespace)
        removed = done = 0
        try:
            while some := sound[done : done + _REMOVED]:
                told = await self._server.run(layout.remove(_fresh(), known, some, generation=generation, soft=soft))
                if base is not None and not soft:
                    plain = await self._server.run(unlink(base.names_of(some[: len(told)])))
                    removed += sum(_YES in either for either in zip(told, plain, strict=True))
                else:
                    removed += told.count(b"1")
                done += len(told)
        except RedisUnavailable as error:
            raise BackendFailure(
                str(error), removed=removed, failed=len(keys) - done, unreachable=error.whole
            ) from error
        if refused:
            raise BackendFailure(f"a key {refused[0]}", removed=removed, failed=len(refused)) from refused[0]
        return removed

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        """List those of `keys` that are held; other programs' keys are as old as anything."""
        sound, _ = self._sifted(namespace, keys)
        if not sound:
            return []
        layout, known = self._at(namespace)
        base = self._base(namespace)
        with _translated():
            told = await self._server.run(layout.held(_fresh(), known, sound, generation=generation, stale=stale))
            plain = told if base is None else await self._server.run(exists(base.names_of(sound)))
        return [key for key, *either in zip(sound, told, plain, strict=True) if _YES in either]

    async def size_bytes(self) -> int:
        """Tell how much memory the server uses, for whatever it holds."""
        with _translated():
            return int((await self._server.execute("INFO", "memory"))["used_memory"])

    # What is asked of the server

    async def _page(self, namespace: str, ranges: tuple[Range, ...], tag: str | None) -> Page:
        layout, known = self._at(namespace)
        with _translated():
            reply = await self._server.run(layout.select(_fresh(), known, ranges, tag=tag, limit=_BATCH))
        return Page.of(reply, ranges)

    async def _free(self, namespace: str) -> None:
        """Free what an epoch has left behind that began because the index was lost."""
        layout, known = self._at(namespace)
        try:
            epoch, lost = await self._server.execute(*layout.lost)
            if epoch is not None and lost is None:
                return
            async for names in self._walk(layout.names):
                done = 0
                while done < len(names):
                    done += await self._server.run(layout.free(_fresh(), known, names[done:]))
            if lost is not None:
                await self._server.run(layout.free(_fresh(), known, (), all_of=lost))
        except RedisUnavailable as error:
            if not error.answered:
                raise BackendFailure(str(error), unreachable=error.whole) from error
            # All that is held has been found, and the rest costs memory only.
            _log.warning("what the namespace %s had lost was not freed: %s", namespace, error)

    async def _scan(self, base: _Base, begin: str) -> AsyncIterator[list[str]]:
        """Go through other programs' keys that begin so, some of them more than once."""
        pattern = re.sub(rb"[\\*?\[\]^]", rb"\\\g<0>", base.text + begin.encode()) + b"*"
        with _translated():
            async for names in self._walk(pattern):
                if keys := [key for name in names if (key := base.key_of(name)) is not None]:
                    yield keys

    async def _walk(self, pattern: bytes) -> AsyncIterator[list[bytes]]:
        """Go through all names of the server that look so, some of them more than once."""
        cursor = 0
        while True:
            cursor, names = await self._server.execute("SCAN", cursor, "MATCH", pattern, "COUNT", _BATCH)
            if names:
                yield names
            if not cursor:
                return

    async def _warn(self) -> None:
        """Warn of a server that may evict the index, and of one that does not tell of its restarts."""
        try:
            found: Any = await self._server.execute("INFO", "memory")
        except RedisUnavailable as error:
            if error.answered:
                _log.warning(
                    "%s may not be asked for INFO by this user. So it is not noticed when the server comes back from an"
                    " older snapshot, unless by those who remember a later state. Allow it: ACL SETUSER NAME +info",
                    self._server.where,
                )
                self._warned = True
            return  # whether the server can be used is known
        policy = found.get("maxmemory_policy", "")
        if policy.startswith("allkeys") and found.get("maxmemory", 0):
            _log.warning(
                "%s has the maxmemory-policy %s: when it is full, it may evict the index by which entries are found."
                " Then a whole namespace is forgotten at its next bust or store. Use volatile-lru or volatile-ttl, and"
                " store entries with a ttl",
                self._server.where,
                policy,
            )
        self._warned = True

    def _at(self, namespace: str) -> tuple[Layout, Token | None]:
        return Layout(self._prefix, namespace), self._known.get(namespace)

    def _base(self, namespace: str) -> _Base | None:
        return None if self._foreign is None else self._foreign.base(namespace)

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


@final
class _Foreign:
    """What the names of other programs' keys look like."""

    def __init__(self, pattern: str, *, ours: str) -> None:
        head, _, tail = pattern.partition("{key}")
        first, tenant, second = head.partition("{namespace}")
        wrong = ""
        if tail:
            wrong = "goes on after {key}"
        elif not first:
            wrong = "begins with no text of its own, and so would cover keys of anybody"
        elif tenant and not re.match(r"[^A-Za-z0-9._-]", second):
            wrong = "needs a mark after {namespace}, such as a colon, or one tenant's keys could be another's"
        elif "{namespace}" in second:
            wrong = "has {namespace} twice"
        elif ours.startswith(first) or first.startswith(ours):
            wrong = "covers this daemon's own keys"
        if not _is_utf8(pattern):
            wrong = "has a lone surrogate, which UTF-8 cannot say"
        if wrong:
            raise ConfigurationError(f"foreign {wrong}: {pattern!a}", setting="foreign")
        self._first, self._tenant, self._second = first, bool(tenant), second

    def base(self, namespace: str) -> _Base | None:
        """Tell what the names of a namespace's keys begin with; None if it has none."""
        if self._tenant:
            return _Base(f"{self._first}{namespace}{self._second}".encode())
        return _Base(self._first.encode()) if namespace == DEFAULT_NAMESPACE else None


@final
class _Base:
    """What the names of one namespace's foreign keys begin with."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def names_of(self, keys: Sequence[str]) -> list[bytes]:
        """Tell the names of keys in the server."""
        return [self.text + key.encode() for key in keys]

    def key_of(self, name: bytes) -> str | None:
        """Tell the key of a name that begins so; None if it is none that a bust could name."""
        try:
            return name[len(self.text) :].decode() or None
        except UnicodeDecodeError:
            return None


def _is_variant_of_any(wanted: frozenset[str], key: str) -> bool:
    """Tell whether `key` is a variant of one of `wanted`: what such a one goes on with begins with a mark."""
    return any(
        character in "?." and key[:place] in wanted and is_variant(key[:place], key)
        for place, character in enumerate(key)
    )


def _beginning(keys: Sequence[str]) -> str:
    """Tell what all of these begin with: what the first and the last of them, in their order, have in common."""
    first, last = min(keys), max(keys)
    same = next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )
    return first[:same]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cut(keys: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    for begin in range(0, len(keys), most):
        yield keys[begin : begin + most]


def _fresh() -> str:
    return secrets.token_hex(8)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RedisUnavailable as error:
        raise BackendFailure(str(error), unreachable=error.whole) from error
