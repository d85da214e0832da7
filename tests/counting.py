"""Counted steps: how many comparisons of keys an operation takes, and whether they grow as the logarithm of n.

Counted are the keys that are held, not those that are asked for: whoever compares with a `Counted` key, in whatever
structure and by whatever way the question came, takes a step. Seconds say nothing here; the bench tells them.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

from pybustcall.daemon.index import Entry, Index

SIZES: Final = (10**3, 10**4, 10**5, 10**6)
LEAVES: Final = ("0", "0.gz", "0.gz?v=1", "0?v=1", "1", "2", "3", "4", "5", "6")
"""What each branch holds, so that every answer has the same size however many branches there are."""
EVERY: Final = 5  # of so many branches, the entries of one have a lifetime


class Counted(str):
    """A text of which every comparison with another is counted."""

    __slots__ = ()
    __hash__ = str.__hash__
    steps: ClassVar = 0

    def __eq__(self, other: object) -> bool:
        Counted.steps += 1
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        Counted.steps += 1
        return str.__ne__(self, other)

    def __lt__(self, other: str) -> bool:
        Counted.steps += 1
        return str.__lt__(self, other)

    def __le__(self, other: str) -> bool:
        Counted.steps += 1
        return str.__le__(self, other)

    def __gt__(self, other: str) -> bool:
        Counted.steps += 1
        return str.__gt__(self, other)

    def __ge__(self, other: str) -> bool:
        Counted.steps += 1
        return str.__ge__(self, other)


Text = Callable[[str], str]
"""Makes the texts that an index is filled with: `Counted`, or `str` where seconds are to be told."""


@final
class Steps:
    """Counts the steps that are taken within it; `await` may stand there too."""

    def __init__(self) -> None:
        self.taken = 0
        self._before = 0

    def __enter__(self) -> Steps:
        self._before = Counted.steps
        return self

    def __exit__(self, *_: object) -> None:
        self.taken = Counted.steps - self._before


# A filled index


def branch(number: int) -> str:
    """Name a branch."""
    return f"b{number:07}"


def entries(n: int, text: Text = Counted) -> dict[str, Entry]:
    """Make n entries: branches of ten, each with a tag, and made of a subject, that bear its number."""
    made: dict[str, Entry] = {}
    for number in range(n // len(LEAVES)):
        entry = Entry(
            depends_on=(text(f"s{number:07}"),),
            tags=(text(f"t{number:07}"),),
            ttl=None if number % EVERY else 3600.0,
        )
        made.update((text(f"{branch(number)}/{leaf}"), entry) for leaf in LEAVES)
    return made


def filled(n: int, clock: Callable[[], float] = lambda: 0.0, text: Text = Counted) -> Index:
    """Make an index of n entries; its clock stands."""
    index, collecting = Index(clock=clock), gc.isenabled()
    gc.disable()  # or half of the time would go into looking for garbage that there is not
    try:
        index.update(entries(n, text))
    finally:
        if collecting:
            gc.enable()
    return index


@final
@dataclass(frozen=True)
class Operation:
    """Something to be measured: `act` is told the index and the number of a branch; `ready` and `undo` do not count."""

    name: str
    act: Callable[[Index, int], object]
    ready: Callable[[Index, int], object] = lambda _index, _number: None
    undo: Callable[[Index, int], object] = lambda _index, _number: None


def operations(text: Text = Counted) -> tuple[Operation, ...]:
    """List what is measured; what is added is such a text."""

    def add(index: Index, number: int) -> None:
        names = [text(f"s{number:07}"), text(f"s{number:07}-new")]
        index.add(text(f"{branch(number)}/new"), names, tags=[text(f"t{number:07}")], ttl=60.0)

    def remove(index: Index, number: int) -> bool:
        return index.remove(f"{branch(number)}/new")

    return (
        Operation("look up", lambda index, number: f"{branch(number)}/3" in index),
        Operation("add", add, undo=remove),
        Operation("remove", remove, ready=add),
        Operation("under a prefix", lambda index, number: index.under(branch(number))),
        Operation("count under", lambda index, number: index.count_under(branch(number))),
        Operation("variants", lambda index, number: index.variants(f"{branch(number)}/0")),
        Operation("tagged", lambda index, number: index.tagged(f"t{number:07}")),
        Operation("count tagged", lambda index, number: index.count_tagged(f"t{number:07}")),
        Operation("dependents", lambda index, number: index.dependents(f"s{number:07}")),
        Operation("subjects under", lambda index, number: index.subjects_under(f"s{number:07}")),
        Operation("go on", lambda index, number: index.keys(after=branch(number), limit=len(LEAVES))),
    )


OPERATIONS: Final = operations()


def numbers_in(n: int, samples: int) -> list[int]:
    """Choose branches of an index of n entries, the same ones each time."""
    return random.Random(7).choices(range(n // len(LEAVES)), k=samples)


def steps_per(operation: Operation, index: Index, *, samples: int = 60) -> float:
    """Tell how many steps an operation takes on the average, over branches from all over the index."""
    taken = 0
    for number in numbers_in(len(index), samples):
        operation.ready(index, number)
        with Steps() as steps:
            operation.act(index, number)
        taken += steps.taken
        operation.undo(index, number)
    return taken / samples


# The fit


@final
@dataclass(frozen=True)
class Fit:
    """The line a + b * log2(n) that is nearest to what was counted.

    - `worst`: how far it is from that at most, as a share of what was counted
    - `growth`: the last count as a multiple of the first
    """

    a: float
    b: float
    worst: float
    growth: float

    @property
    def is_logarithmic(self) -> bool:
        """Whether the counts lie on the line, and grow as little as a logarithm does: from 10^3 to 10^6 it doubles."""
        return self.worst <= 0.05 and self.growth <= 2.5


def fit_of(points: Sequence[tuple[int, float]]) -> Fit:
    """Fit a line to counts at several n, by least squares."""
    xs, ys = [math.log2(n) for n, _ in points], [y for _, y in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    b = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)
    a = y_mean - b * x_mean
    worst = max(abs(a + b * x - y) / y for x, y in zip(xs, ys, strict=True))
    return Fit(a, b, worst, ys[-1] / ys[0])


def scan(keys: Sequence[str], asked: str) -> str:
    """Look a key up as no index should: one after the other."""
    return next(key for key in keys if key == asked)
