"""Cancellation at every step of a call: it arrives, it leaves nothing behind, and with an outbox nothing is lost.

A task factory wraps every coroutine that a call runs, its own and those of the tasks that it starts, and counts their
steps together. After the k-th step the caller is struck; k goes from 0 until the call is over before its turn comes.
So it is hit wherever it waits, and also in the moments in which an attempt, a leg or the storing has just moved on
and the caller has not noticed yet. Daemons, sockets and the outbox are real.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import ssl
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import anyio
import pytest

from pybustcall import TLS, BustcallClient, BustResult, ClientClosed, Hedge, Pool, Probes, Requirements, Retry
from pybustcall.delivery import RESERVE
from pybustcall.errors import OutboxError
from pybustcall.outbox import Outbox, OutboxStore, StoredBust
from pybustcall.telemetry import Event
from pybustcall.testing import Answer, FakeDaemon
from tests.conftest import PATIENCE, eventually

DEAD = ("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3")
"""Where nobody listens."""

MOST = 400
"""Steps after which a call is taken as never ending."""

HANGS = Answer(hang=True, applies=False)


class Steps:
    """Counts the steps of all tasks of one call, and strikes after the k-th, and as often again as is asked."""

    def __init__(self, at: int, strike: Callable[[], None], times: int = 1) -> None:
        self.at = at
        self.left = times
        self.count = 0
        self.struck = 0
        self.over = False
        self.strike = strike
        self.struck_at = 0.0
        self.caller: asyncio.Task[Any] | None = None
        self.tasks: list[asyncio.Task[Any]] = []

    def stepped(self) -> None:
        """Count one step, once there is a caller; strike if it is the turn."""
        if self.caller is None:
            return
        self.count += 1
        if self.count >= self.at and self.left and not self.over:
            self.left -= 1
            self.struck_at = self.struck_at or self.caller.get_loop().time()
            self.struck += 1
            self.strike()


STEPS: ContextVar[Steps] = ContextVar("steps")


class Stepper(Coroutine[Any, Any, Any]):
    """Runs a coroutine, and tells of each of its steps."""

    def __init__(self, inner: Coroutine[Any, Any, Any], steps: Steps) -> None:
        self._inner = inner
        self._steps = steps

    def _step(self, go: Callable[[], Any]) -> Any:
        try:
            waits_for = go()
        except BaseException:
            # The caller's own last step is none to strike after: its result is on the way to whoever awaits it.
            if asyncio.current_task() is not self._steps.caller:
                self._steps.stepped()
            raise
        self._steps.stepped()
        return waits_for

    def send(self, value: Any) -> Any:
        return self._step(lambda: self._inner.send(value))

    def throw(self, *error: Any) -> Any:
        return self._step(lambda: self._inner.throw(*error))

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise AssertionError


def count_steps(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], *, context: Context | None = None, **settings: Any
) -> asyncio.Task[Any]:
    """Make a task; one that belongs to a call, by its context, is counted."""
    steps = STEPS.get(None) if context is None else context.get(STEPS)
    if steps is None:
        return asyncio.Task(work, loop=loop, context=context, **settings)
    task = asyncio.Task(Stepper(work, steps), loop=loop, context=context, **settings)
    steps.tasks.append(task)
    return task


@contextmanager
def counting() -> Iterator[None]:
    """Have the running loop count the steps of calls."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(count_steps)  # type: ignore[arg-type]
    try:
        yield
    finally:
        loop.set_task_factory(None)


Bust = Callable[[], Awaitable[Any]]


class Way(Protocol):
    """A way to cancel a call: `arrive` runs it as its user would, and tells its result, or None if it was cancelled.

    `strike` is what happens at the k-th step. `times`: how often it is repeated, at the steps after that.
    """

    times: int

    async def arrive(self, bust: Bust) -> Any:
        """Run the call."""

    def strike(self) -> None:
        """Cancel it."""


class ByTask:
    """`task.cancel()`, so many times, a step apart."""

    def __init__(self, times: int = 1) -> None:
        self.times = times
        self._struck = 0

    async def arrive(self, bust: Bust) -> Any:
        """Run it; the count of cancellations must be ours alone."""
        self._task = task = asyncio.current_task()
        assert task is not None
        try:
            result = await bust()
        except asyncio.CancelledError:
            assert task.cancelling() == self._struck > 0
            for _ in range(self._struck):
                task.uncancel()
            await asyncio.sleep(0)  # nothing is delivered a second time
            return None
        assert (task.cancelling(), self._struck) == (0, 0), "a cancellation was swallowed"
        return result

    def strike(self) -> None:
        """Cancel the task."""
        assert self._task is not None
        self._struck += 1
        self._task.cancel()


