"""Hot swaps: cache dependencies replaced while everything runs, all or none, and what depends on them busted.

This module decides the steps of a swap, their order, and what follows when one of them fails. Whether a swap may be is
`dependencies`' to decide, how its phases are written down `registry`'s, and how it is asked for and answered `app`'s.

Theory of operation. A swap is validated; written down as prepared; what depends on its names is busted; all versions
change, and the swap is committed, in one transaction; then it is busted again, since a reader may have made an entry
with the old version between the first bust and the commit. Only then is it answered.

- The first bust fails: the swap is rolled back. No version has changed, and what was busted is at worst a miss.
- The second fails: the versions are put back in one transaction, and the entries that may have been made with the new
  ones are owed a bust, which is tried again, ever more slowly, until it is done.
Those who follow the events are told with each bust, and that is written down before the swap goes on.

- The process ends: at the next start a swap that was prepared is rolled back, and one that was committed is finished.

Swaps wait for one another, and each is a task of its own: a client that goes away breaks nothing off.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from pybustcall.daemon.backends import BackendFailure
from pybustcall.daemon.dependencies import judged
from pybustcall.daemon.idempotency import KeyReused
from pybustcall.daemon.registry import Errands, Phase, Registry, RegistryFailure
from pybustcall.faults import CLEAN
from pybustcall.models import HotSwapReply, HotSwapRequest, Swapped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from pybustcall.daemon.engine import Engine
    from pybustcall.daemon.registry import Swap

__all__ = ["STEPS", "SwapAnswer", "SwapFailed", "Swaps", "swap_fingerprint_of"]

STEPS: Final = ("validated", "prepared", "busted", "committed", "busted again", "done")
"""What a swap that goes well comes to, in order; one that fails may come to "rolled back" or "owed" instead."""

_PATIENCE: Final = 5.0  # seconds that closing waits for a swap under way; the next start ends what is not done then
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 60.0

_log = logging.getLogger("pybustcall.daemon")


class SwapFailed(Exception):
    """The cache failed. The text tells what became of the swap; `owed` is how many entries are owed a bust."""

    def __init__(self, why: str, became: str, owed: int) -> None:
        told = f"{owed} entries are owed a bust" + (", which is retried until it is done" if owed else "")
        super().__init__(f"the cache failed ({why}): {became}; {told}")
        self.owed = owed


@final
@dataclass(frozen=True, slots=True)
class SwapAnswer:
    """What a swap came to. `replayed`: it is that of an earlier request; this one changed nothing."""

    reply: HotSwapReply
    replayed: bool


def swap_fingerprint_of(asked: HotSwapRequest) -> bytes:
    """Tell requests apart by what they ask. A field that is added one day counts only where it is not its default."""
    document = asked.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


def pause_before(attempt: int) -> float:
    """Tell how many seconds to wait before an owed bust is tried again: 0.5, doubling to 60."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 10))


def _reply_of(swap: Swap) -> HotSwapReply:
    swapped = tuple(Swapped(name=it.name, from_=it.before, to=it.after) for it in swap.changes)
    return HotSwapReply(committed=True, busted=swap.busted, fault_stage=CLEAN, swaps=swapped)


def _nothing(_step: str) -> None:
    """Do nothing between two steps."""


