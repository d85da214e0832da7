"""The life of a bust: answered when, retried where, settled, cancelled, and taken up after a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pybustcall.daemon import BackendFailure, Engine, Indexes, Jobs, Journal, Layer, MemoryBackend, RefusedKey
from pybustcall.daemon.backends import NO_KEYS, Scope, Traits
from pybustcall.daemon.jobs import Answer, BustCancelled, BustFailed, NoSuchJob, pause_before
from pybustcall.daemon.journal import Wish
from pybustcall.models import DEFAULT_NAMESPACE
from tests.conftest import eventually


class Layered:
    """A cache of its own entries that can be away, stuck, slow, or refuse a key; it remembers each begin."""

    def __init__(self, name: str, log: list[str], **traits: Any) -> None:
        self.name = name
        self.entries = Indexes()
        self.inner = MemoryBackend(self.entries)
        self.traits = Traits(**{"soft": True, **traits})
        self.log = log
        self.failure: Exception | None = None
        self.passing, self.widening = asyncio.Event(), asyncio.Event()
        self.passing.set()
        self.widening.set()

    def put(self, *keys: str, tags: Sequence[str] = ()) -> None:
        for key in keys:
            self.entries.of(DEFAULT_NAMESPACE).add(key, tags=tags)

    @property
    def keys(self) -> list[str]:
        return list(self.entries.of(DEFAULT_NAMESPACE))

    def check(self, namespace: str, key: str) -> None: ...

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def check_ready(self) -> None: ...

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        self.log.append(f"{self.name} {scope.target}")
        if self.failure is not None:
            raise self.failure
        return await self.inner.begin(scope, soft=soft, wide=wide)

    async def fence(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> None: ...

    async def end(
        self, scope: Scope, generation: int, *, named: bool = True, keys: Mapping[str, int] = NO_KEYS
    ) -> None:
        self.log.append(f"{self.name} end")

    async def select(self, scope: Scope) -> AsyncGenerator[Sequence[str], None]:
        async for batch in self.inner.select(scope):
            yield batch

    async def estimate(self, scope: Scope) -> int | None:
        return await self.inner.estimate(scope)

    async def variants(self, namespace: str, keys: Sequence[str]) -> list[str]:
        await self.widening.wait()
        return await self.inner.variants(namespace, keys)

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        await self.passing.wait()
        return await self.inner.remove(namespace, keys, generation=generation, soft=soft)

    async def held(
        self, namespace: str, keys: Sequence[str], *, generation: int | None = None, stale: bool = False
    ) -> list[str]:
        if self.failure is not None:
            raise self.failure
        return await self.inner.held(namespace, keys, generation=generation, stale=stale)

    async def size_bytes(self) -> int:
        return 0


AWAY = BackendFailure("no route to the cache", unreachable=True)
STUCK = BackendFailure("that key is stuck")


class House:
    """Jobs over an inner and an outer layer."""

    def __init__(self, path: Path | None, *, settle: float = 0, outer_settle: float = 0, **more: Any) -> None:
        self.log: list[str] = []
        self.steps: list[str] = []
        self.inner = Layered("inner", self.log)
        self.outer = Layered("outer", self.log)
        layers = [
            Layer(name="inner", number=0, backend=self.inner, settle=settle),
            Layer(name="outer", number=1, backend=self.outer, settle=outer_settle),
        ]
        self.journal = Journal(path)
        settings = {"pause": lambda _: 0.001, "daemon": "here", "step": self.steps.append, **more}
        save = settings.pop("save", None)
        self.jobs = Jobs(Engine(layers, Indexes()), self.journal, **settings)
        self.jobs.save = save

    async def bust(self, target: str = "a", **more: Any) -> Answer:
        who = {name: more.pop(name) for name in ("who", "binding", "reason", "within") if name in more}
        return await self.jobs.bust(wish(target, **more), **who)

    async def state(self, answer: Answer) -> str:
        return (await self.jobs.find(answer.entry.job))[0].state

    async def over(self, answer: Answer) -> None:
        await eventually(lambda: answer.entry.job not in self.jobs._runs, "the bust is over")


def wish(target: str = "a", strategy: str = "dimensional", **more: Any) -> Wish:
    return Wish(**{"namespace": DEFAULT_NAMESPACE, "kind": "key", "target": target, "strategy": strategy, **more})


@asynccontextmanager
async def house(path: Path | None = None, **more: Any) -> AsyncIterator[House]:
    it = House(path, **more)
    await it.jobs.open()
    try:
        yield it
    finally:
        await it.jobs.close()
        await it.jobs.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


# Answering


@pytest.mark.parametrize("durable", [True, False])
async def test_a_bust_goes_inside_out_and_is_answered_when_it_is_done(path: Path, durable: bool) -> None:
    """And stands in the audit, with who, why, through which daemon, and its effect."""
    async with house(path if durable else None) as it:
        it.inner.put("a", "a.gz", "b")
        it.outer.put("a")
        answer = await it.bust(who="token", binding="go", reason="a price has changed")
        assert (answer.accepted, answer.entry.removed, answer.entry.state) == (False, 3, "done")
        assert it.log == ["inner a", "inner end", "outer a", "outer end"]
        assert [(layer.name, layer.ok, layer.removed) for layer in answer.entry.layers] == [
            ("inner", True, 2),
            ("outer", True, 1),
        ]
        [(entry, _)] = await it.jobs.recent()
        assert entry == answer.entry
        assert (entry.who, entry.binding, entry.reason, entry.daemon) == (
            "token", "go", "a price has changed", "here",
        )  # fmt: skip
        assert entry.ended is not None
        assert it.steps == ["journaled", "applied", "over"]


async def test_what_cannot_be_done_is_refused_and_not_written_down(path: Path) -> None:
    """Before anything is removed."""
    async with house(path) as it:
        with pytest.raises(ValueError, match="strategy"):
            await it.bust(strategy="sideways")
        assert await it.jobs.recent() == []


async def test_a_hybrid_bust_is_answered_after_its_direct_part(path: Path) -> None:
    """The rest is a job."""
    async with house(path) as it:
        it.inner.put("a", "a.gz")
        it.inner.widening.clear()
        answer = await it.bust(strategy="hybrid")
        assert (answer.accepted, answer.entry.removed) == (True, 1)
        it.inner.widening.set()
        await it.over(answer)
        assert it.inner.keys == []
        entry, _ = await it.jobs.find(answer.entry.job)
        assert (entry.state, entry.removed) == ("done", 2)


async def test_without_a_lasting_journal_hybrid_ends_before_its_answer() -> None:
    """Nobody could keep the promise."""
    async with house() as it:
        it.inner.put("a", "a.gz")
        answer = await it.bust(strategy="hybrid")
        assert (answer.accepted, answer.entry.removed, answer.entry.state) == (False, 2, "done")


async def test_what_takes_long_is_answered_as_a_job_and_its_progress_told(path: Path) -> None:
    """When the time to answer is over."""
    async with house(path, answer_within=0.01) as it:
        it.inner.put("p/1", "p/2")
        it.inner.passing.clear()
        answer = await it.bust("p", kind="prefix")
        assert answer.accepted
        entry, progress = await it.jobs.find(answer.entry.job)
        assert (entry.state, progress.done, progress.total) == ("running", 0, 2)
        [(listed, same)] = await it.jobs.recent()
        assert (listed.job, same) == (entry.job, progress)
        it.inner.passing.set()
        await it.over(answer)
        assert await it.state(answer) == "done"


async def test_the_caller_says_how_long_it_can_wait(path: Path) -> None:
    """If that is less."""
    async with house(path, answer_within=60.0) as it:
        it.inner.passing.clear()
        it.inner.put("a")
        answer = await it.bust(within=0.01)
        assert answer.accepted
        it.inner.passing.set()
        await it.over(answer)


async def test_a_caller_that_goes_away_breaks_nothing_off(path: Path) -> None:
    """The bust goes on to its end."""
    async with house(path) as it:
        it.inner.put("a")
        it.inner.passing.clear()
        asking = asyncio.create_task(it.bust())
        await eventually(lambda: "inner a" in it.log)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        it.inner.passing.set()
        await eventually(lambda: "over" in it.steps)
        assert it.inner.keys == []


async def test_a_dry_run_tells_each_layers_number_and_removes_nothing(path: Path) -> None:
    """Nor is it in the audit; a layer that cannot tell is an error."""
    async with house(path) as it:
        it.inner.put("a", "a.gz")
        assert await it.jobs.count(wish()) == {"inner": 2, "outer": 0}
        assert it.inner.keys == ["a", "a.gz"]
        assert await it.jobs.recent() == []
        it.outer.failure = AWAY
        with pytest.raises(BustFailed, match="it cannot be counted: no route to the cache"):
            await it.jobs.count(wish())


async def test_only_a_single_layer_can_refuse_the_key_when_it_is_there(path: Path, monkeypatch: Any) -> None:
    """With several, it is just not held in that one."""

    async def refuse(*_args: Any, **_more: Any) -> int:
        raise RefusedKey("leads through a link")

    async with house(path) as it:
        it.outer.put("a")
        monkeypatch.setattr(it.inner, "remove", refuse)
        assert (await it.bust()).entry.removed == 1
        it.jobs.engine = Engine([Layer(name="inner", number=0, backend=it.inner)], Indexes())
        with pytest.raises(RefusedKey):
            await it.bust()
        assert [entry.state for entry, _ in await it.jobs.recent()] == ["failed", "done"]


# Failing


async def test_without_a_lasting_journal_a_failing_layer_is_an_error() -> None:
    """The others are busted all the same, and nothing is tried again."""
    async with house() as it:
        it.inner.failure = AWAY
        it.outer.put("a")
        with pytest.raises(BustFailed, match="no route to the cache") as caught:
            await it.bust()
        assert it.outer.keys == []
        assert caught.value.entry.state == "failed"
        it.inner.failure = None
        await it.bust()


async def test_a_layer_that_fails_is_named_retried_and_those_outside_of_it_busted_again(path: Path) -> None:
    """Since they may have been filled from it meanwhile."""
    async with house(path) as it:
        it.inner.failure = AWAY
        it.inner.put("a")
        it.outer.put("a")
        answer = await it.bust()
        assert answer.accepted
        assert it.outer.keys == []
        inner, outer = answer.entry.layers
        assert (inner.ok, inner.error) == (False, "no route to the cache")
        assert (inner.waits, outer.waits) == (None, True)
        assert (outer.ok, outer.error) == (True, None)  # it has not failed, and is busted again
        it.outer.put("a")  # refilled from the stale inner one
        it.inner.failure = None
        await it.over(answer)
        assert (it.inner.keys, it.outer.keys) == ([], [])
        entry, _ = await it.jobs.find(answer.entry.job)
        assert (entry.state, entry.removed) == ("done", 3)
        assert [(layer.ok, layer.waits) for layer in entry.layers] == [(True, None), (True, None)]


async def test_busts_queue_in_order_behind_a_layer_that_is_down(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are answered at once, not tried there one by one, and applied in their order when it is back."""
    caplog.set_level(logging.WARNING)
    rounds = asyncio.Event()
    async with house(path, pause=lambda _: 0.001 if rounds.is_set() else 3600.0) as it:
        it.inner.failure = AWAY
        answers = [await it.bust(str(number % 10)) for number in range(100)]
        assert all(answer.accepted for answer in answers)
        assert it.log.count("inner 0") == 1
        assert sum(line.startswith("inner") for line in it.log) == 1
        assert "waits until that layer is back" in str(answers[-1].entry.layers[0].error)
        assert repr(it.jobs) == "Jobs(100 under way, 100 waiting, down: inner)"
        assert caplog.text.count("the layer inner is down") == 1
        it.inner.failure = None
        it.log.clear()
        rounds.set()
        assert it.jobs._mending is not None
        it.jobs._mending.cancel()  # its pause of an hour
        it.jobs._mending = asyncio.create_task(it.jobs._mend())
        for answer in answers:
            await it.over(answer)
        assert [line for line in it.log if line.startswith("inner") and "end" not in line] == [
            f"inner {number % 10}" for number in range(100)
        ]
        assert [entry.state for entry, _ in await it.jobs.recent(limit=1000)] == ["done"] * 100
        await eventually(lambda: "the layer inner is back" in caplog.text)
        assert not (await it.bust()).accepted