class ByTimeout:
    """An `asyncio.timeout` that runs out."""

    times = 1

    async def arrive(self, bust: Bust) -> Any:
        """Run it; the cancellation must become TimeoutError, and only that."""
        task = asyncio.current_task()
        assert task is not None
        result = None
        try:
            async with asyncio.timeout(None) as self._scope:
                result = await bust()
        except TimeoutError:
            assert self._scope.expired()
        else:
            assert not self._scope.expired(), "a cancellation was swallowed"
        assert task.cancelling() == 0
        await asyncio.sleep(0)
        return result

    def strike(self) -> None:
        """Let it run out."""
        self._scope.reschedule(0.0)


class Sibling(Exception):
    """What the other task of a group raises."""


def ring(bell: asyncio.Future[bool], *, hit: bool) -> None:
    """Wake whoever waits for the bell, once."""
    if not bell.done():
        bell.set_result(hit)


class ByGroup:
    """A TaskGroup in which another task fails."""

    times = 1

    async def arrive(self, bust: Bust) -> Any:
        """Run it; the group must end with the sibling's error alone."""
        self._bell: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def fail() -> None:
            if await self._bell:
                raise Sibling

        async def call() -> Any:
            return await bust()

        calling = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                calling = group.create_task(call())
                calling.add_done_callback(lambda _: ring(self._bell, hit=False))
        except BaseExceptionGroup as failed:
            assert [type(error) for error in failed.exceptions] == [Sibling]  # noqa: PT017 - also of 3.11's kind
        await asyncio.sleep(0)
        return None if calling is None or calling.cancelled() else calling.result()

    def strike(self) -> None:
        """Let the sibling fail."""
        ring(self._bell, hit=True)


class ByScope:
    """An anyio CancelScope, which cancels again and again until it is left."""

    times = 1

    async def arrive(self, bust: Bust) -> Any:
        """Run it; the scope must catch its own cancellation."""
        task = asyncio.current_task()
        assert task is not None
        result = None
        with anyio.CancelScope() as self._scope:
            result = await bust()
        assert (result is None) == self._scope.cancelled_caught
        assert task.cancelling() == 0
        await asyncio.sleep(0)
        return result

    def strike(self) -> None:
        """Cancel the scope."""
        self._scope.cancel()


