"""When a bust is done: written down first, answered soon, tried again where a layer failed, settled, and audited.

This module decides the life of each bust from its wish to its end: when it is answered and with what, which layers owe
it, when they are tried again, what a restart takes up. What a bust covers and how a layer is busted is the
`engine`'s to decide, how it is kept the `journal`'s, how it is asked for the `app`'s.

Theory of operation. A bust is written to the journal, and only then begun. Its task does not belong to the request: a
client that goes away breaks nothing off. It goes through the layers inside out. Where one fails, those outside of it
are busted all the same, but stay owed: they may be filled again from the one that still has the old value.

With a journal that lasts, the answer comes when everything is done, when the direct part of a hybrid bust is, or when
its time is over, whichever is first; what is not done then is a job. Without one the answer waits for the end, and a
layer that fails is an error.

Busts that lack a layer wait in one queue, in the order of the journal. A layer that cannot be reached is *down*: what
comes is not tried there, but joins the queue. One task works the queue off, bust by bust; in each of its rounds a layer
that is down is tried once, by the first that needs it, and when nothing waits for it any more it is no longer down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, final
from uuid import uuid4

from pybustcall.daemon.backends import BackendFailure, RefusedKey
from pybustcall.daemon.engine import Unsupported
from pybustcall.daemon.events import BustEvent
from pybustcall.daemon.journal import Entry
from pybustcall.daemon.registry import Errands, report
from pybustcall.models import OVER, LayerReply, Progress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pybustcall.daemon.bust import Bust, Part
    from pybustcall.daemon.engine import Engine, Layer
    from pybustcall.daemon.journal import Journal, Wish
    from pybustcall.models import JobState

__all__ = ["Answer", "BustCancelled", "BustFailed", "Jobs", "NoSuchJob", "pause_before"]

_PATIENCE: Final = 1.0  # seconds that closing waits for what is under way; a journal that lasts ends the rest later
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0

_UNEXPECTED: Final = "the daemon failed there; its log says why"

_log = logging.getLogger("pybustcall.daemon")


class NoSuchJob(LookupError):
    """The journal knows no such job, any more or at all."""

    def __init__(self) -> None:
        super().__init__("there is no such job; jobs are each daemon's own, and what is over is forgotten one day")


class BustFailed(Exception):
    """A bust is not done, and nothing will try again: there is no journal that lasts. `entry` tells each layer."""

    def __init__(self, why: str, entry: Entry) -> None:
        super().__init__(why)
        self.entry = entry


class BustCancelled(Exception):
    """Somebody cancelled the job before its answer. `entry` tells each layer."""

    def __init__(self, entry: Entry) -> None:
        super().__init__("the bust was cancelled while it was under way; what was removed by then stays removed")
        self.entry = entry


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What a bust came to by the time of its answer. `accepted`: it goes on as a job; else it is applied."""

    entry: Entry
    accepted: bool


