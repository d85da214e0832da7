"""Busts as the daemon does them, without its network: from the wish to the end in the journal, among n entries.

What is busted, and what each bust reaches, is said here; whether its steps grow as they should is judged by the test,
and how long it takes over HTTP measured by the bench. Each bust reaches as many entries as any other of its kind,
however many there are beside them, and afterwards all is put back as it was.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from pybustcall.daemon import Engine, Indexes, Jobs, Journal, Layer, MemoryBackend
from pybustcall.daemon.index import Entry
from pybustcall.daemon.journal import Wish
from pybustcall.models import DEFAULT_NAMESPACE, STRATEGIES, Kind
from tests.counting import EVERY, LEAVES, Counted, Steps, Text, branch, entries


@final
@dataclass(frozen=True)
class Asked:
    """A bust to be measured: `target` is told the number of a branch; it `removes` so many entries."""

    name: str
    kind: Kind
    strategy: str
    target: Callable[[int], str]
    removes: int


def _every_bust() -> Iterator[Asked]:
    for strategy in STRATEGIES:
        with_variants = 1 if strategy == "direct" else 4
        yield Asked(f"key, {strategy}", "key", strategy, lambda number: f"{branch(number)}/0", with_variants)
        if strategy != "direct":
            yield Asked(f"dependents, {strategy}", "key", strategy, lambda number: f"s{number:07}", len(LEAVES))
        yield Asked(f"prefix, {strategy}", "prefix", strategy, branch, len(LEAVES))
        yield Asked(f"tag, {strategy}", "tag", strategy, lambda number: f"t{number:07}", len(LEAVES))


BUSTS: Final = tuple(_every_bust())
"""Each kind with each strategy: a key with three variants, a name with ten dependents, a branch and a tag of ten."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage: where millions of objects are made that all stay, it takes half of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def filled(n: int, text: Text = Counted) -> Indexes:
    """Make indexes with n entries in the default namespace; their clock stands."""
    indexes = Indexes(clock=lambda: 0.0)
    with uncollected():
        indexes.of(DEFAULT_NAMESPACE).update(entries(n, text))
    return indexes


@final
class Delegation:
    """An engine with one layer in memory, and a journal. What a bust removes is put back with `put_back`."""

    def __init__(self, indexes: Indexes, journal: Path | None) -> None:
        self.indexes = indexes
        self.jobs = Jobs(
            Engine([Layer(name="memory", number=0, backend=MemoryBackend(indexes))], indexes),
            Journal(journal),
            step=self._step,
        )
        self._over = asyncio.Event()
        self._gone: list[tuple[str, Entry]] = []
        indexes.watch(self._note)

    def _step(self, step: str) -> None:
        if step == "over":
            self._over.set()

    def _note(self, _namespace: str, key: str, before: Entry | None) -> None:
        if before is not None:
            self._gone.append((key, before))

    async def bust(self, asked: Asked, number: int) -> int:
        """Have it done, and wait for its end; tell how many entries went."""
        self._over.clear()
        wish = Wish(namespace=DEFAULT_NAMESPACE, kind=asked.kind, target=asked.target(number), strategy=asked.strategy)
        await self.jobs.bust(wish)
        await self._over.wait()
        return len(self._gone)

    def put_back(self) -> None:
        """Have all entries again that went."""
        gone, self._gone = self._gone, []
        index = self.indexes.of(DEFAULT_NAMESPACE)
        for key, entry in gone:
            index.put_back({Counted(key): entry})


@asynccontextmanager
async def delegating(indexes: Indexes, journal: Path | None = None) -> AsyncIterator[Delegation]:
    """Open a delegation over these indexes, and close it."""
    delegation = Delegation(indexes, journal)
    await delegation.jobs.open()
    try:
        yield delegation
    finally:
        await delegation.jobs.close()
        indexes.watch(None)


def spread(n: int, samples: int) -> list[int]:
    """Choose branches all over an index of n entries; the share of those with a lifetime is the same for each n."""
    groups = n // len(LEAVES) // EVERY
    return [sample * groups // samples * EVERY + sample % EVERY for sample in range(samples)]


async def steps_per(asked: Asked, delegation: Delegation, *, samples: int = 50) -> float:
    """Tell how many steps a bust takes on the average, in branches from all over the index."""
    taken = 0
    for number in spread(len(delegation.indexes), samples):
        with Steps() as steps:
            removed = await delegation.bust(asked, number)
        assert removed == asked.removes, (asked.name, removed)
        taken += steps.taken
        delegation.put_back()
    return taken / samples
