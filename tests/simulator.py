"""A simulator of delivery: the real client code under virtual time, with daemons, a network and disks that fail.

A scenario is made from a seed and nothing else: how many daemons, which clients, what they bust, what goes wrong and
when. Deliverer, dispatcher, plan, fleet, prober, courier and outbox are the real ones, put together as
`runtime.Runtime` does; daemons and the network are simulated, and a process is killed by taking its disk and its
network away before its tasks are cancelled. After each scenario everything is healed, the outboxes are drained, and the
goals of docs/explanation/resilience.md are checked. A seed replays its scenario exactly.

    python -m tests.simulator --scenarios 10000 --jobs 2 [--seed N] [--family NAME]
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import heapq
import logging
import multiprocessing
import os
import selectors
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

from pybustcall.background import Courier, Prober
from pybustcall.delivery import Deliverer, DeliveryMode, Job, Replay
from pybustcall.errors import OutboxError
from pybustcall.faults import AttemptFailed, Fault, FaultKind
from pybustcall.fleet import Fleet, Policies
from pybustcall.models import BustReply, BustRequest, bust_request
from pybustcall.outbox import ANY, Outbox, OutboxRow, OutboxStore, RowState
from pybustcall.policies import Breaker, Budget, Failback, Hedge, Pool, Probes, Retry, ceiling
from pybustcall.results import BustResult
from pybustcall.telemetry import BreakerMoved, Event, FailedBack, FailedOver

__all__ = ["FAMILIES", "INVARIANTS", "Report", "Violation", "family_of", "run_scenario"]

INVARIANTS: Final = {
    "kept": "a bust that returned is applied as promised, or listed in the outbox",
    "stored": "a cancelled bust is stored",
    "once": "one idempotency key has one effect at a daemon, and every effect has the key of its call",
    "deadline": "no call goes on past its deadline + 50 ms",
    "load": "a daemon gets at most 1.15 requests for each call in an outage",
    "hedging": "hedges add at most 5.5 %",
    "tidy": "no task, slot, flight, trial or claim is left behind",
    "failback": "at most 5 % of the clients return in the busiest second",
    "flapping": "a hub that flaps makes a client switch at most twice",
    "order": "rows of one target are delivered in order",
    "recovery": "a daemon that is well again is used again, and soon",
    "failover": "a lone call outlasts a killed hub within 1.5 s, one that is a black hole within 3 s",
    "backoff": "a retry waits no longer than its ceiling, and is spread below it",
    "burst": "failures of one moment open no breaker",
    "error": "nothing raises what it should not",
}
"""What is checked at the end of every scenario, by name."""

_EPOCH: Final = 1_800_000_000.0
_WINDOW: Final = 600.0
"""Seconds for which a daemon remembers idempotency keys."""

_DRAIN: Final = 400.0
"""Virtual seconds in which the couriers must have delivered everything once all is well."""

_SLACK: Final = 0.05
_SLOTS: Final = Pool().per_daemon
_SLOT_WAIT: Final = Pool().wait
_CONNECT: Final = Pool().connect
_DEFAULTS: Final = Policies(hedge=Hedge(), breaker=Breaker(), budget=Budget(), probes=Probes(), failback=Failback())

T = TypeVar("T")


@dataclass(frozen=True)
class Violation:
    """An invariant that did not hold, and how."""

    invariant: str
    text: str


@dataclass(frozen=True)
class Report:
    """What a scenario came to: `trace` is a hash of everything that was sent, answered and returned."""

    seed: int
    family: str
    violations: tuple[Violation, ...]
    trace: str
    calls: int
    statuses: dict[str, int]
    virtual: float


@dataclass(frozen=True)
class Effect:
    """A bust that a daemon applied: it began then."""

    begun: float
    key: str
    target: str


@dataclass(eq=False)
class Call:
    """A bust as its caller sees it. `fate`: a result's status, or cancelled, killed, unstored, error, running."""

    number: int
    key: str
    target: str
    mode: DeliveryMode
    timeout: float
    client: Client
    begun: float = 0.0
    ended: float = 0.0
    entered: bool = False
    fate: str = "running"
    result: BustResult | None = None


# Time