async def test_what_was_made_of_the_old_value_while_a_bust_waited_goes_with_it(path: Path) -> None:
    """It was registered after the first attempt, which knew of other dependents; those go, too."""
    async with house(path, pause=lambda _: 0.05) as it:
        index = it.jobs.engine.indexes.of(DEFAULT_NAMESPACE)
        it.inner.put("a", "early", "late")
        index.add("early", ["a"])
        it.inner.failure = STUCK
        answer = await it.bust()
        index.remove("early")
        index.add("late", ["a"])
        it.inner.failure = None
        await it.over(answer)
        assert it.inner.keys == []


async def test_a_dry_run_does_not_wait_for_a_layer_that_is_known_to_be_down(path: Path) -> None:
    """It says at once that nothing can be counted there."""
    async with house(path, pause=lambda _: 60.0) as it:
        it.inner.failure = AWAY
        assert (await it.bust()).accepted
        it.inner.failure = AssertionError("it was asked")
        with pytest.raises(BustFailed, match=r"cannot be counted while the layer inner is down: no route"):
            await it.jobs.count(wish())


async def test_a_layer_that_stays_down_is_tried_once_a_round(path: Path) -> None:
    """By the first that needs it."""
    async with house(path) as it:
        it.inner.failure = AWAY
        answers = [await it.bust(str(number)) for number in range(5)]
        before = len([line for line in it.log if line == "inner 0"])
        await eventually(lambda: len([line for line in it.log if line == "inner 0"]) > before + 3)
        assert not any(line in it.log for line in ("inner 1", "inner 2", "inner 3", "inner 4"))
        it.inner.failure = None
        for answer in answers:
            await it.over(answer)