WAYS: dict[str, Callable[[], Way]] = {
    "task": ByTask,
    "twice": lambda: ByTask(2),
    "storm": lambda: ByTask(12),
    "timeout": ByTimeout,
    "group": ByGroup,
    "anyio": ByScope,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a call meets.

    - `plans`: of each daemon, the hub first; None for one where nobody listens
    - `settings`: of the client; `how`: of the bust
    - `warm`: busts made before; `busy`: busts under way when it begins
    - `outbox`: whether there is one
    - `status`: what comes of it when it is left alone
    """

    plans: tuple[tuple[Answer, ...] | None, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    warm: int = 0
    busy: int = 0
    outbox: bool = False
    status: str = "busted"


QUICK = Retry(attempts=2, base=0.004, cap=0.004)
EAGER = Hedge(samples=5, share=1.0, overdue_least=0.02)

CASES = {
    "at once": Case(plans=((),), warm=1),
    "the loop's first call": Case(plans=((),), settings={"probes": Probes()}, outbox=True),
    "peer after a refusal": Case(plans=(None, ()), outbox=True),
    "peer after a bad answer": Case(plans=((Answer.problem(500), Answer.problem(500)), ()), warm=1),
    "stale connection": Case(plans=((Answer(reset=True),),), warm=1, outbox=True),
    "hedged": Case(
        plans=((Answer(delay=0.03),), ()), settings={"hedge": EAGER}, how={"timeout": 2.0}, warm=6, outbox=True
    ),
    "black hole": Case(plans=((HANGS, HANGS), ()), settings={"hedge": EAGER}, warm=6, outbox=True),
    "all, one down": Case(plans=((), None, ()), how={"delivery": "all"}, outbox=True, status="partial"),
    "quorum, one down": Case(plans=((), None, ()), how={"delivery": "quorum"}, outbox=True),
    "all, one slow": Case(plans=((), (Answer(delay=0.01),)), how={"delivery": "all"}, warm=1),
    "outage": Case(plans=(None, None), outbox=True, status="deferred"),
    "outage, write-ahead": Case(plans=(None, None), how={"write_ahead": True}, outbox=True, status="deferred"),
    "write-ahead": Case(plans=((),), how={"write_ahead": True}, warm=1, outbox=True),
    "write-ahead to all, one down": Case(
        plans=((), None), how={"write_ahead": True, "delivery": "all"}, outbox=True, status="partial"
    ),
    "asks first what the daemon can do": Case(plans=((),), settings={"requires": Requirements(semverx=">=0.1")}),
    "asks a peer first, after a refusal": Case(
        plans=(None, ()),
        settings={"requires": Requirements(capabilities=("cache.bust",), semverx=">=0.1")},
        outbox=True,
    ),
    "waits for a slot": Case(
        plans=((Answer(delay=0.01),),), settings={"pool": Pool(per_daemon=1, total=1)}, busy=1, outbox=True
    ),
}


def descriptors() -> int:
    """Count the open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def rows_of(path: Path) -> list[sqlite3.Row]:
    """Read every row of an outbox, every column; the file and its tally must be whole."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        db.execute("BEGIN")  # one view of it all: a courier may be at work
        rows = db.execute("SELECT * FROM busts ORDER BY id").fetchall()
        assert [tuple(row) for row in db.execute("PRAGMA integrity_check")] == [("ok",)]
        tally = {row["state"]: row["rows"] for row in db.execute("SELECT * FROM tally")}
        assert sum(tally.values()) == len(rows)
        assert all(count == sum(row["state"] == state for row in rows) for state, count in tally.items())
    return rows


def check_row(row: sqlite3.Row, urls: list[str], *, free: bool = True) -> None:
    """A row that a call left must be whole, and `free` to be sent by anybody, at once."""
    assert row["destination"] in {"", *urls}
    assert row["target"].startswith("key/")
    assert (row["strategy"], row["fault_tolerance"], row["kind"]) == ("dimensional", 6, "key")
    assert len(row["key"]) == 36
    assert (row["namespace"], row["soft"]) == (None, 0)
    assert row["state"] < 2 or not free, "it is leased, and its owner has gone"
    assert row["owner"] is None or not free
    assert 0 < row["created"] <= row["joined"]
    assert len(row["line"]) == 16


class Bench:
    """The daemons of a case, and what is seen of a client over them."""

    def __init__(self, case: Case, directory: Path, fakes: list[FakeDaemon | None], tls: TLS | None = None) -> None:
        self.case = case
        self.directory = directory
        self.fakes = fakes
        self.tls = tls
        self.urls = [fake.url if fake is not None else dead for fake, dead in zip(fakes, DEAD, strict=False)]

    def client(self, name: str) -> BustcallClient:
        """Make a client; its outbox, if any, is a new file of this name."""
        settings: dict[str, Any] = {"retry": QUICK, "hedge": None, "probes": None, "budget": None, "tls": self.tls}
        settings |= self.case.settings
        if self.case.outbox:
            settings["outbox"] = self.path(name)
        return BustcallClient(self.urls[0], peers=self.urls[1:], **settings)

    def path(self, name: str) -> Path:
        """Tell where the outbox of this name is."""
        return self.directory / f"{name}.db"

    def applied(self, target: str) -> bool:
        """Tell whether some daemon has applied it."""
        return any(bust.target == target for fake in self.fakes if fake is not None for bust in fake.applied)

    async def prepare(self, client: BustcallClient, context: Context) -> list[asyncio.Task[BustResult]]:
        """Bring the client, and its daemons, to where the call under test finds them."""
        for fake in self.fakes:
            if fake is not None:
                fake.plan.clear()
        for _ in range(self.case.warm):
            await client.bust("key/warm")
        for fake, plan in zip(self.fakes, self.case.plans, strict=True):
            if fake is not None and plan is not None:
                fake.plan.extend(plan)
        loop = asyncio.get_running_loop()
        busy = [context.run(loop.create_task, client.bust("key/busy")) for _ in range(self.case.busy)]
        if busy:
            await eventually(lambda: client.statistics().pool.in_use == len(busy))
        return busy

    async def strike(self, at: int, way: Way) -> bool:
        """Strike a call after its step `at`, look at everything that could be left; tell whether it was hit."""
        before = asyncio.all_tasks()
        open_before = descriptors()
        name = f"{type(way).__name__}{way.times}-{at}"
        target = f"key/{name}"
        client = self.client(name)
        steps = Steps(at, way.strike, way.times)
        context = Context()
        context.run(STEPS.set, steps)
        busy = await self.prepare(client, context)
        loop = asyncio.get_running_loop()

        async def bust() -> BustResult:
            try:
                return await client.bust(target, **self.case.how)
            except asyncio.CancelledError:
                if loop.time() - steps.struck_at < RESERVE:  # longer than that a call does not wait for its storing
                    self.check_outbox(name, target, begun=True, free=False)
                raise
            finally:
                steps.over = True

        async def call() -> Any:
            steps.caller = asyncio.current_task()  # not before: what else is busy must not strike at nobody
            return await way.arrive(bust)

        if at == 0:
            early = context.run(loop.create_task, call())
            early.cancel()  # before it began at all
            with pytest.raises(asyncio.CancelledError):
                await early
            result, steps.struck = None, 1
        else:
            async with asyncio.timeout(PATIENCE):
                result = await context.run(loop.create_task, call())
        assert result is None or result.status == self.case.status
        await self._look(client, steps, busy)
        if self.case.outbox:
            assert client.statistics().pool.calls == 0
        async with asyncio.timeout(PATIENCE):
            assert (await client.bust("key/next")).status in {"busted", "deferred"}
        begun = loop.time()
        await client.aclose()
        assert loop.time() - begun < 2.0
        self.check_outbox(name, target, begun=at > 0)
        await eventually(lambda: not _strays(before))
        await eventually(lambda: descriptors() <= open_before, "a descriptor is open")
        return steps.struck > 0

    async def _look(self, client: BustcallClient, steps: Steps, busy: list[asyncio.Task[BustResult]]) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await eventually(lambda: all(task.done() for task in steps.tasks))
        assert loop.time() - begun < 1.0, "a task went on for longer than a loser may linger"
        await eventually(lambda: not _asking())  # whoever else waits for that has the answer of it
        for task in busy:
            assert (await task).ok
        pool = client.statistics().pool
        if not self.case.outbox:  # its courier may be using a connection just now
            assert (pool.in_use, pool.waiting, pool.calls) == (0, 0, 0)
            assert [daemon.in_flight for daemon in client.topology().daemons] == [0] * len(self.urls)
        await eventually(lambda: (client.statistics().pool.in_use, client.statistics().pool.waiting) == (0, 0))
        await eventually(lambda: not any(daemon.in_flight for daemon in client.topology().daemons))
        assert client.statistics().pool.calls == 0

    def check_outbox(self, name: str, target: str, *, begun: bool, free: bool = True) -> None:
        """See that its rows are whole, and that the bust, once begun, is with a daemon or among them."""
        if not self.case.outbox:
            return
        rows = rows_of(self.path(name)) if self.path(name).exists() else []
        for row in rows:
            check_row(row, self.urls, free=free)
        if begun:
            assert self.applied(target) or any(row["target"] == target for row in rows), "the bust is lost"


def _asking() -> bool:
    """Tell whether a daemon is being asked what it can do: that is the client's own, and not the call's."""
    return any(task.get_name() == "pybustcall-negotiation" for task in asyncio.all_tasks())


def _strays(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Tell the tasks that have come since, but for those that serve connections of the daemons."""
    return {
        task
        for task in asyncio.all_tasks() - before
        if not getattr(task.get_coro(), "__qualname__", "").startswith("RequestHandler.")
    }


async def strike_everywhere(
    case: Case,
    directory: Path,
    way: Callable[[], Way],
    *,
    server_tls: ssl.SSLContext | None = None,
    tls: TLS | None = None,
    stride: int = 1,
) -> int:
    """Strike a call of this case after each of its steps, or each second one and so on; tell how many there were."""
    async with AsyncExitStack() as stack:
        fakes = [
            None if plan is None else await stack.enter_async_context(FakeDaemon(tls=server_tls)) for plan in case.plans
        ]
        bench = Bench(case, directory, fakes, tls)
        with counting():
            at = 0
            while await bench.strike(at, way()):
                at += stride
                assert at < MOST, "the call has no end"
    return at


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: hundreds of outboxes are made, and fsync is not what is looked at."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.parametrize("name", CASES)
async def test_a_call_that_is_cancelled_anywhere_leaves_nothing_behind(name: str, directory: Path) -> None:
    """By its task, after every step of every task of the call."""
    hits = await strike_everywhere(CASES[name], directory, ByTask)
    assert hits > 3, "the harness has hit next to nothing"


TELLING = ["hedged", "quorum, one down", "outage, write-ahead", "waits for a slot"]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "task"])
@pytest.mark.parametrize("name", TELLING)
async def test_whoever_cancels_a_call_gets_its_cancellation_back(name: str, way: str, directory: Path) -> None:
    """A timeout, a group, an anyio scope, and a caller who cancels again and again; at every second step."""
    hits = await strike_everywhere(CASES[name], directory, WAYS[way], stride=2)
    assert hits > 3, "the harness has hit next to nothing"