class _Nothing(selectors.DefaultSelector):
    """A selector that never waits: it lets the loop's clock jump to what is due next."""

    clock = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and for nothing that will ever happen")
        self.clock += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop without input and output, whose clock jumps. It wakes exactly when something is due."""

    def __init__(self) -> None:
        self._virtual = _Nothing()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.clock

    def _write_to_self(self) -> None:
        """There is one thread only, and nobody to wake."""


# Daemons and the network


@dataclass(eq=False)
class SimDaemon:
    """A daemon: what it did, what it remembers, and what is wrong with it or with the way there (`weather`)."""

    url: str
    world: World
    latency: float
    weather: str = "fine"
    epoch: int = 0
    effects: list[Effect] = field(default_factory=list)
    memory: dict[str, tuple[float, str]] = field(default_factory=dict)
    running: dict[str, list[Callable[[Fault | None], None]]] = field(default_factory=dict)
    backlog: list[Callable[[], None]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    well_since: float = 0.0

    def change(self, weather: str) -> None:
        """Let something go wrong, or be well again ("fine")."""
        self.world.note("weather", self.url, weather)
        before, self.weather = self.weather, weather
        if weather in {"down", "restart"}:
            self.epoch += 1
            self.backlog.clear()
            running, self.running = self.running, {}
            for answers in running.values():
                for answer in answers:
                    answer(self.fault(FaultKind.DISCONNECTED, "maybe"))
        if before == "stall":
            backlog, self.backlog = self.backlog, []
            for arrive in backlog:
                arrive()
        if weather == "fine":
            self.well_since = self.world.loop.time()

    def fault(self, kind: FaultKind, applied: str, status: int | None = None, after: float | None = None) -> Fault:
        return Fault(kind, self.url, kind.value, applied, status, after)  # type: ignore[arg-type]

    def arrive(self, epoch: int, key: str, target: str, answer: Callable[[Fault | None], None]) -> None:
        """Take a request in: do it once for each key, remember that, answer."""
        if epoch != self.epoch or self.weather in {"down", "restart"}:
            answer(self.fault(FaultKind.DISCONNECTED, "maybe"))
        elif self.weather == "stall":
            self.backlog.append(partial(self.arrive, epoch, key, target, answer))
        elif key in self.running:
            self.running[key].append(answer)
        elif self._remembers(key):
            same = self.memory[key][1] == target
            answer(None if same else self.fault(FaultKind.REJECTED, "no", 422))
        else:
            self.running[key] = [answer]
            begun, loop = self.world.loop.time(), self.world.loop
            loop.call_later(self.world.latency_of(self) / 2, self._finish, epoch, Effect(begun, key, target))

    def _finish(self, epoch: int, effect: Effect) -> None:
        if epoch != self.epoch:
            return
        self.effects.append(effect)
        self.memory[effect.key] = (self.world.loop.time(), effect.target)
        self.world.note("effect", self.url, effect.key)
        for answer in self.running.pop(effect.key):
            answer(None)

    def _remembers(self, key: str) -> bool:
        return key in self.memory and self.world.loop.time() - self.memory[key][0] <= _WINDOW


@dataclass(frozen=True)
class Attempted:
    """One attempt as the wire saw it: boarded and ended then, with that fault."""

    daemon: str
    boarded: float
    ended: float
    fault: Fault | None


_HALF: Final = ("down", "error", "reset_before", "reset_after")


@dataclass(eq=False)
class Wire:
    """What one client process has of the network: it takes the place of `DaemonClient` and its sessions."""

    client: Client
    slots: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    attempts: dict[str, list[Attempted]] = field(default_factory=lambda: defaultdict(list))
    under_way: Counter[str] = field(default_factory=Counter)

    async def send(
        self,
        daemon: SimDaemon,
        request: BustRequest,
        /,
        *,
        key: str,
        until: float,
        deadline: float,
        started: Callable[[], None],
        wider: bool,
    ) -> BustReply:
        assert not wider
        slot = self.slots.setdefault(daemon.url, asyncio.Semaphore(_SLOTS))
        self.under_way[key] += 1
        try:
            return await self._send(daemon, request, key, until, deadline, started, slot)
        finally:
            self.under_way[key] -= 1

    async def _send(
        self,
        daemon: SimDaemon,
        request: BustRequest,
        key: str,
        until: float,
        deadline: float,
        started: Callable[[], None],
        slot: asyncio.Semaphore,
    ) -> BustReply:
        world, boarded = self.client.world, self.client.world.loop.time()
        try:
            async with asyncio.timeout(max(0.0, min(_SLOT_WAIT, until - boarded))):
                await slot.acquire()
        except TimeoutError:
            raise AttemptFailed(daemon.fault(FaultKind.NO_SLOT, "no")) from None
        try:
            begun = world.loop.time()
            started()
            fault = await self._exchange(daemon, request, key, min(deadline, begun + until - boarded))
        finally:
            slot.release()
        now = world.loop.time()
        self.attempts[key].append(Attempted(daemon.url, boarded, now, fault))
        world.note("answer", self.client.name, daemon.url, key, fault.kind if fault is not None else "ok")
        if fault is not None:
            raise AttemptFailed(fault)
        return BustReply(cache_key=request.target, status="success", removed=1)

    async def _exchange(self, daemon: SimDaemon, request: BustRequest, key: str, until: float) -> Fault | None:
        world = self.client.world
        answer: asyncio.Future[Fault | None] = world.loop.create_future()

        def tell(fault: Fault | None) -> None:
            if not answer.done():
                answer.set_result(fault)

        if self.client.alive:
            world.note("send", self.client.name, daemon.url, key)
            daemon.arrivals.append(world.loop.time())
            self._carry(daemon, key, request.target, tell)
        timer = world.loop.call_at(until, tell, daemon.fault(FaultKind.TIMED_OUT, "maybe"))
        try:
            return await answer
        finally:
            timer.cancel()

    def _carry(self, daemon: SimDaemon, key: str, target: str, tell: Callable[[Fault | None], None]) -> None:
        """Decide what becomes of a request on its way there, at the daemon, and on its way back."""
        world = self.client.world
        later, way = world.loop.call_later, world.latency_of(daemon) / 4
        weather = world.weather_between(self.client, daemon)
        if weather == "black_hole":
            if world.network.random() < 0.5:  # no connection: it is known that nothing was sent
                later(_CONNECT, tell, daemon.fault(FaultKind.TIMED_OUT, "no"))
            return
        refusal = world.refusal_of(daemon, weather)
        if refusal is not None:
            later(way, tell, refusal)
        elif weather != "request_lost":
            told = world.told_after(daemon, weather)

            def back(fault: Fault | None) -> None:
                if not isinstance(told, str):
                    later(way, tell, fault or told)

            later(way, daemon.arrive, daemon.epoch, key, target, back)

    async def probe(self, index: int) -> Fault | None:
        """Probe a daemon as `DaemonClient.probe` does: half a second, nothing applied."""
        world = self.client.world
        daemon = self.client.daemons[index]
        weather = world.weather_between(self.client, daemon)
        timeout = self.client.policies.probes.timeout if self.client.policies.probes is not None else 0.5
        fault = world.refusal_of(daemon, weather) or world.told_after(daemon, weather)
        if weather in {"black_hole", "request_lost", "stall"} or fault == "lost":
            await asyncio.sleep(timeout)
            fault = daemon.fault(FaultKind.TIMED_OUT, "maybe")
        else:
            await asyncio.sleep(min(timeout, world.latency_of(daemon)))
        return fault if isinstance(fault, Fault) else None


# Client processes


class Disk(Executor):
    """Runs the outbox's transactions in the event loop, at once or, where fsync is slow, later."""

    def __init__(self) -> None:
        self.delay = 0.0
        self._loop = asyncio.get_running_loop()

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - as an executor's thread does
                done.set_exception(error)

        if self.delay:
            self._loop.call_later(self.delay, run)
        else:
            run()
        return done


@dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """What a client process is made of; it is made again from this after it was killed."""

    name: str
    daemons: int
    policies: Policies = _DEFAULTS
    outbox: Outbox | None = None
    retry: Retry | None = Retry()  # noqa: RUF009 - frozen