async def test_one_stuck_key_holds_up_no_other(path: Path) -> None:
    """It is retried by itself."""
    async with house(path) as it:
        it.inner.failure = STUCK
        stuck = await it.bust("stuck")
        assert stuck.accepted
        it.inner.failure = None
        assert not (await it.bust("b")).accepted
        await it.over(stuck)
        assert await it.state(stuck) == "done"


async def test_what_nobody_expected_counts_as_a_failure_of_the_layer(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged in full, told without its inner text, and retried."""
    async with house(path) as it:
        it.inner.failure = ZeroDivisionError("inner secret")
        answer = await it.bust()
        assert answer.entry.layers[0].error == "the daemon failed there; its log says why"
        assert "inner secret" in caplog.text
        it.inner.failure = None
        await it.over(answer)


async def test_verifying_makes_a_layer_fail_that_still_holds_it(path: Path, monkeypatch: Any) -> None:
    """Until it does not."""

    async def nothing(*_args: Any, **_more: Any) -> int:
        return 0

    async with house(path) as it:
        it.outer.put("a")
        with monkeypatch.context() as patched:
            patched.setattr(it.outer, "remove", nothing)
            answer = await it.bust(verify=True)
            assert "1 of what was to be removed is still held" in str(answer.entry.layers[1].error)
        await it.over(answer)
        assert it.outer.keys == []


def test_the_pause_doubles_to_half_a_minute() -> None:
    """From half a second."""
    assert [pause_before(attempt) for attempt in (0, 1, 2, 6, 100)] == [0.5, 1.0, 2.0, 30.0, 30.0]


# Settling


async def test_a_layer_that_needs_it_is_busted_a_second_time(path: Path) -> None:
    """What a late writer stored meanwhile goes, and what an outer layer was refilled with from there."""
    async with house(path, settle=0.01) as it:
        answer = await it.bust()
        assert (answer.accepted, answer.entry.state) == (False, "settling")
        assert [layer.settle for layer in answer.entry.layers] == [0.01, 0.01]
        it.inner.put("a")
        await it.over(answer)
        assert it.inner.keys == []
        assert it.log == ["inner a", "inner end", "outer a", "outer end"] * 2
        entry, _ = await it.jobs.find(answer.entry.job)
        assert (entry.state, entry.removed) == ("done", 1)


async def test_layers_settle_each_at_its_time(path: Path) -> None:
    """And those outside of them, too: what settles first does not wait for what settles last."""
    async with house(path, settle=0.03, outer_settle=0.01) as it:
        answer = await it.bust()
        assert [layer.settle for layer in answer.entry.layers] == [0.03, 0.03]
        await it.over(answer)
        assert it.log == [
            *("inner a", "inner end", "outer a", "outer end"),
            *("outer a", "outer end"),
            *("inner a", "inner end", "outer a", "outer end"),
        ]
        assert it.steps == ["journaled", "applied", "settled", "settled", "over"]


async def test_closing_does_all_second_busts_early_where_nobody_else_will() -> None:
    """One after another, however many are still to come."""
    async with house(settle=3600.0, outer_settle=1800.0) as it:
        await it.bust()
    assert it.steps == ["journaled", "applied", "settled", "settled", "over"]


async def test_what_these_layers_cannot_do_is_not_gone_on_with(path: Path) -> None:
    """A soft bust is not made a hard one by a restart with other layers: it has failed, and the audit says why."""
    async with house(path, pause=lambda _: 3600.0) as it:
        it.inner.failure = AWAY
        answer = await it.bust(soft=True)
    it = House(path)
    it.inner.traits = Traits(soft=False)
    await it.jobs.open()
    try:
        entry, _ = await it.jobs.find(answer.entry.job)
        assert (entry.state, it.log) == ("failed", [])
        assert "cannot mark entries as stale" in str(entry.layers[0].error)
    finally:
        await it.jobs.close()


async def test_a_cache_whose_own_client_was_cancelled_has_failed(path: Path) -> None:
    """It is tried again, as any failure: nobody has cancelled the bust."""
    async with house(path) as it:
        it.inner.failure = asyncio.CancelledError()  # type: ignore[assignment]
        answer = await it.bust()
        assert (answer.accepted, answer.entry.layers[0].error) == (True, "the daemon failed there; its log says why")
        it.inner.failure = None
        await it.over(answer)
        assert await it.state(answer) == "done"


async def test_what_fails_beside_the_layers_is_tried_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No bust is left behind by a mistake of ours; and one that all layers have done is done."""
    failures = [RuntimeError("odd")]

    class Groups:
        def __init__(self, groups: Any) -> None:
            self.groups = groups

        def __iter__(self) -> Any:
            if failures:
                raise failures.pop()
            return iter(self.groups)

    async def save() -> None:
        if failures:
            raise failures.pop()

    async with house(path, save=save) as it:
        assert (await it.bust()).entry.state == "done"
        assert caplog.text.count("unexpected error while busting") == 1
        failures.append(RuntimeError("odder"))
        it.jobs.engine._groups = Groups(it.jobs.engine.groups)  # type: ignore[assignment]
        answer = await it.bust()
        assert (answer.accepted, it.log.count("inner a")) == (True, 1)
        await it.over(answer)
        assert (await it.state(answer), it.log.count("inner a")) == ("done", 2)


async def test_what_the_registry_lost_is_written_down_before_a_job_is_done(path: Path) -> None:
    """A job that goes on after its answer, too: else a killed daemon would come back with what was busted."""
    order: list[str] = []

    async def save() -> None:
        order.append("saved")

    async with house(path, answer_within=0.01, save=save) as it:
        it.jobs._step = order.append
        it.inner.put("a")
        it.inner.passing.clear()
        answer = await it.bust()
        assert order == ["journaled"]
        it.inner.passing.set()
        await it.over(answer)
        assert order == ["journaled", "saved", "applied", "over"]


async def test_the_registry_goes_last_and_only_once_the_others_are_done(path: Path) -> None:
    """It knows what belongs to the named; also after a restart."""
    indexes = Indexes()
    indexes.of(DEFAULT_NAMESPACE).add("page", ["a"])

    @asynccontextmanager
    async def with_registry() -> AsyncIterator[House]:
        it = House(path)
        registry = Layer(name="registry", number=-1, backend=MemoryBackend(indexes))
        it.jobs.engine = Engine([registry, *it.jobs.engine.layers], indexes)
        await it.jobs.open()
        try:
            yield it
        finally:
            await it.jobs.close()

    async with with_registry() as it:
        it.outer.failure = AWAY
        answer = await it.bust(strategy="hybrid")
        assert answer.accepted
        (registry,) = (layer for layer in answer.entry.layers if layer.name == "registry")
        assert (registry.ok, registry.waits) == (False, True)
        assert registry.error == "it will be busted once the layers that come before it are"
        assert len(indexes) == 1
    async with with_registry() as it:
        it.outer.put("page")
        await it.over(answer)
        assert (it.outer.keys, len(indexes)) == ([], 0)


async def test_a_job_that_is_cancelled_under_way_tells_what_it_did(path: Path) -> None:
    """And whoever waits for it is told that it was cancelled, not that it goes on."""
    async with house(path, answer_within=60.0) as it:
        it.inner.put("a")
        it.outer.put("a")
        it.outer.passing.clear()
        asking = asyncio.create_task(it.bust())
        await eventually(lambda: "outer a" in it.log)
        [(entry, _)] = await it.jobs.recent()
        assert entry.removed == 1
        assert (await it.jobs.find(entry.job))[0].removed == 1
        cancelled = await it.jobs.cancel(entry.job)
        assert (cancelled.state, cancelled.removed) == ("cancelled", 1)
        with pytest.raises(BustCancelled, match="what was removed by then stays removed"):
            await asking
        await it.journal.flush()
        assert (await it.jobs.find(entry.job))[0] == cancelled
        assert [(layer.name, layer.ok, layer.error) for layer in cancelled.layers] == [
            ("inner", True, None),
            ("outer", False, "it was cancelled by anonymous before it was done here"),
        ]


async def test_settling_is_off_by_request(path: Path) -> None:
    """With 0; and on for all layers with another number."""
    async with house(path, settle=0.01) as it:
        assert (await it.bust(settle=0.0)).entry.state == "done"
        it.log.clear()
        await it.over(await it.bust(settle=0.01))
        assert it.log.count("outer a") == 2


async def test_a_second_bust_that_fails_is_retried_too(path: Path) -> None:
    """The answer was given long before."""
    async with house(path, settle=0.01) as it:
        answer = await it.bust()
        it.inner.failure = AWAY
        await eventually(lambda: bool(it.jobs._queue))
        assert await it.state(answer) == "settling"
        it.inner.put("a")
        it.inner.failure = None
        await it.over(answer)
        assert it.inner.keys == []


async def test_at_the_end_a_second_bust_is_done_early_where_nobody_would_do_it_later() -> None:
    """Without a journal that lasts."""
    async with house(settle=3600.0) as it:
        assert (await it.bust()).entry.state == "settling"
        it.inner.put("a")
    assert it.inner.keys == []


# Cancelling


async def test_a_cancelled_job_stops_and_what_is_removed_stays_removed(path: Path) -> None:
    """A second time changes nothing; what is over stays as it is."""
    async with house(path, answer_within=0.01) as it:
        it.inner.put(*(f"p/{number}" for number in range(600)))
        it.inner.passing.clear()
        answer = await it.bust("p", kind="prefix")
        cancelled = await it.jobs.cancel(answer.entry.job)
        assert cancelled.state == "cancelled"
        assert cancelled.ended is not None
        it.inner.passing.set()
        assert await it.jobs.cancel(answer.entry.job) == cancelled
        assert it.log == ["inner p", "inner end"]
        assert len(it.inner.keys) == 600
        done = await it.bust("b")
        assert (await it.jobs.cancel(done.entry.job)).state == "done"


@pytest.mark.parametrize("waiting", ["settle", "queue"])
async def test_a_job_that_waits_can_be_cancelled(path: Path, waiting: str) -> None:
    """For its second bust, or for a layer."""
    async with house(path, settle=3600.0 if waiting == "settle" else 0, pause=lambda _: 3600.0) as it:
        it.inner.failure = AWAY if waiting == "queue" else None
        answer = await it.bust()
        assert (await it.jobs.cancel(answer.entry.job)).state == "cancelled"
        assert it.jobs._queue == {}
    async with house(path) as it:
        assert it.jobs._runs == {}


async def test_a_job_that_is_being_tried_again_is_running(path: Path) -> None:
    """It waits only while nobody is at it."""
    async with house(path) as it:
        it.inner.put("a")
        it.inner.failure = STUCK
        answer = await it.bust()
        assert answer.entry.state == "waiting"
        it.inner.failure = None
        it.inner.passing.clear()
        await eventually(lambda: it.log.count("inner a") >= 2, "it is tried again")
        assert await it.state(answer) == "running"
        assert (await it.jobs.recent())[0][0].state == "running"
        it.inner.passing.set()
        await it.over(answer)
        assert await it.state(answer) == "done"


async def test_a_cancelled_job_is_written_down_before_that_is_said(path: Path) -> None:
    """Or a restart would go on with what somebody was told to be cancelled."""
    async with house(path, pause=lambda _: 60.0) as it:
        it.inner.failure = AWAY
        answer = await it.bust()
        await it.jobs.cancel(answer.entry.job)
        assert not it.journal._unwritten


async def test_the_audit_says_who_cancelled_a_job(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the place of whatever it waited for."""
    caplog.set_level(logging.INFO)
    async with house(path, pause=lambda _: 60.0) as it:
        it.inner.failure = AWAY
        answer = await it.bust(who="token")
        await it.jobs.cancel(answer.entry.job, who="operator")
        entry, _ = await it.jobs.find(answer.entry.job)
        assert {layer.error for layer in entry.layers} == {"it was cancelled by operator before it was done here"}
        assert f"the job {answer.entry.job} was cancelled by operator" in caplog.text


async def test_a_job_that_nobody_knows_is_no_job(path: Path) -> None:
    """Neither to be found, nor to be cancelled, nor to page by."""
    async with house(path) as it:
        for asking in (it.jobs.find("x"), it.jobs.cancel("x"), it.jobs.recent(before="x")):
            with pytest.raises(NoSuchJob):
                await asking


async def test_busts_are_listed_the_newest_first_in_pages_and_by_state(path: Path) -> None:
    """As many as are asked for."""
    async with house(path) as it:
        jobs = [(await it.bust(str(number))).entry.job for number in range(5)]
        assert [entry.job for entry, _ in await it.jobs.recent(limit=2)] == [jobs[4], jobs[3]]
        assert [entry.job for entry, _ in await it.jobs.recent(before=jobs[3], limit=9)] == jobs[2::-1]
        assert await it.jobs.recent(state="waiting") == []


# Restarting


@pytest.mark.parametrize("state", ["queue", "settle"])
async def test_a_restart_takes_up_what_was_not_done(path: Path, state: str) -> None:
    """And does it: at once what waited, after its time what was to settle."""
    async with house(path, settle=3600.0 if state == "settle" else 0, pause=lambda _: 3600.0) as it:
        it.inner.failure = AWAY if state == "queue" else None
        answer = await it.bust()
    async with house(path, settle=0.01 if state == "settle" else 0, pause=lambda _: 3600.0) as it:
        it.inner.put("a")
        await it.over(answer)
        assert it.inner.keys == []
        [(entry, _)] = await it.jobs.recent()
        assert (entry.job, entry.state) == (answer.entry.job, "done")


async def test_what_was_to_settle_is_done_if_no_layer_settles_any_more(path: Path) -> None:
    """The configuration may have changed."""
    async with house(path, settle=3600.0) as it:
        await it.bust()
    async with house(path) as it:
        assert [entry.state for entry, _ in await it.jobs.recent()] == ["done"]


async def test_a_journal_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path) -> None:
    """Neither layers nor tasks."""
    with pytest.raises(Exception, match="not a regular file"):
        await House(tmp_path).jobs.open()


async def test_busts_made_while_the_queue_of_before_is_worked_off_join_it(path: Path) -> None:
    """In their order."""
    async with house(path, pause=lambda _: 3600.0) as it:
        it.inner.failure = AWAY
        for number in range(20):
            await it.bust(str(number))
    async with house(path) as it:
        answers = [await it.bust(str(number)) for number in range(20, 30)]
        for answer in answers:
            await it.over(answer)
        await eventually(lambda: not it.jobs._runs)
        assert {entry.state for entry, _ in await it.jobs.recent()} == {"done"}
