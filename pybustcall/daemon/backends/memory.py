"""A cache that is nothing but its registry: what is registered is held, and removing an entry forgets it.

This backend decides nothing: it says of the index what a cache of files or a server says of its contents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from pybustcall.daemon.index import Index

__all__ = ["MemoryBackend"]


@final
class MemoryBackend:
    """Holds every entry of `index`, and any key is possible. Give the engine the same index."""

    name: Final = "memory"
    blocking: Final = False

    def __init__(self, index: Index) -> None:
        self._index = index

    def __repr__(self) -> str:
        return f"MemoryBackend({self._index!r})"

    def check(self, key: str) -> None:
        """Accept every key."""

    def check_ready(self) -> None:
        """Be ready, always."""

    def variants(self, key: str) -> list[str]:
        """List the registered variants of `key`, sorted."""
        return self._index.variants(key)

    def remove(self, key: str) -> bool:
        """Forget the entry and what it depends on; tell whether it was registered."""
        return self._index.remove(key)

    def size_bytes(self) -> int:
        """Tell how many bytes of UTF-8 the registered keys have."""
        return self._index.size_bytes