async def test_a_call_over_tls_that_is_cancelled_anywhere_leaves_nothing_behind(
    server_tls: ssl.SSLContext, ca_file: Path, directory: Path
) -> None:
    """Also in the middle of the handshake."""
    case = Case(plans=((),), outbox=True)
    assert await strike_everywhere(case, directory, ByTask, server_tls=server_tls, tls=TLS(ca=ca_file)) > 5


def threads() -> list[str]:
    """List the threads that belong to clients."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pybustcall-")]


@pytest.mark.parametrize("way", ["task", "storm", "timeout", "anyio"])
@pytest.mark.parametrize("outbox", [True, False], ids=["outbox", "no outbox"])
async def test_an_aclose_that_is_cancelled_anywhere_still_closes_everything(
    way: str, outbox: bool, directory: Path
) -> None:
    """With calls under way, in every step: connections, the outbox, the hooks and their threads; then it arrives."""

    async def strike(at: int) -> bool:
        before, open_before = asyncio.all_tasks(), descriptors()
        assert threads() == []
        path = directory / f"{way}-{at}.db"
        client = BustcallClient(
            fake.url, pool=Pool(drain=0.01), probes=Probes(), hedge=None, outbox=path if outbox else None
        )
        events: list[Event] = []
        client.on_event(events.append)
        fake.plan.clear()
        await client.bust("key/before")
        fake.plan.extend([HANGS] * 10)
        calls = [asyncio.create_task(client.bust(f"key/{number}")) for number in range(2)]
        await eventually(lambda: client.statistics().pool.in_use >= 2)
        who = WAYS[way]()
        steps = Steps(at, who.strike, who.times)

        async def close() -> bool:
            try:
                await client.aclose()
            finally:
                steps.over = True
            return True

        async def call() -> Any:
            return await who.arrive(close)

        context = Context()
        context.run(STEPS.set, steps)
        async with asyncio.timeout(PATIENCE):
            steps.caller = context.run(asyncio.get_running_loop().create_task, call())
            await steps.caller
        assert client.statistics().pool.sessions == 0
        with pytest.raises(ClientClosed):
            await client.bust("key/after")
        async with asyncio.timeout(PATIENCE):
            ends = await asyncio.gather(*calls, return_exceptions=True)
        for end in ends:
            assert isinstance(end, ClientClosed) or (isinstance(end, BustResult) and end.status == "deferred"), end
        if outbox:
            stored = {row["target"] for row in rows_of(path)}
            deferred = {end.target for end in ends if isinstance(end, BustResult)}
            assert deferred <= stored, "a call said that it is stored, and it is not"
        await eventually(lambda: not threads(), "a thread is left")
        await eventually(lambda: not _strays(before), "a task is left")
        await eventually(lambda: descriptors() <= open_before, "a descriptor is open")
        return steps.struck > 0

    async with FakeDaemon() as fake:
        with counting():
            at = 1
            while await strike(at):
                at += 1
                assert at < MOST, "aclose has no end"
    assert at > 3


@contextmanager
def serving_elsewhere(*plans: tuple[Answer, ...] | None) -> Iterator[list[FakeDaemon | None]]:
    """Serve fake daemons in a thread with a loop of its own, so that they outlive the loops of calls."""
    ready, leave = threading.Event(), threading.Event()
    fakes: list[FakeDaemon | None] = []

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            fakes[:] = [None if plan is None else FakeDaemon(plan) for plan in plans]
            for fake in filter(None, fakes):
                await stack.enter_async_context(fake)
            ready.set()
            while not leave.is_set():
                await asyncio.sleep(0.001)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield fakes
    finally:
        leave.set()
        thread.join(PATIENCE)


@pytest.mark.parametrize("name", ["peer after a refusal", "outage", "outage, write-ahead", "all, one down"])
def test_a_loop_that_ends_under_a_call_loses_nothing(name: str, directory: Path) -> None:
    """`asyncio.run` cancels every task at once, those that store among them: the bust is stored all the same."""
    case = CASES[name]
    with serving_elsewhere(*case.plans) as fakes:
        bench = Bench(case, directory, fakes)
        at, hit = 1, True
        while hit:
            hit = _end_the_loop(bench, case, at)
            at += 1
            assert at < MOST
    assert at > 6


def _end_the_loop(bench: Bench, case: Case, at: int) -> bool:
    """End a call's loop after its step `at`; see that the bust is with a daemon or in the outbox, and nothing open."""
    open_before = descriptors()
    client = bench.client(f"end-{at}")
    target = f"key/end-{at}"
    troubles: list[dict[str, Any]] = []
    steps: Steps

    async def main() -> None:
        nonlocal steps
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, trouble: troubles.append(trouble))
        loop.set_task_factory(count_steps)  # type: ignore[arg-type]
        over: asyncio.Future[bool] = loop.create_future()
        steps = Steps(at, lambda: ring(over, hit=True))
        context = Context()
        context.run(STEPS.set, steps)
        call = steps.caller = context.run(loop.create_task, client.bust(target, **case.how))
        call.add_done_callback(lambda _: ring(over, hit=False))
        await over

    asyncio.run(main())

    async def close() -> None:
        await client.aclose()

    asyncio.run(close())
    assert not troubles
    bench.check_outbox(f"end-{at}", target, begun=True, free=False)
    assert descriptors() <= open_before + 4, "descriptors are open"  # the daemons close their ends in their own time
    assert threads() == []
    return steps.struck > 0