@final
class Swaps:
    """Carries out hot swaps, one after another.

    - `registry`: opened and closed with this
    - `step`: is told each step once it is done and written down, and before the next begins
    - `pause`: tells how many seconds to wait before the n-th repeat of an owed bust, from 0
    - `patience`: seconds that closing waits for a swap under way
    - `tell`: an attribute; tells those who follow the events of entries, by namespace, that go for the sake of a name

    Belongs to one event loop, between `open` and `close`.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        *,
        step: Callable[[str], None] = _nothing,
        pause: Callable[[int], float] = pause_before,
        patience: float = _PATIENCE,
    ) -> None:
        self.registry = registry
        self._engine = engine
        self._step = step
        self._pause = pause
        self._patience = patience
        self.tell: Callable[[str, Mapping[str, Sequence[str]]], Awaitable[None]] | None = None
        self._turn = asyncio.Lock()
        self._acting: asyncio.Task[SwapAnswer] | None = None
        self._errands = Errands()
        self._waiting: set[asyncio.Task[SwapAnswer]] = set()
        self._owing = asyncio.Event()
        self._paying: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Swaps({self.registry!r}, {len(self._waiting)} under way)"

    async def open(self) -> None:
        """Open the registry, and end what a process before this one left: see above. Raises as `Registry.open` does.

        What is owed a bust and cannot be busted yet is tried again in the background.
        """
        await self.registry.open(self._engine.indexes, self._engine.check_key)
        try:
            for swap in self.registry.unfinished():
                if swap.phase is Phase.PREPARED:
                    await self.registry.end(swap, Phase.ROLLED_BACK)
            if not await self._settle():
                self._owing.set()
        except BaseException:
            await self.registry.close()
            raise
        self._paying = asyncio.create_task(self._pay())

    async def close(self) -> None:
        """End the swap under way, break off those that wait, and close the registry. A second time it does nothing."""
        paying, self._paying = self._paying, None
        try:
            if paying is not None:
                paying.cancel()
                for task in self._waiting - {self._acting}:
                    task.cancel()
                await asyncio.wait({paying})
                await self._errands.end(self._patience)
        finally:
            await self.registry.close()

    async def swap(self, asked: HotSwapRequest, name: bytes | None = None) -> SwapAnswer:
        """Carry out a swap, or tell what it came to if that was done already under this name of an idempotency key.

        Raises what `judged` raises, and `KeyReused`: nothing was done. Raises `RegistryFailure` if it could not be
        written down: nothing was changed. Raises `SwapFailed` if the cache failed. A caller that is cancelled breaks
        nothing off.
        """
        task = self._errands.begin(self._in_turn(asked, name))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return await self._errands.wait_for(task)

    async def forget(self, name: str) -> None:
        """Forget a dependency, between two swaps: one that was judged counts on those that it names.

        Raises what `Registry.forget` raises. A caller that is cancelled breaks nothing off.
        """
        await self._errands.run(self._forget(name))

    async def _forget(self, name: str) -> None:
        async with self._turn:
            await self.registry.forget(name)

    async def _in_turn(self, asked: HotSwapRequest, name: bytes | None) -> SwapAnswer:
        async with self._turn:
            self._acting = asyncio.current_task()
            try:
                request = swap_fingerprint_of(asked)
                found = None if name is None else self.registry.swap_named(name)
                if found is None:
                    return SwapAnswer(_reply_of(await self._carry_out(asked, name, request)), replayed=False)
                if found.request != request:
                    raise KeyReused
                if found.phase is Phase.COMMITTED:
                    found = await self._finish(found)
                return SwapAnswer(_reply_of(found), replayed=True)
            finally:
                self._acting = None

    async def _carry_out(self, asked: HotSwapRequest, name: bytes | None, request: bytes) -> Swap:
        changes = judged(asked, self.registry.dependencies)
        self._step("validated")
        swap = await self.registry.prepare(name, request, changes)
        self._step("prepared")
        try:
            busted = await self._bust(swap)
        except BackendFailure as error:
            await self._roll_back(swap)
            raise SwapFailed(str(error), "the swap was rolled back, and no version has changed", 0) from error
        self._step("busted")
        try:
            swap = await self.registry.put(swap, Phase.COMMITTED, changes, busted)
        except RegistryFailure:
            await self._roll_back(swap)
            raise
        self._step("committed")
        try:
            busted = await self._bust(swap)
        except BackendFailure as error:
            raise await self._put_back(swap, error) from error
        return await self._done(swap, busted)

    async def _roll_back(self, swap: Swap) -> None:
        await self.registry.end(swap, Phase.ROLLED_BACK)
        self._step("rolled back")

    async def _put_back(self, swap: Swap, error: BackendFailure) -> SwapFailed:
        """Undo a commit; tell what the caller is to be told."""
        became = "the swap was rolled back"
        try:
            await self.registry.put(swap, Phase.OWED, swap.put_back())
        except RegistryFailure as failure:
            became = f"the swap could not be rolled back, so it stands ({failure})"
        self._owing.set()
        self._step("owed")
        return SwapFailed(str(error), became, error.failed)

    async def _finish(self, swap: Swap) -> Swap:
        """Bust again what a committed swap is owed. Raises `SwapFailed`; then it stays owed."""
        try:
            busted = await self._bust(swap)
        except BackendFailure as error:
            raise SwapFailed(str(error), "the swap stands", error.failed) from error
        return await self._done(swap, busted)

    async def _done(self, swap: Swap, busted: int) -> Swap:
        self._step("busted again")
        swap = await self.registry.end(swap, Phase.DONE, busted)
        self._step("done")
        return swap

    async def _bust(self, swap: Swap) -> int:
        """Bust what depends on the swapped; tell how many entries went. Raises `BackendFailure`, whatever failed."""
        names = [it.name for it in swap.changes]
        levels = await self._engine.dependents(names)
        found = {namespace: [key for level in its for key in level] for namespace, its in levels.items()}
        try:
            removal = await self._engine.bust_dependents(names)
        except BackendFailure:
            raise
        except Exception as error:
            _log.exception("unexpected error while busting for a hot swap")
            failed = sum(map(len, found.values()))
            raise BackendFailure("the daemon's log says why", failed=failed) from error
        finally:
            if self.tell is not None and found:
                await self.tell(names[0], found)
            await self.registry.try_save()
        return removal.count

    # What is owed

    async def _pay(self) -> None:
        while True:
            await self._owing.wait()
            self._owing.clear()
            attempt = 0
            while True:
                await asyncio.sleep(self._pause(attempt))
                if await self._settle():
                    break
                attempt += 1

    async def _settle(self) -> bool:
        """Try every bust that is owed; tell whether none is owed any more."""
        async with self._turn:
            owed = 0
            for swap in self.registry.unfinished():
                try:
                    busted = await self._bust(swap)
                except BackendFailure as error:
                    owed += 1
                    _log.warning("a hot swap's bust is still owed: %s", error)
                else:
                    over = Phase.DONE if swap.phase is Phase.COMMITTED else Phase.ROLLED_BACK
                    await self.registry.end(swap, over, busted)
            return not owed