@dataclass(eq=False)
class Client:
    """One client process, put together as `runtime.Runtime` is."""

    world: World
    spec: ClientSpec
    generation: int
    alive: bool = True
    disk_full: bool = False
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    adopted: set[asyncio.Task[Any]] = field(default_factory=set)
    moves: list[tuple[float, Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        world, spec = self.world, self.spec
        self.name = f"{spec.name}.{self.generation}"
        self.policies = spec.policies
        self.daemons = world.daemons[: spec.daemons]
        self.wire = Wire(self)
        self.disk = Disk()
        urls = self.urls = [daemon.url for daemon in self.daemons]
        random = Random(f"{world.seed}:{self.name}").random
        self.fleet = Fleet(
            urls,
            spec.policies,
            client_id=spec.name,
            now=world.loop.time(),
            random=random,
            emit=self._take_event,
            wake=self._wake_prober,
        )
        self.prober = Prober(self.fleet, self.wire.probe)
        self.store = None
        if spec.outbox is not None:
            self.store = OutboxStore(spec.outbox, clock=self._clock, executor=self.disk)
        self.deliverer: Deliverer[SimDaemon] = Deliverer(
            self.wire.send,
            self.daemons,
            self.fleet,
            random=random,
            adopt=self._adopt,
            store=self.store,
            owner=self.name,
            wake=self._wake_courier,
        )
        self.courier: Courier | None = None
        if self.store is not None and spec.outbox is not None:
            self.courier = Courier(
                self.store,
                spec.outbox,
                self._deliver,
                ready=self._ready,
                owner=self.name,
                destinations=urls,
                random=random,
                counts=self.fleet.counts,
            )
        self.prober.start()
        if self.courier is not None:
            self.courier.start()

    async def bust(self, call: Call, *, write_ahead: bool = False) -> None:
        """Make one call, and write down what came of it."""
        loop = self.world.loop
        call.entered, call.begun = True, loop.time()
        job = Job(
            request=bust_request(call.target, "direct", 6),
            key=call.key,
            begun=call.begun,
            deadline=call.begun + call.timeout,
            mode=call.mode,
            retry=self.spec.retry,
            write_ahead=write_ahead,
        )
        try:
            call.result = (await self.deliverer.bust(job)).result
            call.fate = call.result.status
        except asyncio.CancelledError:
            call.fate = "cancelled" if self.alive else "killed"
            raise
        except OutboxError:
            call.fate = "unstored" if self.alive else "killed"
        except Exception:
            call.fate = "error"
            raise
        finally:
            if not self.alive:
                call.fate = "killed"
            call.ended = loop.time()
            self.world.note("call", call.number, call.fate)
            # Only the losers of a race that was won may go on for a moment, and what is in the outbox may be sent.
            if self.store is None and call.fate in {"failed", "cancelled"} and self.wire.under_way[call.key]:
                self.world.broken("tidy", f"call {call.number} ({call.fate}) left an attempt under way")

    def run(self, call: Call, *, write_ahead: bool = False) -> asyncio.Task[None]:
        """Begin a call as a task of this process."""
        task = self.world.loop.create_task(self.bust(call, write_ahead=write_ahead))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def kill(self) -> None:
        """End the process as SIGKILL does: from now on nothing that it does has any effect."""
        self.world.note("kill", self.name)
        self.alive = False
        self.disk.delay = 0.0
        self.prober.cancel()
        if self.courier is not None:
            self.courier.cancel()
        for task in [*self.tasks, *self.adopted]:
            task.cancel()
        while self.tasks or self.adopted:
            await asyncio.wait([*self.tasks, *self.adopted])
        await self._end()

    async def aclose(self) -> None:
        """Close it in order."""
        while self.tasks or self.adopted:
            await asyncio.wait([*self.tasks, *self.adopted])
        await self._end()

    async def _end(self) -> None:
        for task in (self.prober._task, self.courier._task if self.courier is not None else None):
            if self.alive and task is not None and task.done():
                self.world.broken("error", f"{task.get_name()} of {self.name} ended by itself")
        await self.prober.aclose()
        if self.courier is not None:
            await self.courier.aclose()
        if self.store is not None:
            await self.store.aclose()

    def _clock(self) -> float:
        if not self.alive:
            raise OutboxError("the process is dead")
        if self.disk_full:
            raise OSError(errno.ENOSPC, "no space left")
        return _EPOCH + self.world.loop.time()

    def _adopt(self, task: asyncio.Task[object], linger: float, /) -> None:
        if not self.alive:
            task.cancel()
        timer = self.world.loop.call_later(linger, task.cancel)
        self.adopted.add(task)
        task.add_done_callback(self.adopted.discard)
        task.add_done_callback(lambda _: timer.cancel())

    def _wake_prober(self) -> None:
        self.prober.wake()

    def _wake_courier(self) -> None:
        if self.courier is not None:
            self.courier.wake()

    def _ready(self) -> frozenset[str]:
        now = self.world.loop.time()
        return frozenset(url for index, url in enumerate(self.urls) if self.fleet.well(index, now))

    async def _deliver(self, row: OutboxRow, paused: frozenset[str]) -> Replay:
        replay = await self.deliverer.replay(row, paused)
        if self.alive:
            self.world.delivered(self, row, replay)
        return replay

    def _take_event(self, event: Event) -> None:
        if isinstance(event, BreakerMoved | FailedOver | FailedBack):
            self.moves.append((self.world.loop.time(), event))
            self.world.note("move", self.name, type(event).__name__, event.daemon)


# The world


class World:
    """All of one scenario: daemons, clients, calls, and what was seen."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed = seed
        self.directory = directory
        self.loop = asyncio.get_running_loop()
        self.random = Random(f"{seed}:scenario")
        self.network = Random(f"{seed}:network")
        self.daemons: list[SimDaemon] = []
        self.clients: dict[str, Client] = {}
        self.past: list[Client] = []
        self.calls: list[Call] = []
        self.cut: set[tuple[str, str]] = set()
        self.disk_trouble = False
        self.violations: list[Violation] = []
        self._hash = hashlib.sha256()
        self._numbers = count(1)
        self._first_delivered: dict[tuple[str, str, str], list[int]] = defaultdict(list)

    # Making it

    def make_daemons(self, number: int, latency: float | None = None) -> None:
        for index in range(number):
            usual = latency if latency is not None else self.random.choice([0.001, 0.004, 0.02])
            self.daemons.append(SimDaemon(f"http://daemon-{index}.test:8989", self, usual))

    def start(self, spec: ClientSpec) -> Client:
        """Start a client process, or one that was killed again."""
        before = self.clients.get(spec.name)
        if before is not None:
            self.past.append(before)
        client = Client(self, spec, before.generation + 1 if before is not None else 1)
        self.clients[spec.name] = client
        return client

    def outbox(self, name: str, **settings: Any) -> Outbox:
        return Outbox(path=self.directory / f"{name}.db", **settings)

    def call(self, client: Client, target: str, *, timeout: float = 5.0, mode: DeliveryMode = "first") -> Call:
        number = next(self._numbers)
        call = Call(number, f"key-{number}", target, mode, timeout, client)
        self.calls.append(call)
        return call

    async def work(self, name: str, work: Work, random: Random) -> None:
        """Be one worker: bust again and again until the time is over, through whichever process has that name."""
        while self.loop.time() < work.until:
            await asyncio.sleep(random.expovariate(1 / work.every))
            client = self.clients[name]
            if not client.alive or self.loop.time() >= work.until:
                continue
            target = f"hot-{random.randrange(work.hot)}" if random.random() < work.heat else f"key-of-{random.random()}"
            call = self.call(client, target, timeout=random.choice(work.timeouts), mode=random.choice(work.modes))
            task = client.run(call, write_ahead=random.random() < work.write_ahead)
            if random.random() < work.cancelled:
                self.loop.call_later(random.random() ** 3 * call.timeout, task.cancel)
            await asyncio.wait([task])
            self.check_ended(call, task)

    # Watching it

    def note(self, *what: object) -> None:
        """Add to the trace."""
        self._hash.update(f"{self.loop.time():.6f} {what}\n".encode())

    @property
    def trace(self) -> str:
        return self._hash.hexdigest()

    def broken(self, invariant: str, text: str) -> None:
        self.violations.append(Violation(invariant, f"{self.loop.time():.3f} s: {text}"))

    def check_ended(self, call: Call, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.broken("error", f"call {call.number}: {''.join(traceback.format_exception(error))}")

    def delivered(self, client: Client, row: OutboxRow, replay: Replay) -> None:
        """See that the rows of one line are delivered in order; a repeat after a lease ended is no second delivery."""
        self.note("replay", client.name, row.id, replay.verdict)
        path = str(client.spec.outbox.path) if client.spec.outbox is not None else ""
        before = self._first_delivered[path, row.destination, row.bust.target]
        if replay.verdict == "delivered" and row.id not in before:
            if before and row.id < before[-1]:
                self.broken("order", f"row {row.id} was delivered after row {before[-1]} of the same target")
            before.append(row.id)

    # What the network does

    def latency_of(self, daemon: SimDaemon) -> float:
        factor = 3.0 if daemon.weather == "slow" else 1.0
        return factor * daemon.latency * min(6.0, self.network.lognormvariate(0.0, 0.4))

    def weather_between(self, client: Client, daemon: SimDaemon) -> str:
        if (client.spec.name, daemon.url) in self.cut:
            return self.network.choice(["request_lost", "reply_lost"])
        if daemon.weather == "half":
            return self.network.choice(_HALF) if self.network.random() < 0.5 else "fine"
        if daemon.weather == "silent":
            return self.network.choice(["request_lost", "reply_lost"])
        return daemon.weather

    def refusal_of(self, daemon: SimDaemon, weather: str) -> Fault | None:
        """Tell the fault of a request that does not reach the daemon's work."""
        after = self.network.choice([None, 1.0, 2.0])
        refusals: dict[str, tuple[FaultKind, str, int | None, float | None]] = {
            "down": (FaultKind.UNREACHABLE, "no", None, None),
            "restart": (FaultKind.UNREACHABLE, "no", None, None),
            "reset_before": (FaultKind.DISCONNECTED, "maybe", None, None),
            "error": (FaultKind.SERVER_ERROR, "maybe", 500, None),
            "unavailable": (FaultKind.THROTTLED, "maybe", 503, after),
            "throttle": (FaultKind.THROTTLED, "maybe", 429, after),
            "rejects": (FaultKind.REJECTED, "no", 422, None),
            "token": (FaultKind.TOKEN_REFUSED, "no", 401, None),
        }
        return daemon.fault(*refusals[weather]) if weather in refusals else None

    def told_after(self, daemon: SimDaemon, weather: str) -> Fault | str | None:
        """Tell what the client gets to see although the daemon did its work: a fault, "lost", or None for the truth."""
        match weather:
            case "reset_after":
                return daemon.fault(FaultKind.DISCONNECTED, "maybe")
            case "proxy_error":
                return daemon.fault(FaultKind.SERVER_ERROR, "maybe", 502)
            case "reply_lost":
                return "lost"
            case _:
                return None

    # Ending it

    def heal(self) -> None:
        self.cut.clear()
        for daemon in self.daemons:
            if daemon.weather != "fine":
                daemon.change("fine")
        for client in self.clients.values():
            client.disk_full, client.disk.delay = False, 0.0

    async def finish(self) -> None:
        """Heal everything, let the couriers deliver, close, and check what holds of every scenario."""
        self.heal()
        for client in list(self.clients.values()):
            while client.tasks or client.adopted:
                await asyncio.wait([*client.tasks, *client.adopted])
            if not client.alive:
                self.start(client.spec)
        left = await self._drain()
        for client in self.clients.values():
            await client.aclose()
        await asyncio.sleep(1.0)
        self._check_calls(left)
        self._check_effects()
        self._check_backoff()
        self._check_tidy()

    async def _drain(self) -> dict[str, dict[int, OutboxRow]]:
        """Wait until the outboxes are empty but for what is set aside or owed to strangers; return what they list."""
        left: dict[str, dict[int, OutboxRow]] = {}
        end = self.loop.time() + _DRAIN
        for client in self.clients.values():
            if client.store is None:
                continue
            known = {ANY, *(daemon.url for daemon in client.daemons)}
            while True:
                rows = await client.store.rows(limit=100_000)
                due = [row for row in rows if row.state is not RowState.ASIDE and row.destination in known]
                if not due:
                    break
                if self.loop.time() > end:
                    self.broken("kept", f"{client.name} has not delivered {len(due)} rows: {due[0]}")
                    break
                await asyncio.sleep(2.0)
            left[client.spec.name] = {row.id: row for row in rows}
        return left

    def _check_calls(self, left: dict[str, dict[int, OutboxRow]]) -> None:
        applied: dict[tuple[str, str], list[Effect]] = defaultdict(list)
        for daemon in self.daemons:
            for effect in daemon.effects:
                applied[daemon.url, effect.target].append(effect)
        for call in self.calls:
            if call.fate == "running" and call.entered:
                self.broken("tidy", f"call {call.number} has not ended")
            if call.ended - call.begun > call.timeout + _SLACK and not self.disk_trouble:
                self.broken("deadline", f"call {call.number} took {call.ended - call.begun:.3f} of {call.timeout} s")
            for invariant, destination, why, row in self._promises(call):
                listed = left.get(call.client.spec.name, {})
                if row in listed or (row is None and _stands_for(call, destination, listed.values())):
                    continue
                urls = [destination] if destination else [daemon.url for daemon in self.daemons]
                effects = [effect for url in urls for effect in applied[url, call.target]]
                if why == "acknowledged":
                    effects = [effect for effect in effects if effect.key == call.key]
                if not any(effect.begun >= call.begun for effect in effects):
                    where = destination or "any daemon"
                    self.broken(invariant, f"call {call.number} ({call.fate}, {why}) was never applied at {where}")

    def _promises(self, call: Call) -> Iterator[tuple[str, str, str, int | None]]:
        """List (invariant, destination, why, row) for what a call promised."""
        result, urls = call.result, [daemon.url for daemon in call.client.daemons]
        if result is not None and call.fate != "killed":
            if result.deliveries:
                for delivery in result.deliveries:
                    if delivery.status != "missed":
                        yield "kept", delivery.daemon, delivery.status, delivery.row
                acknowledged = sum(delivery.status == "acknowledged" for delivery in result.deliveries)
                needed = len(urls) if call.mode == "all" else len(urls) // 2 + 1
                if result.status == "busted" and acknowledged < needed:
                    self.broken("kept", f"call {call.number} is busted by {acknowledged} of {needed}")
                if result.status in {"partial", "deferred"}:
                    owed = {delivery.daemon for delivery in result.deliveries if delivery.status == "missed"}
                    for url in sorted(owed):
                        self.broken("kept", f"call {call.number} is {result.status}, and {url} is owed nothing")
            elif result.status == "busted":
                yield "kept", result.daemon or "", "acknowledged", None
            elif result.status == "deferred":
                yield "kept", ANY, "owed", result.rows[0]
        elif call.fate == "cancelled" and call.entered and call.client.store is not None and not self.disk_trouble:
            for destination in [ANY] if call.mode == "first" else urls:
                yield "stored", destination, "cancelled", None

    def _check_effects(self) -> None:
        keys = {call.key: call for call in self.calls}
        for daemon in self.daemons:
            last: dict[str, float] = {}
            for effect in daemon.effects:
                call = keys.get(effect.key)
                if call is None or call.target != effect.target:
                    self.broken("once", f"{daemon.url} applied something under the key {effect.key!r} of no such call")
                elif effect.key in last and effect.begun - last[effect.key] < _WINDOW:
                    self.broken("once", f"{daemon.url} applied call {call.number} twice")
                last[effect.key] = effect.begun

    def _check_backoff(self) -> None:
        """See that one daemon's retries wait between 0 and their ceiling, and that they are spread over that."""
        places: list[float] = []
        for client in [*self.past, *self.clients.values()]:
            retry = client.spec.retry
            if len(client.daemons) > 1 or retry is None or client.store is not None:
                continue  # with others, or out of an outbox, a retry may come later for another reason
            for attempts in client.wire.attempts.values():
                for failures, (one, following) in enumerate(pairwise(attempts), start=1):
                    if one.fault is None or one.fault.kind is FaultKind.THROTTLED:
                        continue
                    most = ceiling(failures, retry.base, retry.cap)
                    gap = following.boarded - one.ended
                    places.append(gap / most)
                    if gap > most + 0.005:
                        self.broken("backoff", f"a retry waited {gap:.3f} of at most {most:.3f} s")
        if len(places) >= 30 and not 0.25 < sum(places) / len(places) < 0.75:
            self.broken("backoff", f"retries wait {sum(places) / len(places):.0%} of their ceilings on the average")

    def _check_tidy(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            self.broken("tidy", f"{len(others)} tasks are left: {min(map(repr, others))}")
        for client in [*self.past, *self.clients.values()]:
            for slot in client.wire.slots.values():
                if slot._value != _SLOTS:
                    self.broken("tidy", f"{client.name} holds {_SLOTS - slot._value} slots")
            for daemon in client.fleet._daemons:
                if daemon.flights or daemon.circuit._trials or daemon.claimed > self.loop.time():
                    self.broken("tidy", f"{client.name} holds a flight, a trial or a claim of {daemon.url}")


def _stands_for(call: Call, destination: str, listed: Iterable[OutboxRow]) -> bool:
    """Tell whether a cancelled bust is among the rows that are listed: nobody knows its row's number."""
    return call.fate == "cancelled" and any(
        row.destination == destination and row.bust.target == call.target and row.joined >= _EPOCH + call.begun
        for row in listed
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker busts: one target every so many seconds, some of them hot, until a time."""

    until: float
    every: float
    hot: int = 5
    heat: float = 0.3
    timeouts: Sequence[float] = (5.0,)
    modes: Sequence[DeliveryMode] = ("first",)
    cancelled: float = 0.0
    write_ahead: float = 0.0


# What goes wrong, and when

_TROUBLES: Final = (
    *("down", "restart", "reset_before", "reset_after", "black_hole", "silent", "stall", "slow", "error"),
    *("proxy_error", "unavailable", "throttle", "half", "flap", "cut"),
)
_REFUSALS: Final = ("rejects", "token")


async def _trouble(world: World, daemon: SimDaemon, kind: str, seconds: float) -> None:
    """Let one thing go wrong with a daemon for a while."""
    random, end = world.random, world.loop.time() + seconds
    if kind == "cut":
        pairs = {(name, daemon.url) for name in world.clients if random.random() < 0.6}
        world.cut |= pairs
        await asyncio.sleep(seconds)
        world.cut -= pairs
    elif kind == "flap":
        while world.loop.time() < end:
            daemon.change(random.choice(["down", "black_hole"]))
            await asyncio.sleep(random.uniform(0.2, 3.0))
            daemon.change("fine")
            await asyncio.sleep(random.uniform(0.2, 3.0))
    else:
        daemon.change(kind)
        await asyncio.sleep(min(seconds, random.uniform(0.1, 2.0)) if kind == "restart" else seconds)
        daemon.change("fine")


async def _daemon_troubles(world: World, daemon: SimDaemon, until: float, kinds: Sequence[str], calm: float) -> None:
    random = world.random
    while world.loop.time() < until:
        await asyncio.sleep(random.expovariate(1 / calm))
        await _trouble(world, daemon, random.choice(kinds), random.choice([0.3, 2.0, 5.0, until / 4]))


async def _client_troubles(world: World, name: str, until: float, kills: float) -> None:
    """Kill a client now and then and start it again; fill its disk, make it slow."""
    random = world.random
    while world.loop.time() < until:
        await asyncio.sleep(random.uniform(0.1, until / 2))
        client, what = world.clients[name], random.random()
        if what < kills:
            await client.kill()
            await asyncio.sleep(random.choice([0.0, 1.0, 10.0]))
            # Sometimes it comes back with other settings: what is owed to a daemon it does not name is kept and listed.
            fewer = random.random() < 0.2 and client.spec.daemons > 1
            world.start(replace(client.spec, daemons=client.spec.daemons - fewer))
        elif what < kills + 0.1 and client.store is not None:
            world.disk_trouble = client.disk_full = True
            await asyncio.sleep(random.uniform(0.1, 5.0))
            client.disk_full = False
        elif what < kills + 0.25:
            client.disk.delay = random.choice([0.005, 0.03, 1.0])
            world.disk_trouble |= client.disk.delay > 0.1
            await asyncio.sleep(random.uniform(0.1, 5.0))
            client.disk.delay = 0.0


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for tasks, and let their errors out."""
    if tasks:
        await asyncio.gather(*tasks)


# Families of scenarios


async def _chaos(
    world: World,
    *,
    modes: Sequence[Sequence[DeliveryMode]] = (("first",),),
    heat: float = 0.2,
    kinds: Sequence[str] = _TROUBLES,
    calm: float = 3.0,
    kills: float = 0.4,
    outbox: float = 0.8,
    least: int = 1,
) -> None:
    """Anything: 1 to 5 daemons, 1 to 3 clients, all kinds of troubles."""
    random = world.random
    seconds = random.choice([10.0, 10.0, 15.0, 15.0, 30.0, 30.0, 60.0, 600.0 if random.random() < 0.2 else 20.0])
    world.make_daemons(random.choice([least, max(least, 2), 3, 3, 3, 5]))
    shared = random.random() < 0.3
    settings = {"lease": random.choice([5.0, 30.0]), "age": random.choice([20.0, 86_400.0, 86_400.0, 86_400.0])}
    tasks: list[asyncio.Task[None]] = []
    for index in range(random.choice([1, 1, 2, 3])):
        policies = _DEFAULTS
        if random.random() < 0.3:
            policies = Policies(
                hedge=random.choice([None, Hedge(samples=20)]),
                breaker=random.choice([None, Breaker(incidents=3, open=1.0)]),
                budget=Budget(),
                probes=random.choice([None, Probes()]),
                failback=random.choice([None, Failback(hold=2, spread=2, ramp=4)]),
            )
        kept = random.random() < outbox
        spec = ClientSpec(
            name=f"client-{index}",
            daemons=len(world.daemons),
            policies=policies,
            outbox=world.outbox("shared" if shared else f"client-{index}", **settings) if kept else None,
            retry=random.choice([Retry(), Retry(), None]),
        )
        world.start(spec)
        workers = random.choice([1, 1, 5, 20, 50])
        calls = random.choice([10, 40, 80])
        work = Work(
            until=seconds,
            every=seconds * workers / calls,
            heat=heat,
            timeouts=random.choice([(5.0,), (5.0,), (0.3, 5.0), (1.0, 2.0, 10.0)]),
            modes=random.choice(modes),
            cancelled=random.choice([0.0, 0.0, 0.2]),
            write_ahead=random.choice([0.0, 0.0, 0.3]),
        )
        for number in range(workers):
            task = world.loop.create_task(world.work(spec.name, work, Random(f"{world.seed}:{index}:{number}")))
            tasks.append(task)
        if kills and random.random() < 0.5:
            tasks.append(world.loop.create_task(_client_troubles(world, spec.name, seconds, kills)))
    choice = random.sample(kinds, k=min(len(kinds), random.choice([1, 2, len(kinds)])))
    if random.random() < 0.1:
        choice += _REFUSALS
    tasks += [
        world.loop.create_task(_daemon_troubles(world, daemon, seconds, choice, calm))
        for daemon in world.daemons
        if random.random() < 0.8
    ]
    await _all(tasks)
    await world.finish()


async def _replay(world: World) -> None:
    """Hot targets, long outages, processes that die: what the outbox is for."""
    kinds = ("down", "silent", "silent", "stall", "reset_after", "black_hole", "unavailable")
    await _chaos(world, heat=0.9, kinds=kinds, calm=1.0, outbox=1.0)


async def _silence(world: World) -> None:
    """A few targets again and again, while a daemon does some of the busts and tells nobody."""
    random = world.random
    world.make_daemons(random.choice([1, 1, 2]), latency=0.004)
    outbox = world.outbox("client", lease=5.0)
    world.start(ClientSpec(name="client", daemons=len(world.daemons), outbox=outbox))
    work = Work(until=20.0, every=1.0, hot=12, heat=1.0, timeouts=(0.5, 1.0), cancelled=random.choice([0.0, 0.2]))
    workers = [
        world.loop.create_task(world.work("client", work, Random(f"{world.seed}:{number}"))) for number in range(4)
    ]
    if random.random() < 0.5:
        workers.append(world.loop.create_task(_client_troubles(world, "client", 20.0, 0.8)))
    while world.loop.time() < 20.0:
        for daemon in world.daemons:
            daemon.change(random.choice(["silent", "silent", "half", "down", "stall", "fine"]))
        await asyncio.sleep(random.uniform(0.5, 4.0))
    await _all(workers)
    await world.finish()


async def _delivery(world: World) -> None:
    """Independent daemons: quorum and all."""
    modes: tuple[tuple[DeliveryMode, ...], ...] = (("all",), ("quorum",), ("all", "quorum", "first"))
    await _chaos(world, modes=modes, heat=0.5, least=2, calm=4.0)


async def _pour(world: World, client: Client, rate: float, until: float, timeout: float = 2.0) -> None:
    """Begin calls at a steady rate, whatever becomes of them."""
    tasks: list[tuple[Call, asyncio.Task[None]]] = []
    random = Random(f"{world.seed}:pour")
    while world.loop.time() < until:
        call = world.call(client, f"key-of-{random.random()}", timeout=timeout)
        tasks.append((call, client.run(call)))
        await asyncio.sleep(random.uniform(0.5, 1.5) / rate)
    for call, task in tasks:
        await asyncio.wait([task])
        world.check_ended(call, task)


def _loads(world: World, since: float, until: float) -> dict[str, float]:
    """Tell how many requests each daemon got for each call in that time."""
    calls = sum(since <= call.begun < until for call in world.calls)
    return {daemon.url: sum(since <= at < until for at in daemon.arrivals) / calls for daemon in world.daemons}


async def _outage(world: World, *, weather: Sequence[str] = ("down", "error", "reset_before", "black_hole")) -> None:
    """At least 100 calls a second, and every daemon fails: 10 s later nobody gets more than 1.15 requests a call."""
    random = world.random
    world.make_daemons(random.choice([1, 1, 1, 2, 3]), latency=0.002)
    # Without a breaker the budget alone bounds the load.
    policies = random.choice([_DEFAULTS, *[Policies(budget=Budget(), hedge=Hedge())] * 2])
    client = world.start(ClientSpec(name="client", daemons=len(world.daemons), policies=policies))
    kind = random.choice(weather)
    for daemon in world.daemons:
        world.loop.call_later(1.0, daemon.change, kind)
    await _pour(world, client, 110.0, 16.0, timeout=1.0)
    for url, load in _loads(world, 11.0, 16.0).items():
        if load > 1.15:
            world.broken("load", f"{url} got {load:.2f} requests a call while all were {kind}")
    await world.finish()


async def _half(world: World) -> None:
    """The same while half of the requests fail."""
    await _outage(world, weather=("half",))


async def _hedging(world: World) -> None:
    """Hedges add at most 5.5 %, while all is well and after the daemon became three times slower."""
    random = world.random
    world.make_daemons(random.choice([2, 3]), latency=random.choice([0.005, 0.02]))
    client = world.start(ClientSpec(name="client", daemons=len(world.daemons)))
    slow = random.random() < 0.7
    if slow:
        world.loop.call_later(8.0, lambda: world.daemons[0].change("slow"))
    await _pour(world, client, 100.0, 18.0)
    for since, until in ((0.0, 8.0), (8.0, 18.0)):
        load = sum(_loads(world, since, until).values())
        if load > 1.055:
            world.broken("hedging", f"{load - 1:.1%} more requests than calls, {'slow' if slow else 'normal'}")
    await world.finish()


async def _recovery(world: World) -> None:
    """A hub that failed, was busy, and is well again serves again, with its breaker closed."""
    random = world.random
    world.make_daemons(random.choice([2, 3]), latency=0.004)
    policies = Policies(
        hedge=Hedge(),
        breaker=Breaker(open=1.0, cap=4.0),
        budget=Budget(),
        probes=random.choice([Probes(hub=1.0), None]),
        failback=Failback(hold=1, spread=1, ramp=3),
    )
    client = world.start(ClientSpec(name="client", daemons=len(world.daemons), policies=policies))
    hub = world.daemons[0]
    work = Work(until=150.0, every=0.25, cancelled=random.choice([0.0, 0.2]))
    worker = world.loop.create_task(world.work("client", work, Random(world.seed)))
    await asyncio.sleep(2.0)
    for weather in (*random.choices(("down", "error", "black_hole", "half"), k=2), "unavailable"):
        hub.change(weather)
        await asyncio.sleep(random.uniform(5.0, 12.0))
    hub.change("fine")
    while not worker.done() and (client.fleet.view(world.loop.time()).daemons[0].breaker != "closed"):
        await asyncio.sleep(0.5)
    waited = world.loop.time() - hub.well_since
    if waited > 60.0:
        world.broken("recovery", f"the hub's breaker was not closed again within {waited:.0f} s")
    worker.cancel()
    await asyncio.wait([worker])
    await world.finish()


async def _lone(world: World) -> None:
    """The only daemon fails for long, and is used at once when it is well again."""
    random = world.random
    world.make_daemons(1, latency=0.004)
    policies = replace(_DEFAULTS, probes=random.choice([Probes(), None]))
    client = world.start(ClientSpec(name="client", daemons=1, policies=policies))
    daemon = world.daemons[0]
    down = random.uniform(15.0, 90.0)
    worker = world.loop.create_task(
        world.work("client", Work(until=down + 40.0, every=0.2, timeouts=(2.0,)), Random(world.seed))
    )
    await asyncio.sleep(1.0)
    daemon.change(random.choice(["down", "error", "reset_before"]))
    await asyncio.sleep(down)
    daemon.change("fine")
    await asyncio.wait([worker])
    after = [call.ended for call in world.calls if call.begun > daemon.well_since and call.fate == "busted"]
    first = min(after, default=world.loop.time()) - daemon.well_since
    if first > 4.0:
        world.broken("recovery", f"the only daemon was refused for {first:.1f} s after it was well again")
    if client.fleet.view(world.loop.time()).daemons[0].breaker != "closed":
        world.broken("recovery", "the only daemon's breaker is not closed 39 s after it was well again")
    await world.finish()


async def _failover(world: World) -> None:
    """A lone caller, without samples, whose hub is killed or a black hole, before its call or under it."""
    random = world.random
    world.make_daemons(random.choice([2, 3, 5]))
    client = world.start(ClientSpec(name="client", daemons=len(world.daemons)))
    if random.random() < 0.5:
        await client.run(world.call(client, "warm"))
    weather, most = random.choice([("down", 1.5), ("silent", 3.0), ("black_hole", 3.0), ("stall", 3.0)])
    call = world.call(client, "lone")
    if random.random() < 0.5:
        world.daemons[0].change(weather)
        task = client.run(call)
    else:
        task = client.run(call)
        await asyncio.sleep(random.random() * 0.004)
        world.daemons[0].change(weather)
    await asyncio.wait([task])
    world.check_ended(call, task)
    if call.fate != "busted" or call.ended - call.begun > most:
        world.broken("failover", f"hub {weather}: the call is {call.fate} after {call.ended - call.begun:.2f} s")
    await world.finish()


async def _burst(world: World) -> None:
    """Fifty calls are under way when every connection breaks: one incident, and no breaker opens."""
    random = world.random
    world.make_daemons(random.choice([1, 1, 2]), latency=0.02)
    outbox = world.outbox("burst") if random.random() < 0.5 else None
    client = world.start(ClientSpec(name="client", daemons=len(world.daemons), outbox=outbox))
    calls = [world.call(client, f"key-{index}") for index in range(50)]
    tasks = [client.run(call) for call in calls]
    await asyncio.sleep(random.uniform(0.001, 0.01))
    for daemon in world.daemons:
        daemon.change("restart")
        daemon.change("fine")
    await asyncio.wait(tasks)
    for call, task in zip(calls, tasks, strict=True):
        world.check_ended(call, task)
    opened = [event for _, event in client.moves if isinstance(event, BreakerMoved)]
    if opened:
        world.broken("burst", f"one moment of broken connections moved a breaker: {opened[0]}")
    await world.finish()


async def _flapping(world: World) -> None:
    """A hub that is up for 10 s and down for 10 s, for 10 minutes."""
    random = world.random
    world.make_daemons(random.choice([2, 3]), latency=0.004)
    client = world.start(ClientSpec(name="client", daemons=len(world.daemons)))
    work = Work(until=600.0, every=2.0, heat=0.0)
    worker = world.loop.create_task(world.work("client", work, Random(world.seed)))
    kind = random.choice(["down", "black_hole", "error"])
    while world.loop.time() < 600.0:
        world.daemons[0].change("fine")
        await asyncio.sleep(10.0)
        world.daemons[0].change(kind)
        await asyncio.sleep(10.0)
    switches = [event for _, event in client.moves if isinstance(event, FailedOver | FailedBack)]
    if len(switches) > 2:
        world.broken("flapping", f"{len(switches)} switches while the hub was flapping ({kind})")
    await asyncio.wait([worker])
    await world.finish()


async def _herd(world: World) -> None:
    """The hub of a thousand clients is down for a minute and comes back: they do not return together."""
    random, number = world.random, 1000
    first_back: dict[int, float] = {}
    clock = [0.0]

    def take(index: int, event: Event) -> None:
        if isinstance(event, FailedBack):
            first_back.setdefault(index, clock[0])

    urls = [f"http://daemon-{index}.test:8989" for index in range(3)]
    fleets = [
        Fleet(urls, _DEFAULTS, client_id=f"client-{index}", now=0.0, random=random.random, emit=partial(take, index))
        for index in range(number)
    ]
    due = [(fleet.next_probe(), index) for index, fleet in enumerate(fleets)]
    heapq.heapify(due)
    gone, again = 10.0, 10.0 + random.uniform(20.0, 60.0)
    missed = Fault(FaultKind.UNREACHABLE, urls[0], "refused", "no")
    while due and due[0][0] < again + 150.0:
        now, index = due[0]
        clock[0], fleet = now, fleets[index]
        for daemon in fleet.take_probes(now):
            fleet.probed(daemon, missed if daemon == 0 and gone <= now < again else None, now)
        heapq.heapreplace(due, (max(fleet.next_probe(), now + 0.001), index))
    back = sorted(first_back.values())
    seconds = Counter(int(at) for at in back)
    busiest = max(seconds.values(), default=number)
    if len(back) < number:
        world.broken("failback", f"{number - len(back)} of {number} clients have not returned")
    if busiest > number * 0.05:
        world.broken("failback", f"{busiest} of {number} clients returned in one second")
    world.note("herd", [round(at, 6) for at in back])


FAMILIES: Final[dict[str, tuple[Callable[[World], Any], int]]] = {
    "chaos": (_chaos, 70),
    "replay": (_replay, 25),
    "silence": (_silence, 15),
    "delivery": (_delivery, 30),
    "failover": (_failover, 18),
    "recovery": (_recovery, 10),
    "lone": (_lone, 10),
    "burst": (_burst, 12),
    "outage": (_outage, 3),
    "half": (_half, 3),
    "hedging": (_hedging, 2),
    "flapping": (_flapping, 1),
    "herd": (_herd, 1),
}
"""The families of scenarios, and how many of each are among 200 seeds that follow one another."""

_DECK: Final = [name for name, (_, share) in FAMILIES.items() for _ in range(share)]


def family_of(seed: int) -> str:
    """Tell the family that a seed belongs to."""
    return _DECK[seed * 73 % len(_DECK)]


def run_scenario(seed: int, family: str | None = None) -> Report:
    """Run the scenario of a seed, in its own family or in that one, and check it."""
    name = family or family_of(seed)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None

    async def scenario(directory: Path) -> Report:
        world = World(seed, directory)
        failures: list[dict[str, Any]] = []
        world.loop.set_exception_handler(lambda _, context: failures.append(context))
        await FAMILIES[name][0](world)
        for context in failures:
            world.broken("error", f"the event loop was told: {context.get('exception') or context['message']!r}")
        statuses = Counter(call.fate for call in world.calls)
        violations = tuple(world.violations)
        return Report(seed, name, violations, world.trace, len(world.calls), dict(statuses), world.loop.time())

    with tempfile.TemporaryDirectory(prefix="bustcall-simulator-", dir=memory) as directory:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(scenario(Path(directory)))


# The command


def _quiet() -> None:
    logging.getLogger("pybustcall").setLevel(logging.CRITICAL + 1)


def _run_one(task: tuple[int, str | None]) -> Report:
    seed, family = task
    try:
        return run_scenario(seed, family)
    except Exception:  # noqa: BLE001 - whatever goes wrong is a finding, and the others go on
        text = Violation("error", traceback.format_exc())
        return Report(seed, family or family_of(seed), (text,), "", 0, {}, 0.0)


def _reports(seeds: Sequence[int], family: str | None, jobs: int) -> Iterator[Report]:
    tasks = [(seed, family) for seed in seeds]
    if jobs == 1:
        logger = logging.getLogger("pybustcall")
        before = logger.level
        _quiet()
        try:
            yield from map(_run_one, tasks)
        finally:
            logger.setLevel(before)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_quiet) as pool:
        yield from pool.imap(_run_one, tasks, chunksize=10)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run scenarios, print what held; return 1 if anything did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description="Simulate delivery.")
    parser.add_argument("--scenarios", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; alone, the only one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--family", choices=sorted(FAMILIES), help="only scenarios of this family")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    failed: list[Report] = []
    broken: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    virtual = 0.0
    for report in _reports(range(options.seed, options.seed + options.scenarios), options.family, options.jobs):
        runs[report.family] += 1
        statuses.update(report.statuses)
        virtual += report.virtual
        broken.update({violation.invariant for violation in report.violations})
        if report.violations:
            failed.append(report)
    out = sys.stdout
    out.write(f"{sum(runs.values())} scenarios, {sum(statuses.values())} calls, {virtual / 3600:.1f} virtual hours ")
    out.write(f"in {time.monotonic() - begun:.0f} s\n")
    out.write("  ".join(f"{name} {number}" for name, number in sorted(runs.items())) + "\n")
    out.write("  ".join(f"{name} {number}" for name, number in sorted(statuses.items())) + "\n\n")
    for name, text in INVARIANTS.items():
        out.write(f"{broken[name]:>6} broken  {name:<9} {text}\n")
    for report in failed[:10]:
        out.write(f"\nseed {report.seed} ({report.family}):\n")
        out.writelines(f"  {violation.invariant}: {violation.text}\n" for violation in report.violations[:5])
    if failed:
        first = failed[0]
        out.write(f"\nfailing seeds: {' '.join(str(report.seed) for report in failed[:100])}\n")
        out.write(
            f"\n{len(failed)} scenarios failed; the first again: "
            f"python -m tests.simulator --scenarios 1 --jobs 1 --seed {first.seed} --family {first.family}\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
