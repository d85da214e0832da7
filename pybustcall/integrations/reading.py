"""What the readers' caches of every kind have in common: look up, make, store, and what if the cache cannot be used.

This module decides what a reader does with what it finds. Where that lies, and how it is asked for, each kind decides
(`redis`, `sqlite`, `memcached`); who makes a value while others wait is decided by `filling`.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Generic, Literal, Self, TypeVar, final

from pybustcall.errors import BustcallError, ConfigurationError, InvalidRequest
from pybustcall.integrations.filling import Filling, Make, Wanted
from pybustcall.keys import check_marks
from pybustcall.models import check_maker, check_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Found", "Looked", "OnError", "ReadersCache", "storable"]

OnError = Literal["fill", "raise"]

_MOST_TAGS: Final = 256
_LONGEST: Final = 10.0**9  # seconds
_QUIET: Final = 10.0  # seconds between two lines of the log about a cache that cannot be used

_log = logging.getLogger("pybustcall.integrations")

_Token = TypeVar("_Token")


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A value that is held. `stale`: it was busted softly, and somebody is to make it anew."""

    value: bytes
    stale: bool


@final
@dataclass(frozen=True, slots=True)
class Looked(Generic[_Token]):
    """What a reader knows after it looked.

    - `found`: what is held, or None
    - `refresh`: it is stale, and this reader was chosen to make it anew
    - `token`: to hand in when a value is stored that was made from now on
    """

    found: Found | None
    refresh: bool
    token: _Token


class ReadersCache(ABC, Generic[_Token]):
    """A namespace of entries, each of them bytes under a key, with tags and a lifetime, wherever they lie."""

    _unavailable: ClassVar[type[BustcallError]]
    _least_lease: ClassVar[float] = 0.0
    _longest: ClassVar[float] = _LONGEST  # of a lease and of a lifetime, in seconds

    def __init__(self, *, lease: float, on_error: OnError) -> None:
        if on_error not in {"fill", "raise"}:
            raise ConfigurationError(f'on_error must be "fill" or "raise", not {on_error!r}', setting="on_error")
        if not (self._least_lease <= lease <= self._longest and lease > 0):
            least = f"from {self._least_lease:g}" if self._least_lease else "more than 0 and"
            raise ConfigurationError(
                f"lease must be {least} up to {self._longest:.0f} seconds, not {lease!r}", setting="lease"
            )
        self._lease = lease
        self._fills_on_error = on_error == "fill"
        self._filling: Filling[bytes] = Filling(_only_bytes)
        self._clock: Callable[[], float] = time.monotonic
        self._told = -math.inf

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Break off what is being made in the running loop, and close what is open. Repeating it is harmless.

        Whoever waits for a value gets `ClientClosed`. A call after that opens what it needs anew.
        """
        try:
            await self._filling.aclose()
        finally:
            await self._close()

    async def get_or_set(self, key: str, make: Make[bytes], *, tags: Iterable[str] = (), ttl: float | None) -> bytes:
        """Return the value under `key`; if nothing is held, make it, store it and return it.

        - `make`: an async or plain function without arguments that returns bytes; a plain one must not block
        - `tags`: up to 256 texts by which a bust finds the entry
        - `ttl`: seconds until the entry ends by itself; None is never

        If the entry is stale, one reader makes it anew, and all others get the stale value at once, but for those whose
        own `make` asks for it: what is made must not be made of what is stale. Whatever `make` raises is raised here.
        Of several calls at a time with one key, one `make` runs in each event loop; if the cache cannot be used, each
        runs its own. `make` may ask for other keys, and a task that it begins may. Raises `InvalidRequest`, before
        anything is made, for arguments that cannot be, such as a key with more than 128 of the marks `/:?#`,
        `RuntimeError` if it would wait for itself, since `make` asks for its own key, if only by way of others, and
        with on_error="raise" the error that all other calls raise if the cache cannot be used.
        """
        check_maker(make, "make")
        wanted = Wanted(storable(key), make, checked_tags(tags), checked_ttl(ttl, self._longest))
        self._filling.check(wanted.key)
        try:
            looked = await self._find(wanted)
        except self._unavailable as error:
            self._on_error(error)
            return await self._filling.alone(wanted)
        if looked.found is not None and not looked.refresh and not (looked.found.stale and self._filling.is_making):
            return looked.found.value
        return await self._filling.together(wanted, looked.token, partial(self._fill, looked.token))

    async def store(
        self, key: str, value: bytes, *, token: _Token, tags: Iterable[str] = (), ttl: float | None
    ) -> bool:
        """Store a value that was made after `token` was told; tell whether it was, or refused.

        It is refused if the key, a branch that it lies in, one of its tags, or everything was busted since: the value
        may be an old one. It may still be handed to whoever asked before that.
        """
        lifetime = checked_ttl(ttl, self._longest)
        return await self._store(storable(key), _value(value), token, checked_tags(tags), lifetime)

    async def set(self, key: str, value: bytes, *, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value whatever was busted; tell whether it was stored.

        For values that are new by themselves, such as what was just written. One that was read somewhere, and took a
        while, may be older than a bust: use `get_or_set`, or `lookup` and `store`.
        """
        lifetime = checked_ttl(ttl, self._longest)
        return await self._store(storable(key), _value(value), None, checked_tags(tags), lifetime)

    async def _fill(self, token: _Token, wanted: Wanted[bytes], value: bytes) -> None:
        try:
            await self._store(wanted.key, value, token, wanted.tags, wanted.ttl)
        except self._unavailable as error:
            self._on_error(error)

    def _on_error(self, error: BustcallError) -> None:
        """Raise it, or log it once in a while."""
        if not self._fills_on_error:
            raise error
        if (now := self._clock()) - self._told >= _QUIET:
            self._told = now
            _log.warning("values are made without a cache: %s", error)

    # What each kind does

    @abstractmethod
    async def _find(self, wanted: Wanted[bytes]) -> Looked[_Token]:
        """Tell what is held under the key of what is wanted; choose who makes a stale entry anew."""

    @abstractmethod
    async def _store(
        self, key: str, value: bytes, token: _Token | None, tags: tuple[str, ...], ttl: float | None
    ) -> bool:
        """Store a value, whatever was busted if there is no token; tell whether it was stored."""

    @abstractmethod
    async def _close(self) -> None:
        """Close what is open."""


def storable(key: object) -> str:
    """Return the key if entries can be stored under it; raise `InvalidRequest` otherwise."""
    checked = check_target(key, "key")
    check_marks(checked)
    return checked


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tell the tags, each once. Raises `InvalidRequest` for what cannot be."""
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidRequest(
            f"tags must be several texts, such as a list, not {tags!r:.60}; nothing was sent", field="tags"
        )
    checked = tuple(dict.fromkeys(check_target(tag, "tag") for tag in tags))
    if len(checked) > _MOST_TAGS:
        raise InvalidRequest(f"an entry has at most {_MOST_TAGS} tags; nothing was sent", field="tags")
    return checked


def checked_ttl(ttl: object, longest: float) -> float | None:
    """Tell a lifetime in seconds; None is for ever. Raises `InvalidRequest` for what cannot be."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= longest:
        raise InvalidRequest(
            f"ttl must be more than 0 seconds and at most {longest:.0f}, or None, not {ttl!r}; nothing was sent",
            field="ttl",
        )
    return float(ttl)


def _value(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise InvalidRequest(f"value must be bytes, not {type(value).__name__}; nothing was sent", field="value")
    return value


def _only_bytes(value: object) -> None:
    if not isinstance(value, bytes):
        raise TypeError(f"what makes a value must return bytes, not {type(value).__name__}")
