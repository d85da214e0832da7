"""What is registered, what it depends on, and which keys are variants of one another.

This module decides relations between keys. It removes nothing from any cache (the backends do) and does not decide
what a bust covers (the engine does). Everything here is synchronous, belongs to one thread, and takes O(log n) per
entry touched.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, final

from sortedcontainers import SortedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Index", "is_variant"]

_ENCODINGS: Final = (".br", ".deflate", ".gz", ".zst")
_REST_OF_VARIANT: Final = re.compile(r"(?:\.(?:br|deflate|gz|zst))?(?:\?.*)?", re.DOTALL)


def is_variant(key: str, other: str) -> bool:
    """Tell whether `other` is `key` in another encoding, with a query, or both, in either order.

    `main.css.gz`, `main.css?v=2`, `main.css.gz?v=2` and `main.css?v=2.gz` are variants of `main.css`; `main.css`
    itself, `main.css.map` and `main.css2` are not.
    """
    return len(other) > len(key) and other.startswith(key) and bool(_REST_OF_VARIANT.fullmatch(other, len(key)))


@final
class Index:
    """The registry of entries, and of which entry was made of what.

    A key may be depended on without being an entry itself: `product:7` is no file and no cached page, but pages are
    made of it. Not safe between threads.
    """

    def __init__(self) -> None:
        self._entries: SortedDict[str, tuple[str, ...]] = SortedDict()
        self._dependents: dict[str, set[str]] = {}
        self._size = 0
        self._tell: Callable[[str, tuple[str, ...] | None], None] | None = None

    def watch(self, tell: Callable[[str, tuple[str, ...] | None], None] | None) -> None:
        """Have every change told once it is made: the key, and what it depended on before, None if it was no entry.

        There is one watcher at a time; None is nobody.
        """
        self._tell = tell

    def add(self, key: str, depends_on: Iterable[str] = ()) -> None:
        """Register an entry; if it is known already, what it depends on is replaced."""
        dependencies = tuple(dict.fromkeys(name for name in depends_on if name != key))
        before = self._forget(key)
        self._entries[key] = dependencies
        self._size += _size_of(key)
        for name in dependencies:
            self._dependents.setdefault(name, set()).add(key)
        if self._tell is not None:
            self._tell(key, before)

    def remove(self, key: str) -> bool:
        """Forget an entry and what it depends on; tell whether it was known. What depends on it stays registered."""
        before = self._forget(key)
        if before is not None and self._tell is not None:
            self._tell(key, before)
        return before is not None

    def _forget(self, key: str) -> tuple[str, ...] | None:
        dependencies = self._entries.pop(key, None)
        if dependencies is None:
            return None
        self._size -= _size_of(key)
        for name in dependencies:
            self._dependents[name].remove(key)
            if not self._dependents[name]:
                del self._dependents[name]
        return dependencies

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        """Go through the registered keys, in order."""
        return iter(self._entries)

    def __repr__(self) -> str:
        return f"Index({len(self)} entries, {self._size} bytes of keys)"

    @property
    def size_bytes(self) -> int:
        """How many bytes of UTF-8 the registered keys have together."""
        return self._size

    def variants(self, key: str) -> list[str]:
        """List the entries that are variants of `key`, sorted: O(log n + m), m of them, whatever else begins alike."""
        found = []
        for encoding in _ENCODINGS:
            if key + encoding in self._entries:
                found.append(key + encoding)
            found += self._beginning_with(f"{key}{encoding}?")
        return [*found, *self._beginning_with(f"{key}?")]

    def dependents(self, key: str) -> list[str]:
        """List the entries that depend on `key`, also by way of others, sorted; never `key` itself."""
        found: set[str] = set()
        ahead = [key]
        while ahead:
            new = self._dependents.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return sorted(found - {key})

    def dependencies(self, key: str) -> tuple[str, ...]:
        """List what the entry `key` was registered as depending on, in that order; empty if it is no entry."""
        return self._entries.get(key, ())

    def _beginning_with(self, prefix: str) -> Iterator[str]:
        for key in self._entries.irange(minimum=prefix):
            if not key.startswith(prefix):
                return
            yield key


def _size_of(key: str) -> int:
    return len(key.encode("utf-8", "surrogatepass"))
