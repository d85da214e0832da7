"""How keys are made: of segments, by which a prefix covers them, and as variants of one another.

This module decides nothing else. Who holds keys, and what is done with those that are covered, is decided elsewhere; it
stands here since the daemon and the readers of a cache must agree on it.
"""

from __future__ import annotations

import re
from typing import Final

from pybustcall.errors import InvalidRequest

__all__ = [
    "ENCODINGS",
    "MOST_MARKS",
    "SEPARATORS",
    "bases_of",
    "check_marks",
    "covers",
    "is_variant",
    "prefixes_of",
    "ranges_of",
]

SEPARATORS: Final = "/:?#"
"""What a segment ends at."""
ENCODINGS: Final = (".br", ".deflate", ".gz", ".zst")
"""What another encoding of an entry adds to its key."""

MOST_MARKS: Final = 128
"""Marks that end a segment, in a key that entries are stored under: each takes a look at what was busted."""

_REST_OF_VARIANT: Final = re.compile(r"(?:\.(?:br|deflate|gz|zst))?(?:\?.*)?", re.DOTALL)


def covers(prefix: str, key: str) -> bool:
    """Tell whether `key` is `prefix` or lies below it: `a/b` covers `a/b`, `a/b/c` and `a/b?c`, and never `a/bc`.

    A prefix that ends with a separator covers what begins so: `a/b/` covers `a/b/c`, and not `a/b`.
    """
    if not key.startswith(prefix):
        return False
    return len(key) == len(prefix) or prefix[-1] in SEPARATORS or key[len(prefix)] in SEPARATORS


def ranges_of(prefix: str) -> tuple[tuple[str, str], ...]:
    """List the ranges (from, up to but without) of keys, ordered by code points, that `prefix` covers beside itself.

    The order of UTF-8 bytes is the same one.
    """
    if prefix[-1] in SEPARATORS:
        return ((prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)),)
    return tuple((prefix + mark, prefix + chr(ord(mark) + 1)) for mark in sorted(SEPARATORS))


def prefixes_of(key: str) -> tuple[str, ...]:
    """List the prefixes that cover `key`, the shortest first and itself last: `a`, `a/`, `a/b` of `a/b`."""
    found: dict[str, None] = {}
    for place, character in enumerate(key):
        if character in SEPARATORS:
            if place:
                found[key[:place]] = None
            found[key[: place + 1]] = None
    found[key] = None
    return tuple(found)


def is_variant(key: str, other: str) -> bool:
    """Tell whether `other` is `key` in another encoding, with a query, or both, in either order.

    `main.css.gz`, `main.css?v=2`, `main.css.gz?v=2` and `main.css?v=2.gz` are variants of `main.css`; `main.css`
    itself, `main.css.map` and `main.css2` are not.
    """
    return len(other) > len(key) and other.startswith(key) and bool(_REST_OF_VARIANT.fullmatch(other, len(key)))


def bases_of(key: str) -> tuple[str, ...]:
    """List what `key` is a variant of, the longest first: `main.css.gz` and `main.css` of `main.css.gz?v=2`.

    A base ends where a query or an encoding begins; `is_variant` holds of each, and of nothing else.
    """
    places = {place for place, character in enumerate(key) if character == "?"}
    places |= {place for place in range(len(key)) if key.startswith(ENCODINGS, place)}
    return tuple(key[:place] for place in sorted(places, reverse=True) if place and is_variant(key[:place], key))


def check_marks(key: str) -> None:
    """Raise `InvalidRequest` (field "key") if a key has more marks than are looked at.

    After any bust at all, fences would be taken to cover it: it would be refused, or missed, again and again.
    """
    if (marks := sum(key.count(mark) for mark in SEPARATORS)) > MOST_MARKS:
        raise InvalidRequest(
            f"key has {marks} of the marks that end a segment ({' '.join(SEPARATORS)}), and at most {MOST_MARKS} can be"
            " stored; nothing was sent",
            field="key",
            target=key,
        )
