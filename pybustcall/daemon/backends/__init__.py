"""What the engine needs of a cache: the seam that every backend fits into.

This module decides only the shape of a backend and how it says no. Which keys a bust covers is the engine's to decide;
a backend looks at one key at a time.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Backend", "BackendFailure", "RefusedKey"]


class RefusedKey(ValueError):
    """This backend could never hold such a key. The text is the reason without the key: "has an empty segment"."""


class BackendFailure(Exception):
    """A cache could not do what was asked. The text never shows a whole key.

    `removed` and `failed` count the keys of the bust that were removed in spite of it, and those that were not.
    """

    def __init__(self, message: str, *, removed: int = 0, failed: int = 1) -> None:
        super().__init__(message)
        self.removed = removed
        self.failed = failed


class Backend(Protocol):
    """One cache that busts are applied to."""

    @property
    def name(self) -> str:
        """What this kind of backend is called, as in "memory"."""

    @property
    def blocking(self) -> bool:
        """Whether calls do I/O, and so belong in a thread. `check` never does."""

    def check(self, key: str) -> None:
        """Raise `RefusedKey` if this backend could never hold `key`."""

    def check_ready(self) -> None:
        """Raise `BackendFailure` if the cache cannot be used now."""

    def variants(self, key: str) -> list[str]:
        """List the keys held that are variants of `key`. Raises `RefusedKey` or `BackendFailure`."""

    def remove(self, key: str) -> bool:
        """Remove exactly `key`; tell whether there was anything. Raises `RefusedKey` or `BackendFailure`."""

    def size_bytes(self) -> int:
        """Tell how many bytes the cache holds. Raises `BackendFailure`."""
