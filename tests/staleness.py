"""Finds stale reads in a history of what many caches returned, and of busts with their acknowledgements.

A version is a number that grows with each write of a key. A bust is acknowledged for the version that was written
before it was sent. A read is stale if it returns a version older than one whose bust had been acknowledged early
enough: how early that is differs from read to read, and is said by `Read.sees`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

__all__ = ["Bust", "Read", "Stale", "stale_reads"]


@final
@dataclass(frozen=True, slots=True)
class Bust:
    """A bust of a key that was acknowledged: by whom it was asked, for which version, and when that was known."""

    key: str
    version: int
    acked: float
    who: str


@final
@dataclass(frozen=True, slots=True)
class Read:
    """What a cache returned.

    - `who`: whose cache; `asked`, `returned`: when
    - `live_since`: when the request was made whose stream was live when it returned; None if none was
    - `trusted`: whether the cache said, when it was asked and when it returned, that it serves what it holds
    """

    key: str
    version: int
    asked: float
    returned: float
    who: str
    live_since: float | None
    trusted: bool

    def sees(self, bound: float) -> float:
        """Tell of which busts it must know: those acknowledged by then.

        Nothing that was acknowledged after it was asked. Of what was before that: all, if nothing held is served;
        otherwise all before the request of the stream that is live, since that one tells what was missed; and whatever
        is older than `bound` seconds when it returns.
        """
        if not self.trusted:
            return self.asked
        since = -math.inf if self.live_since is None else self.live_since
        return min(self.asked, max(self.returned - bound, since))


@final
@dataclass(frozen=True, slots=True)
class Stale:
    """A read that returned less than it had to, and how much that was."""

    read: Read
    least: int


class _Acknowledged:
    """The highest version of one key that was acknowledged up to any time."""

    def __init__(self, busts: Iterable[Bust]) -> None:
        self._times: list[float] = []
        self._versions: list[int] = []
        highest = 0
        for bust in sorted(busts, key=lambda bust: bust.acked):
            highest = max(highest, bust.version)
            self._times.append(bust.acked)
            self._versions.append(highest)

    def by(self, when: float) -> int:
        """Tell it; 0 if none was."""
        place = bisect_right(self._times, when)
        return self._versions[place - 1] if place else 0


def stale_reads(reads: Iterable[Read], busts: Iterable[Bust], bound: float) -> list[Stale]:
    """List the stale reads of a history. Whoever busts must read what he wrote from the acknowledgement on."""
    of_key: dict[str, list[Bust]] = defaultdict(list)
    of_one: dict[tuple[str, str], list[Bust]] = defaultdict(list)
    for bust in busts:
        of_key[bust.key].append(bust)
        of_one[bust.who, bust.key].append(bust)
    everybody = {key: _Acknowledged(found) for key, found in of_key.items()}
    own = {place: _Acknowledged(found) for place, found in of_one.items()}
    found = []
    for read in reads:
        least = everybody[read.key].by(read.sees(bound)) if read.key in everybody else 0
        if (read.who, read.key) in own:
            least = max(least, own[read.who, read.key].by(read.asked))
        if read.version < least:
            found.append(Stale(read, least))
    return found
