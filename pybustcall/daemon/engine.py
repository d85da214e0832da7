"""What a bust removes: the named key, its variants, its dependents, as the strategy says.

This module decides which keys a bust covers and what a failure among them means. How a key is removed is the
backend's to know, what depends on what the index's, and how anybody asks is the app's.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from pybustcall.daemon.backends import BackendFailure, RefusedKey
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.models import STRATEGIES, check_target

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pybustcall.daemon.backends import Backend
    from pybustcall.daemon.index import Index

__all__ = ["Engine", "IndexFull", "Removal", "UnknownStrategy", "format_size", "read_registrations"]

_T = TypeVar("_T")

_SIZE_AGE: Final = 5.0  # seconds: walking a large cache for its size more often would hold up busts


class UnknownStrategy(ValueError):
    """No such strategy. `supported` names those that there are."""

    def __init__(self) -> None:
        super().__init__(f"the strategy is not known; supported are {', '.join(STRATEGIES)}")
        self.supported = STRATEGIES


class IndexFull(Exception):
    """There are as many entries as may be, and this would be another."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the registry is full: it has the most entries that it may have, {most}")


@final
@dataclass(frozen=True, slots=True)
class Removal:
    """What one bust removed, in order. Removing nothing is a success too: no cache holds the old value."""

    keys: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many keys were removed."""
        return len(self.keys)


@final
class Engine:
    """Applies busts to one backend, by what one index knows of dependents.

    - `direct`: exactly the named key
    - `dimensional`: the key, its variants, its dependents (also by way of others) and their variants
    - `hybrid`: `direct` first, then the rest of `dimensional`; all of it before it answers

    Belongs to one event loop; the work of a blocking backend runs in a thread, one call per bust. That thread cannot
    be interrupted: a bust whose caller is cancelled is completed all the same.
    """

    def __init__(self, backend: Backend, index: Index) -> None:
        self._backend = backend
        self._index = index
        self._measuring = asyncio.Lock()
        self._size: tuple[float, int] | None = None

    def __repr__(self) -> str:
        return f"Engine({self._backend!r}, {self._index!r})"

    @property
    def index(self) -> Index:
        """What this engine knows of entries and their dependents."""
        return self._index

    async def bust(self, target: str, strategy: str) -> Removal:
        """Remove what `target` and `strategy` cover.

        Raises `UnknownStrategy`; `RefusedKey` if the backend could never hold `target` and nothing depends on it (an
        abstract subject, such as "product:7", has dependents instead); `BackendFailure` if a key could not be
        removed, after all the others were tried.
        """
        if strategy not in STRATEGIES:
            raise UnknownStrategy
        keys = self._covered(target, strategy)
        return await self._call(lambda: _remove_all(self._backend, keys, wide=strategy != "direct"))

    def dependents(self, names: Iterable[str]) -> list[str]:
        """List the entries that depend on any of these names, also by way of others."""
        return sorted({key for name in names for key in self._index.dependents(name)})

    async def bust_dependents(self, names: Iterable[str]) -> Removal:
        """Remove what depends on any of these names, with the variants; the names themselves need be no keys.

        Raises `BackendFailure` if a key could not be removed, after all the others were tried.
        """
        keys = self.dependents(names)
        try:
            return await self._call(lambda: _remove_all(self._backend, keys, wide=True))
        except RefusedKey as error:
            raise BackendFailure(f"0 removed, 1 not removed: a key {error}") from error

    def _covered(self, target: str, strategy: str) -> Sequence[str]:
        dependents = self._index.dependents(target)
        try:
            self._backend.check(target)
        except RefusedKey:
            if not dependents:
                raise
            held = []
        else:
            held = [target]
        return held if strategy == "direct" else [*held, *dependents]

    def register(self, key: str, depends_on: Iterable[str] = (), *, most: int | None = None) -> None:
        """Note that the cache holds `key`, made of what `depends_on` names; a second time replaces the first.

        Raises `RefusedKey` if the backend could never hold `key`, and `IndexFull` if it is new and there are `most`
        entries already. What it depends on may be anything.
        """
        self._backend.check(key)
        if most is not None and len(self._index) >= most and key not in self._index:
            raise IndexFull(most)
        self._index.add(key, depends_on)

    def load_registrations(self, path: str | os.PathLike[str]) -> int:
        """Register what a JSON file lists, all or nothing; tell how many entries.

        Raises `ConfigurationError` (setting "entries") telling the file, the key, what was expected and what found.
        """
        entries = read_registrations(path)
        for key in entries:
            try:
                self._backend.check(key)
            except RefusedKey as error:
                raise _refuse(path, f"the key {_shown(key)} {error}") from None
        for key, depends_on in entries.items():
            self._index.add(key, depends_on)
        return len(entries)

    def restore(self, entries: Mapping[str, Iterable[str]]) -> None:
        """Register what an earlier process knew, joined with what is registered already: to bust more costs a miss.

        A key that this backend could never hold is left out.
        """
        for key, depends_on in entries.items():
            with suppress(RefusedKey):
                self._backend.check(key)
                self._index.add(key, (*self._index.dependencies(key), *depends_on))

    async def check_ready(self) -> None:
        """Raise `BackendFailure` if the cache cannot be used now."""
        await self._call(self._backend.check_ready)

    async def size_text(self) -> str:
        """Tell how large the cache is, as in "1.2MB". Of a blocking backend it may be 5 seconds old.

        Raises `BackendFailure` if it cannot be told.
        """
        if not self._backend.blocking:
            return format_size(self._backend.size_bytes())
        async with self._measuring:
            now = time.monotonic()
            if self._size is None or now - self._size[0] >= _SIZE_AGE:
                self._size = (now, await self._call(self._backend.size_bytes))
            return format_size(self._size[1])

    async def _call(self, act: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(act) if self._backend.blocking else act()


def _remove_all(backend: Backend, keys: Sequence[str], *, wide: bool) -> Removal:
    removed: dict[str, None] = {}
    failed: dict[str, Exception] = {}

    def remove(key: str) -> None:
        try:
            if backend.remove(key):
                removed[key] = None
        except (BackendFailure, RefusedKey) as error:
            failed[key] = error

    for key in keys:
        remove(key)
        if wide and key not in failed:
            try:
                variants = backend.variants(key)
            except (BackendFailure, RefusedKey) as error:
                failed[key] = error
            else:
                for variant in variants:
                    remove(variant)
    if not failed:
        return Removal(tuple(removed))
    first = next(iter(failed.values()))
    if len(keys) == 1 and not removed and isinstance(first, RefusedKey):
        raise first
    reason = f"a key {first}" if isinstance(first, RefusedKey) else str(first)
    raise BackendFailure(
        f"{len(removed)} removed, {len(failed)} not removed: {reason}", removed=len(removed), failed=len(failed)
    ) from first


def format_size(size: int) -> str:
    """Write a number of bytes for people: "512B", "1.2KB", "1.2MB"; 1 KB is 1000 bytes."""
    if size < 1000:
        return f"{size}B"
    scaled = float(size)
    for unit in ("KB", "MB", "GB", "TB"):
        scaled /= 1000
        if round(scaled, 1) < 1000:
            return f"{scaled:.1f}{unit}"
    return f"{scaled / 1000:.1f}PB"


def read_registrations(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Read a JSON object {"entry": ["what it depends on", ...], ...}.

    Raises `ConfigurationError` (setting "entries") for anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise _refuse(path, f"the key {_shown(key)} is there twice; list what it depends on once")
            seen[key] = value
        return seen

    try:
        document = json.loads(Path(path).read_bytes().decode(), object_pairs_hook=once)
    except OSError as error:
        raise _refuse(path, f"the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _refuse(
            path, f"expected UTF-8, found the byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise _refuse(path, f"expected JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise _refuse(path, "expected an object of lists, found deeper nesting") from None
    if not isinstance(document, dict):
        raise _refuse(path, f"expected an object of lists, found {_kind(document)}")
    return {_checked(path, "the key", key): _read_list(path, key, value) for key, value in document.items()}


def _read_list(path: str | os.PathLike[str], key: str, value: object) -> tuple[str, ...]:
    where = f"the key {_shown(key)}"
    if not isinstance(value, list):
        raise _refuse(path, f"{where}: expected a list of what it depends on, found {_kind(value)}")
    return tuple(_checked(path, f"{where}: number {number}", name) for number, name in enumerate(value, start=1))


def _checked(path: str | os.PathLike[str], where: str, name: object) -> str:
    if not isinstance(name, str):
        raise _refuse(path, f"{where}: expected a string, found {_kind(name)}")
    try:
        return check_target(name)
    except InvalidRequest as error:
        reason = str(error).removeprefix("target ").removesuffix("; nothing was sent")
        raise _refuse(path, f"{where} ({_shown(name)}) {reason}") from None


def _refuse(path: str | os.PathLike[str], why: str) -> ConfigurationError:
    return ConfigurationError(f"entries file {str(path)!r}: {why}", setting="entries")


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 60 else f"{name[:60]}...")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