async def test_a_replay_that_is_cancelled_anywhere_is_gone_on_with(directory: Path) -> None:
    """What it had leased is delivered soon after, and not only when the leases have ended."""

    async def strike(at: int) -> bool:
        path = directory / f"replay-{at}.db"
        outbox = Outbox(path=path, replay=10_000)
        targets = {f"key/{at}-{number}" for number in range(2)}
        store = OutboxStore(outbox)
        for target in sorted(targets):
            bust = StoredBust(target=target, strategy="dimensional", fault_tolerance=6, key=str(uuid.uuid4()))
            await store.put(bust, sent=False)
        await store.aclose()
        client = BustcallClient(fake.url, outbox=outbox, retry=None, probes=None, breaker=None, hedge=None)
        who = ByTask()
        steps = Steps(at, who.strike)

        async def replay() -> bool:
            try:
                await client.outbox.replay()
            finally:
                steps.over = True
            return True

        async def call() -> Any:
            return await who.arrive(replay)

        context = Context()
        context.run(STEPS.set, steps)
        async with asyncio.timeout(PATIENCE):
            steps.caller = context.run(asyncio.get_running_loop().create_task, call())
            await steps.caller
        await eventually(lambda: targets <= {bust.target for bust in fake.applied}, "rows wait for their leases")
        await client.aclose()
        for row in rows_of(path):
            check_row(row, [fake.url])
        return steps.struck > 0

    async with FakeDaemon() as fake:
        with counting():
            at = 1
            while await strike(at):
                at += 1
                assert at < MOST
    assert at > 4


async def test_an_outbox_that_fails_in_the_middle_of_a_replay_is_an_error_that_passes(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OutboxError, not a group of errors; the courier goes on, and delivers when the file is usable again."""
    done = OutboxStore.done
    failed: list[None] = []

    async def broken(*_: object) -> int:
        failed.append(None)
        raise OutboxError("the disk is gone")

    async with FakeDaemon() as fake:
        await fake.stop()
        async with BustcallClient(
            fake.url, outbox=directory / "o.db", retry=None, probes=None, breaker=None, hedge=None
        ) as client:
            assert (await client.bust("key/a")).status == "deferred"
            monkeypatch.setattr(OutboxStore, "done", broken)
            await fake.start()
            with pytest.raises(OutboxError, match="the disk is gone"):
                await client.outbox.replay()
            await eventually(lambda: len(failed) > 1, "the courier has not tried")
            monkeypatch.setattr(OutboxStore, "done", done)
            assert (await client.outbox.replay()).ok
            assert "pybustcall-courier" in {task.get_name() for task in asyncio.all_tasks()}