def pause_before(attempt: int) -> float:
    """Tell how many seconds to wait before the queue is worked off again: 0.5, doubling to 30."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 10))


@final
@dataclass(slots=True, eq=False)
class _Run:
    """A bust that is not over: what of it is owed, and who waits for it.

    - `owed`: the names of the layers at which it is not done, or will be done again
    - `reached`: those at which all of it was done in the last attempt
    - `settling`: whether it is applied, and what is owed is a second bust
    - `rounds`: the second busts that are still to come: seconds from the first one, and the layers of each
    - `waited`: seconds from the first bust to the round that is due, or was last
    - `answerable`: done once all that must come before an answer is done, or has failed; whoever asked waits for it
    - `was_told`: whether those who follow the events know of it
    """

    entry: Entry
    bust: Bust
    owed: set[str]
    answerable: asyncio.Future[None]
    settling: bool = False
    rounds: list[tuple[float, frozenset[str]]] = field(default_factory=list)
    waited: float = 0.0
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    errors: dict[str, str] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    refusal: RefusedKey | None = None
    was_told: bool = False

    def answer(self) -> None:
        """Let whoever asked have the answer, unless that is so, or they have gone."""
        if not self.answerable.done():
            self.answerable.set_result(None)


@final
class Jobs:
    """Has busts done, and answers for them.

    - `engine`, `journal`: opened and closed with this
    - `daemon`: the name under which this daemon stands in the audit
    - `answer_within`: seconds after which a bust that goes on is answered
    - `step`: is told each step once it is done: "journaled", "applied", "settled", "over"
    - `pause`: tells how many seconds to wait before the n-th round of the queue, from 0
    - `patience`: seconds that closing waits for what is under way
    - `save`: an attribute; has what was removed from the registry written down, before a bust is told to be done
    - `tell`: an attribute; tells those who follow the events

    Belongs to one event loop, between `open` and `close`. What it takes up needs the registry: where that is opened
    only once the layers are, and closed before them, `prepare` and `start` stand for `open`, and `finish` comes before
    `close`.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        *,
        daemon: str = "",
        answer_within: float = 1.0,
        step: Callable[[str], None] = lambda _step: None,
        pause: Callable[[int], float] = pause_before,
        patience: float = _PATIENCE,
    ) -> None:
        self.engine = engine
        self.journal = journal
        self.daemon = daemon
        self._answer_within = answer_within
        self._step = step
        self._pause = pause
        self._patience = patience
        self.save: Callable[[], Awaitable[None]] | None = None
        self.tell: Callable[[BustEvent], None] | None = None
        self._errands = Errands()
        self._runs: dict[str, _Run] = {}
        self._queue: dict[int, _Run] = {}
        self._down: dict[str, str] = {}  # layers that cannot be reached, and why
        self._trouble = asyncio.Event()
        self._mending: asyncio.Task[None] | None = None
        self._unfinished: tuple[Entry, ...] = ()
        self._is_open = False

    def __repr__(self) -> str:
        down = f", down: {', '.join(self._down)}" if self._down else ""
        return f"Jobs({len(self._runs)} under way, {len(self._queue)} waiting{down})"

    async def open(self) -> None:
        """Open layers and journal, and take up what a process before this one left. Raises as `Journal.open` does."""
        await self.prepare()
        self.start()

    async def prepare(self) -> None:
        """Open layers and journal. Raises as `Journal.open` does."""
        await self.engine.open()
        try:
            self._unfinished = await self.journal.open()
        except BaseException:
            await self.engine.close()
            raise
        self._is_open = True

    def start(self) -> None:
        """Take up what a process before this one left, and begin to try again what fails."""
        unfinished, self._unfinished = self._unfinished, ()
        self._mending = asyncio.create_task(self._mend())  # which has its turn once all is taken up
        told: set[str] = set()
        for entry in unfinished:
            self._take_up(entry, told)

    async def finish(self) -> None:
        """Finish what is under way within `patience` seconds, and try nothing again. A second time it does nothing."""
        mending, self._mending = self._mending, None
        if mending is None:
            return
        mending.cancel()
        await asyncio.wait({mending})
        if not self.journal.durable:  # nobody else will: early is better than never
            for run in list(self._runs.values()):
                if run.timer is not None:
                    self._settle(run)
        await self._errands.end(self._patience)
        for run in self._runs.values():
            if run.timer is not None:
                run.timer.cancel()

    async def close(self) -> None:
        """Finish what is under way, and close all. A second time it does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            await self.finish()
        finally:
            try:
                await self.journal.close()
            finally:
                await self.engine.close()

    # Asking

    async def bust(
        self,
        wish: Wish,
        *,
        who: str = "anonymous",
        binding: str = "unknown",
        reason: str | None = None,
        within: float | None = None,
    ) -> Answer:
        """Have a bust done; return what it came to, at the latest after `within` seconds if it can go on as a job.

        Raises `Unsupported` or `RefusedKey`, and nothing is removed; `JournalFailure`, and nothing is promised; and
        `BustFailed` where there is no journal to finish it. A caller that is cancelled breaks nothing off.
        """
        self.engine.check(wish)
        at = time.time_ns()
        entry = Entry(
            job=uuid4().hex, wish=wish, who=who, binding=binding, reason=reason, daemon=self.daemon, at=at,
            state="running",
        )  # fmt: skip
        # Without a file nothing is waited for, so that nobody can go away halfway.
        beginning = self._begin(entry)
        run = await (self._errands.run(beginning) if self.journal.durable else beginning)
        await self._wait_answerable(run, within)
        if run.refusal is not None:
            raise run.refusal
        if run.entry.state == "failed":
            raise BustFailed("; ".join(run.errors.values()), run.entry)
        if run.entry.state == "cancelled":
            raise BustCancelled(run.entry)
        if run.entry.state not in {"done", "settling"}:
            if not run.was_told:
                await run.bust.look_for_readers()
                self._tell(run)
            return Answer(self._now(run), accepted=True)
        return Answer(run.entry, accepted=False)

    async def _begin(self, entry: Entry) -> _Run:
        run = self._start(await self.journal.begin(entry))
        self._step("journaled")
        run.task = self._errands.begin(self._work(run))
        return run

    async def _wait_answerable(self, run: _Run, within: float | None) -> None:
        """Wait for the answer; with a journal that lasts not for too long. Raises what nobody expected."""
        assert run.task is not None  # noqa: S101 - for the type checker
        patience = self._answer_within if within is None else min(within, self._answer_within)
        try:
            async with asyncio.timeout(patience if self.journal.durable else None):
                await run.answerable
        except TimeoutError:
            return
        except asyncio.CancelledError:
            run.task.add_done_callback(report)
            raise
        if run.task.done() and not run.task.cancelled():
            run.task.result()

    async def count(self, wish: Wish) -> dict[str, int]:
        """Tell for each layer how many entries a bust would remove or mark. Raises as `bust` does."""
        self.engine.check(wish)
        entry = Entry(job="", wish=wish, at=0, state="failed")
        for layer, why in self._down.items():
            raise BustFailed(f"it cannot be counted while the layer {layer} is down: {why}", entry)
        try:
            return await self.engine.count(wish)
        except BackendFailure as error:
            raise BustFailed(f"it cannot be counted: {error}", entry) from error

    async def find(self, job: str) -> tuple[Entry, Progress]:
        """Tell how a bust stands. Raises `NoSuchJob`."""
        run = self._runs.get(job)
        found = await self.journal.find(job) if run is None else self._now(run)
        if found is None:
            raise NoSuchJob
        return found, self._progress(found)

    async def recent(
        self,
        *,
        before: str | None = None,
        limit: int = 100,
        state: JobState | None = None,
        namespace: str | None = None,
    ) -> list[tuple[Entry, Progress]]:
        """List busts, the newest first; those older than the job `before`, of one namespace or of all.

        Raises `NoSuchJob` if there is no such job there.
        """
        number = None
        if before is not None:
            last, _ = await self.find(before)
            if namespace not in {None, last.wish.namespace}:
                raise NoSuchJob
            number = last.number
        found = await self.journal.recent(before=number, limit=limit, state=state, namespace=namespace)
        current = [self._now(run) if (run := self._runs.get(it.job)) is not None else it for it in found]
        return [(entry, self._progress(entry)) for entry in current]

    def _now(self, run: _Run) -> Entry:
        """Tell the entry of a bust that is under way, with what it has removed by now."""
        is_tried = run.entry.state == "waiting" and run.task is not None and not run.task.done()
        state = "running" if is_tried else run.entry.state
        return replace(run.entry, state=state, removed=sum(run.bust.removed.values()))

    def _progress(self, entry: Entry) -> Progress:
        """Tell how far a bust came: of one that is applied, that nothing is left of what it removed."""
        if (run := self._runs.get(entry.job)) is not None and not run.settling:
            return Progress(done=run.bust.done, total=run.bust.total)
        return Progress(done=entry.removed, total=entry.removed if entry.state in {"settling", "done"} else None)

    async def cancel(self, job: str, *, who: str = "anonymous") -> Entry:
        """Do no more for a bust; what is removed stays removed. One that is over stays as it is. Raises `NoSuchJob`.

        `who` has it cancelled, which the audit says of each layer at which it was not done. Raises `JournalFailure` if
        it could not be written down: then a restart would go on with it.
        """
        run = self._runs.get(job)
        if run is None:
            return (await self.find(job))[0]
        _log.info("the job %s was cancelled by %s", job, who)
        self._over(run, "cancelled")
        if run.task is not None and not run.task.done():
            run.task.cancel()
            await asyncio.wait({run.task})
        await run.bust.abandon()
        if not run.settling:
            for name in run.owed:
                run.errors[name] = f"it was cancelled by {who} before it was done here"
            self._note(run, attempts=run.entry.attempts)
            self.journal.put(run.entry)
        await self._save()
        await self.journal.flush()
        return run.entry

    # Doing

    def _start(self, entry: Entry, *, settling: bool = False) -> _Run:
        answerable = asyncio.get_running_loop().create_future()
        owed = {layer.name for layer in self.engine.layers}
        run = _Run(entry, self.engine.bust(entry.wish), owed, answerable, settling)
        run.rounds = self.engine.rounds(entry.wish.settle)
        self._runs[entry.job] = run
        return run

    def _take_up(self, entry: Entry, told: set[str]) -> None:
        """Go on with what a process before this one began: from its beginning, since nobody knows how far it came.

        What it told may not have been written. So it is told again, as if everything in the namespace had been busted:
        the registry may have forgotten what was removed, and what went with it. Once will do for all in a namespace,
        and `told` are those in which that was done.
        """
        run = self._start(entry, settling=entry.state == "settling")
        run.answer()
        try:
            self.engine.check(entry.wish)
        except (Unsupported, RefusedKey) as error:  # the layers are others today
            run.errors = dict.fromkeys(run.owed, f"after a restart it cannot be done with these layers: {error}")
            _log.error("a bust that was to be gone on with %s", run.errors[next(iter(run.owed))])
            self._note(run, attempts=run.entry.attempts)
            self._over(run, "failed")
            return
        run.bust.borne.lose()
        run.was_told = True
        if entry.wish.namespace not in told:
            told.add(entry.wish.namespace)
            self._tell(run, of_all=True)
        if not run.settling:
            self._enqueue(run)
            return
        if not self._settle_next(run):
            self._over(run, "done")

    async def _work(self, run: _Run) -> None:
        """Do a bust for the first time, or for the second (settling)."""
        try:
            if run.entry.wish.strategy == "hybrid" and self.journal.durable and not run.settling:
                await self._attempt(run, "first")
                if not run.errors:
                    run.answer()
            await self._attempt(run, "whole")
        except RefusedKey as error:
            self._refused(run, error)
        except Exception:  # noqa: BLE001 - logged in full, and tried again as what fails is
            _log.exception("unexpected error while busting")
            run.errors.update(dict.fromkeys(run.owed, _UNEXPECTED))
            self._note(run, attempts=run.entry.attempts)
            self._conclude(run)
        else:
            self._conclude(run)
        finally:
            run.answer()

    def _refused(self, run: _Run, error: RefusedKey) -> None:
        run.refusal = error
        run.errors["layer"] = str(error)
        self._over(run, "failed")

    async def _attempt(self, run: _Run, part: Part = "whole", down: dict[str, str] | None = None) -> None:
        """Go once through the layers that are owed, inside out; what fails stays owed, and what lies outside of it.

        `down` are the layers that are not tried: by default all that are known to be down.
        """
        run.errors.clear()
        run.reached.clear()
        await run.bust.prepare()
        known = self._down if down is None else down
        failed_inside = False
        for group in self.engine.groups:
            if group[0].backend.traits.registry and (
                failed_inside or (part == "first" and len(self.engine.groups) > 1)
            ):
                break  # what it knows is needed until all others are done
            owed = [layer for layer in group if layer.name in run.owed]
            visits = [self._visit(run, layer, part, known) for layer in owed]
            refused = await asyncio.gather(*visits) if len(visits) > 1 else [await visit for visit in visits]
            done = {layer.name for layer in owed if layer.name not in run.errors}
            if part != "first":
                run.reached |= done
                run.owed -= set() if failed_inside else done
            failed_inside = failed_inside or bool(owed and len(done) < len(owed))
            if any(refused) and not run.errors and len(self.engine.layers) == 1:
                raise next(error for error in refused if error is not None)
        if run.errors:
            await run.bust.look_for_readers()
        self._tell(run)
        self._note(run, attempts=run.entry.attempts + (part != "first"))
        await self._save()

    async def _visit(self, run: _Run, layer: Layer, part: Part, down: dict[str, str]) -> RefusedKey | None:
        """Bust at one layer, and note why it failed; tell why the key cannot be there, if that is so."""
        if layer.name in down:
            run.errors[layer.name] = f"{down[layer.name]}; it waits until that layer is back"
            return None
        try:
            await run.bust.visit(layer, part)
        except RefusedKey as error:
            return error
        except BackendFailure as error:
            run.errors[layer.name] = str(error)
            if error.unreachable and self.journal.durable:
                self._is_down(layer, str(error), down)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling() or run.entry.state in OVER:
                raise
            self._failed_unexpectedly(run, layer)  # nobody has cancelled us: the cache's own client was
        except Exception:  # noqa: BLE001 - logged in full, and the layer counts as failed
            self._failed_unexpectedly(run, layer)
        return None

    def _failed_unexpectedly(self, run: _Run, layer: Layer) -> None:
        _log.exception("unexpected error while busting at the layer %s", layer.name)
        run.errors[layer.name] = _UNEXPECTED

    def _is_down(self, layer: Layer, why: str, round_: dict[str, str]) -> None:
        if layer.name not in self._down:
            _log.error("the layer %s is down: %s", layer.name, why)
        self._down[layer.name] = round_[layer.name] = why

    def _note(self, run: _Run, *, attempts: int) -> None:
        """Write down how a bust stands."""
        layers = []
        settles = {} if run.settling else {name: at for at, names in run.rounds for name in names}
        for layer in self.engine.layers:
            error = run.errors.get(layer.name)
            waits = error is None and layer.name in run.owed and bool(run.errors) and not run.settling
            if waits and layer.name not in run.reached:
                error = "it will be busted once the layers that come before it are"
            layers.append(
                LayerReply(
                    name=layer.name,
                    ok=error is None,
                    removed=run.bust.removed[layer.name],
                    error=error,
                    settle=settles.get(layer.name),
                    waits=waits or None,
                )
            )
        removed = sum(run.bust.removed.values())
        run.entry = replace(run.entry, layers=tuple(layers), removed=removed, attempts=attempts)

    def _tell(self, run: _Run, *, of_all: bool = False) -> None:
        """Tell those who follow the events; `of_all`: as if all in the namespace had been busted."""
        run.was_told = True
        if self.tell is not None:
            wish = run.entry.wish
            self.tell(
                BustEvent(
                    namespace=wish.namespace,
                    kind="all" if of_all else wish.kind,
                    target="*" if of_all else wish.target,
                    soft=wish.soft,
                    strategy=wish.strategy,
                    also=() if of_all else tuple(run.bust.also),
                    tags=run.bust.borne.tags,
                )
            )

    async def _save(self) -> None:
        if self.save is not None:
            await self.save()

    def _conclude(self, run: _Run) -> None:
        """Decide what comes after an attempt: the end, the second bust, or the queue."""
        if run.entry.state in OVER:
            return
        if run.errors and not self.journal.durable:
            self._over(run, "failed")
        elif run.owed:
            self._enqueue(run)
        elif run.settling:
            self._step("settled")
            if not self._settle_next(run):
                self._over(run, "done")
        else:
            self._step("applied")
            if not run.rounds:
                self._over(run, "done")
                return
            self._put(run, "settling")
            run.settling = True
            self._settle_next(run)

    def _settle_next(self, run: _Run) -> bool:
        """Have the next second bust done when it is time; tell whether there is one."""
        if not run.rounds:
            return False
        at, names = run.rounds.pop(0)
        run.owed = set(names)
        wait, run.waited = at - run.waited, at
        if self._mending is None and not self.journal.durable:  # closing: early is better than never
            self._settle(run)
        elif self._mending is not None:
            run.timer = asyncio.get_running_loop().call_later(wait, self._settle, run)
        return True

    def _settle(self, run: _Run) -> None:
        if run.timer is not None:
            run.timer.cancel()
            run.timer = None
        first, run.bust = run.bust, self.engine.bust(run.entry.wish)
        run.bust.removed.update(first.removed)
        run.bust.borne = first.borne  # of which the registry may know nothing any more
        run.task = self._errands.begin(self._work(run))

    def _put(self, run: _Run, state: JobState, *, ended: int | None = None) -> None:
        run.entry = replace(run.entry, state=state, ended=ended)
        self.journal.put(run.entry)

    def _over(self, run: _Run, state: JobState) -> None:
        if run.timer is not None:
            run.timer.cancel()
        self._runs.pop(run.entry.job, None)
        self._queue.pop(run.entry.number, None)
        self._put(run, state, ended=time.time_ns())
        self._step("over")

    # The queue

    def _enqueue(self, run: _Run) -> None:
        if run.entry.state != "settling":
            self._put(run, "waiting")
        self._queue[run.entry.number] = run
        self._trouble.set()

    async def _mend(self) -> None:
        """Work the queue off, as often as it takes."""
        attempt = 0
        hasty = bool(self._queue)  # what an earlier process left waits for nothing
        while True:
            await self._trouble.wait()
            if not hasty:
                await asyncio.sleep(self._pause(attempt))
            hasty = False
            before = len(self._queue)
            await self._round()
            attempt = 0 if len(self._queue) < before else attempt + 1
            if not self._queue:
                self._trouble.clear()
                attempt = 0

    async def _round(self) -> None:
        """Try every bust that waits, in order; those that come meanwhile are tried in this round, too."""
        down: dict[str, str] = {}
        tried = 0
        while (number := min((it for it in self._queue if it > tried), default=None)) is not None:
            tried = number
            run = self._queue[number]
            if run.owed <= down.keys():
                continue
            working = asyncio.create_task(self._again(run, down))
            run.task = working
            try:
                await asyncio.wait({working})
            except asyncio.CancelledError:
                working.cancel()
                await asyncio.wait({working})
                raise
        for name in [name for name in self._down if name not in down]:
            if not any(name in run.owed for run in self._queue.values()):
                _log.warning("the layer %s is back", name)
                del self._down[name]

    async def _again(self, run: _Run, down: dict[str, str]) -> None:
        run.bust.look_again()
        try:
            await self._attempt(run, down=down)
        except RefusedKey as error:
            self._refused(run, error)
            return
        if not run.owed:
            self._queue.pop(run.entry.number, None)
            self._conclude(run)
        else:
            self.journal.put(run.entry)
            await asyncio.sleep(0)
