"""Hot swaps: all or none, busted twice, repeated without harm, and ended alike whatever happens on the way."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from pybustcall.daemon import (
    BackendFailure,
    DaemonSettings,
    Indexes,
    KeyReused,
    MemoryBackend,
    RefusedKey,
    Registry,
    Swaps,
    create_app,
)
from pybustcall.daemon.dependencies import MOST_DEPENDENCIES, MOST_VERSIONS, Change, InUse, SwapRefused, with_version
from pybustcall.daemon.registry import Phase, RegistryFailure
from pybustcall.daemon.swaps import STEPS, SwapAnswer, SwapFailed, pause_before, swap_fingerprint_of
from pybustcall.models import (
    AnnounceRequest,
    DependenciesReply,
    DependencyReply,
    ForgetReply,
    HotSwapReply,
    HotSwapRequest,
    Problem,
    ResolveReply,
)
from tests.conftest import PATIENCE, eventually
from tests.plain_cache import busted, engine_over, index_of
from tests.test_daemon_app import BUST, ENTRIES, Gate, history_of
from tests.test_daemon_idempotency import KEY, REPLAYED, files_limited, warnings_in

DEPENDENCIES = "/api/v1/dependencies"
FORGET = "/api/v1/dependencies/forget"
RESOLVE = "/api/v1/resolve"
HOTSWAP = "/api/v1/hotswap"


class Cache:
    """A cache whose entries bear the version that they were made with; it fails while it is broken."""

    name = "cache"
    blocking = False

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.broken: Exception | None = None

    def check(self, key: str) -> None:
        if key.startswith("/"):
            raise RefusedKey("is an absolute path")

    def check_ready(self) -> None: ...

    def variants(self, key: str) -> list[str]:
        return [name for name in self.held if name == f"{key}.gz"]

    def remove(self, key: str) -> bool:
        if self.broken is not None:
            raise self.broken
        return self.held.pop(key, None) is not None

    def size_bytes(self) -> int:
        return 0


STUCK = BackendFailure("the disk is gone")


class House:
    """A daemon without its face: a cache, what is registered, and its swaps, whose steps a test can act between."""

    def __init__(self, path: Path | None = None, cache: Cache | None = None, **more: Any) -> None:
        self.cache = cache or Cache()
        self.engine = engine_over(self.cache)
        self.registry = Registry(path)
        self.steps: list[str] = []
        self.acts: dict[str, Callable[[], None]] = {}
        self.swaps = Swaps(self.engine, self.registry, step=self._step, pause=lambda _: 0.001, **more)

    def _step(self, name: str) -> None:
        self.steps.append(name)
        self.acts.get(name, lambda: None)()

    def make(self, key: str, name: str = "model") -> None:
        """Make an entry of a dependency as it is now, as a reader does."""
        self.cache.held[key] = self.current(name)
        self.engine.register(key, [name])

    def current(self, name: str = "model") -> str:
        return self.registry.dependencies[name].current

    def breaking(self) -> None:
        self.cache.broken = STUCK

    def break_with_a_new_entry(self) -> None:
        self.make("new")
        self.breaking()

    def mend(self) -> None:
        self.cache.broken = None

    async def announce(self, name: str, *versions: str) -> None:
        await self.registry.announce(AnnounceRequest(name=name, versions=versions, current=versions[0]))

    async def swap(self, key: bytes | None = None, **to: str) -> SwapAnswer:
        return await self.swaps.swap(asking(**to), key)


def asking(**to: str) -> HotSwapRequest:
    return HotSwapRequest.model_validate({"swaps": [{"name": name, "to": version} for name, version in to.items()]})


@asynccontextmanager
async def house(path: Path | None = None, cache: Cache | None = None, **more: Any) -> AsyncIterator[House]:
    """Open a house with two dependencies, of which entries were made; afterwards nothing of it is left."""
    tasks = asyncio.all_tasks()
    it = House(path, cache, **more)
    await it.swaps.open()
    try:
        if not it.registry.dependencies:
            await it.announce("model", "1.0.0", "1.1.0")
            await it.announce("templates", "1.0.0")
            it.make("page")
            it.make("page.gz")
            it.make("frame", "templates")
            await it.registry.save()
        yield it
    finally:
        await it.swaps.close()
    assert asyncio.all_tasks() <= tasks
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pybustcall-registry")]


def facts(it: House) -> tuple[str, str, set[str]]:
    """Tell the two versions, and what the cache holds."""
    return it.current("model"), it.current("templates"), set(it.cache.held)


BEFORE = ("1.0.0", "1.0.0", {"page", "page.gz", "frame"})


# A swap


@pytest.mark.requirement("IMP-12")
async def test_a_swap_replaces_all_and_busts_what_depends_on_them() -> None:
    """With the variants, by way of others, and nothing else; the answer tells how many, and from what to what."""
    async with house() as it:
        it.engine.register("wrapped", ["page"])
        it.cache.held.update(wrapped="", unrelated="")
        answer = await it.swap(model="1.1.0", templates="1.2.3")
        assert facts(it) == ("1.1.0", "1.2.3", {"unrelated"})
        assert answer == SwapAnswer(
            HotSwapReply.model_validate(
                {
                    "committed": True,
                    "busted": 4,
                    "fault_stage": 12,
                    "swaps": [
                        {"name": "model", "from": "1.0.0", "to": "1.1.0"},
                        {"name": "templates", "from": "1.0.0", "to": "1.2.3"},
                    ],
                }
            ),
            replayed=False,
        )
        assert it.steps == list(STEPS)
        assert it.registry.dependencies["templates"].versions == ("1.0.0", "1.2.3")


async def test_a_swap_of_one_leaves_the_others() -> None:
    """And their entries."""
    async with house() as it:
        await it.swap(model="1.1.0")
        assert facts(it) == ("1.1.0", "1.0.0", {"frame"})


@pytest.mark.requirement("IMP-12")
@pytest.mark.parametrize("step", ["validated", "prepared", "busted"])
async def test_an_entry_made_with_the_old_version_in_the_midst_of_it_is_busted(step: str) -> None:
    """That is what the second bust is for; one made with the new version stays."""
    async with house() as it:
        it.acts[step] = lambda: it.make("old")
        it.acts["busted again"] = lambda: it.make("new")
        await it.swap(model="1.1.0")
        assert it.cache.held == {"frame": "1.0.0", "new": "1.1.0"}


async def test_a_swap_that_may_not_be_does_nothing() -> None:
    """No step is taken."""
    async with house() as it:
        with pytest.raises(SwapRefused):
            await it.swap(model="1.1.0", templates="2.0.0")
        assert facts(it) == BEFORE
        assert it.steps == []


async def test_a_dependency_of_which_nothing_was_made_is_swapped() -> None:
    """Nothing to bust is no failure."""
    async with house() as it:
        await it.announce("unused", "1.0.0")
        assert (await it.swap(unused="1.1.0")).reply.busted == 0


async def test_an_entry_that_cannot_be_removed_fails_the_swap() -> None:
    """Be it that the cache refuses its key."""
    async with house() as it:
        it.cache.broken = RefusedKey("leads through a link")
        with pytest.raises(SwapFailed, match="0 removed, 1 not removed: a key leads through a link"):
            await it.swap(templates="1.2.3")
        assert facts(it) == BEFORE


# Failures


@pytest.mark.requirement("IMP-12")
async def test_a_cache_that_fails_first_rolls_the_swap_back() -> None:
    """No version has changed, nothing is owed, and it can be repeated with the same key."""
    async with house() as it:
        it.breaking()
        with pytest.raises(SwapFailed) as caught:
            await it.swap(b"k", model="1.1.0", templates="1.2.3")
        assert str(caught.value) == (
            "the cache failed (0 removed, 4 not removed: the disk is gone): the swap was rolled back, and no version"
            " has changed; 0 entries are owed a bust"
        )
        assert facts(it) == BEFORE
        assert it.steps == ["validated", "prepared", "rolled back"]
        assert it.registry.unfinished() == ()
        it.mend()
        assert not (await it.swap(b"k", model="1.1.0")).replayed


@pytest.mark.requirement("IMP-12")
async def test_a_cache_that_fails_after_the_commit_has_the_versions_put_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of them; and what was made with the new ones meanwhile is busted as soon as that can be."""
    async with house() as it:
        it.acts["committed"] = it.break_with_a_new_entry
        with pytest.raises(SwapFailed) as caught:
            await it.swap(model="1.1.0", templates="1.2.3")
        assert str(caught.value).endswith(
            ": the swap was rolled back; 4 entries are owed a bust, which is retried until it is done"
        )
        assert caught.value.owed == 4
        assert (it.current("model"), it.current("templates")) == ("1.0.0", "1.0.0")
        assert it.cache.held == {"new": "1.1.0"}
        assert it.steps[-2:] == ["committed", "owed"]
        await eventually(lambda: len(warnings_in(caplog)) > 3)
        assert warnings_in(caplog)[-1].startswith("a hot swap's bust is still owed: ")
        it.mend()
        await eventually(lambda: not it.registry.unfinished())
        assert it.cache.held == {}
        it.acts.clear()
        assert (await it.swap(model="1.1.0")).reply.committed


async def test_an_unexpected_failure_of_the_cache_is_a_failure_like_any_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says more; every entry is taken as not busted."""
    async with house() as it:

        def bewitch() -> None:
            it.cache.broken = LookupError("a bug")

        it.acts["committed"] = bewitch
        with pytest.raises(SwapFailed, match="the daemon's log says why") as caught:
            await it.swap(model="1.1.0", templates="1.2.3")
        assert caught.value.owed == 3
        assert it.current() == "1.0.0"
        it.mend()
        await eventually(lambda: not it.registry.unfinished())
    assert any(record.exc_info for record in caplog.records)


async def test_a_swap_that_cannot_be_written_down_does_not_begin(tmp_path: Path) -> None:
    """And one that cannot be committed is rolled back: nothing has changed in either case."""
    async with house(tmp_path / "r") as it:
        with files_limited(0), pytest.raises(RegistryFailure):
            await it.swap(b"k", model="1.1.0")
        assert facts(it) == BEFORE
        full = ExitStack()
        it.acts["busted"] = lambda: full.enter_context(files_limited(0))
        it.acts["rolled back"] = full.close
        with pytest.raises(RegistryFailure):
            await it.swap(b"k", model="1.1.0")
        assert facts(it) == ("1.0.0", "1.0.0", {"frame"})
        assert it.registry.unfinished() == ()
        it.acts.clear()
        assert not (await it.swap(b"k", model="1.1.0")).replayed
    async with house(tmp_path / "r") as it:
        assert it.current() == "1.1.0"
        assert (await it.swap(b"k", model="1.1.0")).replayed


async def test_versions_that_became_too_many_meanwhile_make_room() -> None:
    """For those of the swap, also where it is put back."""
    async with house() as it:
        known = it.registry._dependencies

        def fill() -> None:
            known["model"] = with_version(known["model"], *(f"1.2.{number}" for number in range(300)))

        it.acts["busted"] = fill
        await it.swap(model="1.9.0", templates="1.2.3")
        versions = it.registry.dependencies["model"].versions
        assert (it.current(), len(versions), versions[-1]) == ("1.9.0", MOST_VERSIONS, "1.9.0")
        it.make("page")
        it.acts["committed"] = it.breaking
        with pytest.raises(SwapFailed):
            await it.swap(model="1.0.0")
        assert it.current() == "1.9.0"
        it.mend()


async def test_an_announcement_during_a_swap_leaves_its_versions() -> None:
    """The lowest that goes is another, though these are lower."""
    many = [f"3.0.{number}" for number in range(MOST_VERSIONS)]
    async with house() as it:
        await it.registry.announce(AnnounceRequest(name="model", versions=tuple(many[:-2])))
        swap = await it.registry.prepare(None, b"", (Change("model", "1.0.0", "1.1.0"),))
        await it.registry.announce(AnnounceRequest(name="model", versions=tuple(many[-2:])))
        versions = it.registry.dependencies["model"].versions
        assert (versions[:3], len(versions)) == (("1.0.0", "1.1.0", "3.0.2"), MOST_VERSIONS)
        await it.registry.end(swap, Phase.ROLLED_BACK)


# Forgetting


async def test_a_dependency_of_which_nothing_is_made_can_be_forgotten(tmp_path: Path) -> None:
    """For good; once it is, or if it never was, nothing happens. It can be announced anew."""
    async with house(tmp_path / "r") as it:
        index_of(it.engine).remove("frame")
        for name in ("templates", "templates", "nothing"):
            await it.swaps.forget(name)
        assert set(it.registry.dependencies) == {"model"}
    async with house(tmp_path / "r") as it:
        assert set(it.registry.dependencies) == {"model"}
        await it.announce("templates", "0.1.0")
        assert it.registry.dependencies["templates"].versions == ("0.1.0",)


async def test_a_dependency_that_is_in_use_is_not_forgotten() -> None:
    """By an entry, or by a swap that is not finished."""
    async with house() as it:
        with pytest.raises(InUse, match="2 registered entries depend on it; register them without it first"):
            await it.swaps.forget("model")
        it.engine.register("page")
        it.engine.register("page.gz")
        swap = await it.registry.prepare(None, b"", (Change("model", "1.0.0", "1.1.0"),))
        with pytest.raises(InUse, match="a hot swap of it is not finished"):
            await it.swaps.forget("model")
        await it.registry.end(swap, Phase.ROLLED_BACK)
        await it.swaps.forget("model")
        assert set(it.registry.dependencies) == {"templates"}


async def test_what_cannot_be_written_is_not_forgotten(tmp_path: Path) -> None:
    """It stays known, and can be forgotten later."""
    async with house(tmp_path / "r") as it:
        it.engine.register("frame")
        await it.registry.save()
        with files_limited(0), pytest.raises(RegistryFailure):
            await it.swaps.forget("templates")
        assert "templates" in it.registry.dependencies
        await it.swaps.forget("templates")
        assert "templates" not in it.registry.dependencies


@pytest.mark.parametrize("step", STEPS)
async def test_nothing_is_forgotten_under_a_swap(step: str) -> None:
    """A swap that was judged counts on what it names; who forgets it waits, also if nobody waits for that any more."""
    async with house() as it:
        it.engine.register("page")
        it.engine.register("page.gz")
        forgetting: list[asyncio.Task[None]] = []
        it.acts[step] = lambda: forgetting.append(asyncio.create_task(it.swaps.forget("model")))
        await it.swap(model="1.1.0")
        forgetting[0].cancel()
        await asyncio.wait(forgetting)
        await eventually(lambda: "model" not in it.registry.dependencies)
        assert it.steps == list(STEPS)


async def test_a_swap_that_can_be_neither_busted_nor_put_back_stands(tmp_path: Path) -> None:
    """It says so; its bust is owed, and a repeat with its key finishes it as soon as that can be."""
    async with house(tmp_path / "r") as it:
        full = ExitStack()

        def fail() -> None:
            it.breaking()
            full.enter_context(files_limited(0))

        it.acts["committed"] = fail
        it.acts["owed"] = full.close
        it.swaps._pause = lambda _: 10 * PATIENCE
        with pytest.raises(SwapFailed, match=r"could not be rolled back, so it stands .* 2 entries are owed"):
            await it.swap(b"k", model="1.1.0")
        assert it.current() == "1.1.0"
        with pytest.raises(SwapFailed, match="the swap stands; 2 entries are owed a bust"):
            await it.swap(b"k", model="1.1.0")
        it.mend()
        it.make("new")
        answer = await it.swap(b"k", model="1.1.0")
        assert (answer.replayed, answer.reply.busted) == (True, 3)
        assert it.registry.unfinished() == ()
        assert it.steps[-3:] == ["owed", "busted again", "done"]


def test_an_owed_bust_is_tried_ever_more_slowly() -> None:
    """From half a second to a minute."""
    assert [pause_before(attempt) for attempt in (0, 1, 2, 6, 7, 10_000)] == [0.5, 1, 2, 32, 60, 60]


# Repeats


@pytest.mark.requirement("IMP-12")
async def test_a_repeated_swap_is_answered_alike_and_changes_nothing(tmp_path: Path) -> None:
    """Also after a restart."""
    async with house(tmp_path / "r") as it:
        first = await it.swap(b"k", model="1.1.0")
        it.make("new")
        assert await it.swap(b"k", model="1.1.0") == SwapAnswer(first.reply, replayed=True)
        assert "new" in it.cache.held
        assert not (await it.swap(b"l", model="1.1.0")).replayed
        assert not (await it.swap(model="1.1.0")).replayed
    async with house(tmp_path / "r") as it:
        assert await it.swap(b"k", model="1.1.0") == SwapAnswer(first.reply, replayed=True)
        assert it.steps == []


async def test_a_key_of_another_swap_is_refused() -> None:
    """Nothing is done."""
    async with house() as it:
        await it.swap(b"k", model="1.1.0")
        with pytest.raises(KeyReused):
            await it.swap(b"k", templates="1.2.3")
        assert it.current("templates") == "1.0.0"


async def test_a_swap_that_was_refused_leaves_its_key() -> None:
    """It may be repeated with what was missing."""
    async with house() as it:
        with pytest.raises(SwapRefused):
            await it.swap(b"k", model="2.0.0")
        assert not (await it.swap(b"k", model="1.1.0")).replayed


def test_a_fingerprint_is_of_what_is_asked() -> None:
    """Whether said or left to its default; any other wish is another request."""

    def fingerprint(**fields: object) -> bytes:
        item = {"name": "a", "to": "1.0.0", **fields}
        return swap_fingerprint_of(HotSwapRequest.model_validate({"swaps": [item]}))

    assert fingerprint() == fingerprint(migrate=False, unknown=7)
    others: list[dict[str, object]] = [
        {"name": "b"},
        {"to": "1.0.1"},
        {"from": "1.0.0"},
        {"migrate": True},
        {"rollback": True},
    ]
    assert len({fingerprint(), *(fingerprint(**fields) for fields in others)}) == 6


# At once


async def test_swaps_wait_for_one_another(tmp_path: Path) -> None:
    """Each sees what the one before left, and all of its steps are its own."""
    async with house(tmp_path / "r") as it:
        versions = [f"1.2.{number}" for number in range(20)]
        answers = await asyncio.gather(*(it.swap(model=version) for version in versions))
        told = [(swap.from_, swap.to) for answer in answers for swap in answer.reply.swaps]
        assert told == list(zip(["1.0.0", *versions], versions, strict=False))
        assert it.steps == list(STEPS) * 20


async def test_repeats_at_once_are_done_once(tmp_path: Path) -> None:
    """All get the same answer, one of them as the first."""
    async with house(tmp_path / "r") as it:
        answers = await asyncio.gather(*(it.swap(b"k", model="1.1.0") for _ in range(20)))
        assert sorted(answer.replayed for answer in answers) == [False] + [True] * 19
        assert {answer.reply for answer in answers} == {answers[0].reply}
        assert it.steps == list(STEPS)


async def gated(gate: Gate, path: Path | None = None, **more: Any) -> Swaps:
    """Open swaps over a cache whose removals wait to be let through."""
    engine = engine_over(gate)
    engine.register("page", ["model"])
    swaps = Swaps(engine, Registry(path), **more)
    await swaps.open()
    await swaps.registry.announce(AnnounceRequest(name="model", versions=("1.0.0",)))
    return swaps


async def test_a_caller_that_is_cancelled_breaks_nothing_off() -> None:
    """The swap goes on to its end, and the next finds it done."""
    gate = Gate()
    swaps = await gated(gate)
    first, second = (asyncio.create_task(swaps.swap(asking(model="1.1.0"), b"k")) for _ in range(2))
    await asyncio.to_thread(gate.entered.wait, PATIENCE)
    assert repr(swaps) == "Swaps(Registry(in memory, 1 dependencies, 1 swaps), 2 under way)"
    for task in (first, second):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.open.set()
    answer = await swaps.swap(asking(model="1.1.0"), b"k")
    assert (answer.replayed, gate.removed) == (True, ["page", "page"])
    await swaps.close()


async def test_busts_and_registrations_go_on_during_a_swap(tmp_path: Path) -> None:
    """And so do announcements."""
    gate = Gate()
    swaps = await gated(gate, tmp_path / "r")
    swapping = asyncio.create_task(swaps.swap(asking(model="1.1.0")))
    await asyncio.to_thread(gate.entered.wait, PATIENCE)
    swaps._engine.register("other", ["model"])
    await swaps.registry.save()
    await swaps.registry.announce(AnnounceRequest(name="model", versions=("1.0.5",)))
    busting = asyncio.create_task(busted(swaps._engine, "other", "direct"))
    await asyncio.sleep(0)
    assert not swapping.done()
    gate.open.set()
    await asyncio.gather(swapping, busting)
    assert swaps.registry.dependencies["model"].versions == ("1.0.0", "1.0.5", "1.1.0")
    assert sorted(gate.removed) == ["other", "other", "page", "page"]
    await swaps.close()


# From start to end


@pytest.mark.requirement("IMP-12")
async def test_a_swap_under_way_is_waited_for_at_the_end_and_others_are_not_begun(tmp_path: Path) -> None:
    """So that nothing is left to be done at the next start."""
    gate = Gate()
    swaps = await gated(gate, tmp_path / "r")
    first, second = (asyncio.create_task(swaps.swap(asking(model=to))) for to in ("1.1.0", "1.2.0"))
    await asyncio.to_thread(gate.entered.wait, PATIENCE)
    closing = asyncio.create_task(swaps.close())
    await asyncio.wait({second})
    assert not closing.done()
    gate.open.set()
    await closing
    assert (await first).reply.committed
    assert second.cancelled()
    await swaps.close()
    async with house(tmp_path / "r") as it:
        assert it.current() == "1.1.0"


async def test_a_swap_that_takes_too_long_is_ended_at_the_next_start(tmp_path: Path) -> None:
    """It had not been committed, and is rolled back."""
    gate = Gate()
    swaps = await gated(gate, tmp_path / "r", patience=0.02)
    first = asyncio.create_task(swaps.swap(asking(model="1.1.0")))
    await asyncio.to_thread(gate.entered.wait, PATIENCE)
    await swaps.close()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.open.set()
    async with house(tmp_path / "r") as it:
        assert it.current() == "1.0.0"
        assert [swap.phase for swap in it.registry._swaps.values()] == [Phase.ROLLED_BACK]


@pytest.mark.requirement("IMP-12")
async def test_what_is_owed_at_the_end_is_busted_at_the_next_start(tmp_path: Path) -> None:
    """Before anything is served; or, if it still cannot be, as soon as it can."""
    async with house(tmp_path / "r") as it:
        it.acts["committed"] = it.break_with_a_new_entry
        with pytest.raises(SwapFailed):
            await it.swap(model="1.1.0")
        cache = it.cache
    async with house(tmp_path / "r", cache) as it:
        await eventually(lambda: it.swaps._paying)
        assert it.cache.held == {"frame": "1.0.0", "new": "1.1.0"}
    cache.broken = None
    async with house(tmp_path / "r", cache) as it:
        assert it.cache.held == {"frame": "1.0.0"}
        assert it.registry.unfinished() == ()


async def test_an_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    """Not even while it busts what is owed."""
    async with house(tmp_path / "r") as it:
        it.acts["committed"] = it.breaking
        with pytest.raises(SwapFailed):
            await it.swap(model="1.1.0")
    gate = Gate()
    opening = asyncio.create_task(Swaps(engine_over(gate), Registry(tmp_path / "r")).open())
    await asyncio.to_thread(gate.entered.wait, PATIENCE)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    gate.open.set()
    async with house(tmp_path / "r") as it:
        assert it.registry.unfinished() == ()


# Over HTTP


Client = TestClient[Any, Any]


@asynccontextmanager
async def served(it: House, **more: Any) -> AsyncIterator[Client]:
    app = create_app(it.engine, DaemonSettings(**more), swaps=it.swaps)
    async with TestClient(TestServer(app)) as client:
        yield client


async def post(client: Client, path: str, document: object, **headers: str) -> tuple[int, bytes, str | None]:
    async with client.post(path, json=document, headers=headers) as response:
        return response.status, await response.read(), response.headers.get(REPLAYED)


async def problem_of(client: Client, path: str, document: object, status: int, **headers: str) -> Problem:
    async with client.post(path, json=document, headers=headers) as response:
        assert response.status == status
        assert response.content_type == "application/problem+json"
        return Problem.model_validate_json(await response.read())


MODEL = {"name": "model", "versions": ["1.1.0", "v1.0.0", "1.2.0-rc.1"], "current": "1.0.0"}
SWAP = {"swaps": [{"name": "model", "from": "1.0.0", "to": "1.1.0"}]}


@pytest.mark.requirement("IMP-12")
async def test_dependencies_are_announced_listed_and_resolved() -> None:
    """POST and GET /api/v1/dependencies, POST /api/v1/resolve."""
    async with served(House()) as client:
        for _ in range(2):
            status, body, _ = await post(client, DEPENDENCIES, MODEL)
            assert status == 200
            model = DependencyReply.model_validate_json(body)
            assert (model.name, model.current, model.versions) == ("model", "1.0.0", ("1.0.0", "1.1.0", "1.2.0-rc.1"))
        await post(client, DEPENDENCIES, {"name": "a", "versions": ["2.0.0"]})
        async with client.get(DEPENDENCIES) as response:
            told = DependenciesReply.model_validate_json(await response.read())
        assert told.dependencies == (DependencyReply(name="a", current="2.0.0", versions=("2.0.0",)), model)
        status, body, _ = await post(client, RESOLVE, {"spec": "model@^1.0.0"})
        assert (status, ResolveReply.model_validate_json(body)) == (
            200,
            ResolveReply(spec="model@^1.0.0", resolved="model@1.1.0", version="1.1.0", state="stable"),
        )


@pytest.mark.requirement("IMP-12")
async def test_a_swap_is_answered_and_its_repeat_alike() -> None:
    """POST /api/v1/hotswap: the very same JSON, marked as replayed."""
    it = House()
    async with served(it) as client:
        await post(client, DEPENDENCIES, MODEL)
        it.cache.held["page"] = "old"
        await post(client, ENTRIES, {"key": "page", "depends_on": ["model"]})
        status, body, replayed = await post(client, HOTSWAP, SWAP, **{KEY: "k"})
        assert (status, replayed) == (200, None)
        assert HotSwapReply.model_validate_json(body).busted == 1
        assert b'"from":"1.0.0"' in body
        assert await post(client, HOTSWAP, SWAP, **{KEY: "k"}) == (200, body, "true")
        other = {"swaps": [{"name": "model", "to": "1.0.0"}]}
        assert (await problem_of(client, HOTSWAP, other, 422, **{KEY: "k"})).field == KEY
        assert (await problem_of(client, HOTSWAP, other, 400, **{KEY: "two words"})).field == KEY
        assert (await post(client, HOTSWAP, other))[0] == 200
    assert it.cache.held == {}


@pytest.mark.parametrize(
    ("path", "document", "status", "field"),
    [
        (DEPENDENCIES, {}, 422, "name"),
        (DEPENDENCIES, {"name": "model", "versions": []}, 422, "versions"),
        (DEPENDENCIES, {"name": "model", "versions": ["private"]}, 422, "versions.0"),
        (DEPENDENCIES, {"name": "private thing", "versions": ["1.0.0"]}, 422, "name"),
        (DEPENDENCIES, {"name": "model", "versions": ["1.0.0"], "current": "1.1.0"}, 409, "current"),
        (RESOLVE, {"spec": ""}, 422, "spec"),
        (RESOLVE, {"spec": "model@private"}, 422, "spec"),
        (HOTSWAP, {"swaps": []}, 422, "swaps"),
        (FORGET, {"name": "private thing"}, 422, "name"),
        (FORGET, {}, 422, "name"),
        (HOTSWAP, {"swaps": [{"name": "private thing", "to": "1.0.0"}]}, 422, "swaps.0.name"),
        (HOTSWAP, {"swaps": [{"name": "private\u0007", "to": "1.0.0"}]}, 422, "swaps.0.name"),
        (HOTSWAP, {"swaps": [{"name": "model"}]}, 422, "swaps.0.to"),
        (HOTSWAP, {"swaps": [{"name": "model", "to": "private"}]}, 422, "swaps.0.to"),
        (HOTSWAP, {"swaps": [{"name": "model", "from": "private", "to": "1.0.0"}]}, 422, "swaps.0.from"),
    ],
)
async def test_a_bad_field_is_named(path: str, document: object, status: int, field: str) -> None:
    """And what it says is not repeated; the fault is remembered."""
    async with served(House()) as client:
        await post(client, DEPENDENCIES, MODEL)
        problem = await problem_of(client, path, document, status)
        assert problem.field == field
        assert "private" not in problem.detail
        assert await history_of(client) == [(4, "unknown")]


async def test_what_does_not_resolve_is_a_422_of_its_own_type() -> None:
    """Which tells it from a spec that cannot be read."""
    async with served(House()) as client:
        await post(client, DEPENDENCIES, MODEL)
        for spec in ("model@^2.0.0", "other@*"):
            problem = await problem_of(client, RESOLVE, {"spec": spec}, 422)
            assert (problem.type, problem.field) == ("urn:bustcall:problem:unresolved", "spec")
        problem = await problem_of(client, RESOLVE, {"spec": "model@^2.0.0"}, 422)
        assert problem.detail.endswith("known are 1.0.0, 1.1.0, 1.2.0-rc.1")
        assert (await problem_of(client, RESOLVE, {"spec": "model@!"}, 422)).type == "about:blank"


@pytest.mark.requirement("IMP-12")
async def test_a_swap_that_is_refused_is_a_409_that_tells_every_reason() -> None:
    """One sentence each."""
    it = House()
    async with served(it) as client:
        await post(client, DEPENDENCIES, MODEL)
        swaps = [
            {"name": "model", "to": "1.stable.1.experimental.0.stable"},
            {"name": "other", "to": "1.0.0"},
        ]
        problem = await problem_of(client, HOTSWAP, {"swaps": swaps}, 409)
        assert problem.type == "urn:bustcall:problem:swap-refused"
        assert problem.unmet == (
            "model: minor: stable to experimental takes allow_experimental",
            "other: was not announced",
        )
        assert it.current() == "1.0.0"


async def test_a_swap_that_fails_is_a_500_that_tells_what_became_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """Rolled back, and how many entries are owed a bust."""
    it = House()
    async with served(it) as client:
        await post(client, DEPENDENCIES, MODEL)
        it.cache.held["page"] = "old"
        await post(client, ENTRIES, {"key": "page", "depends_on": ["model"]})
        it.breaking()
        problem = await problem_of(client, HOTSWAP, SWAP, 500)
        assert "the swap was rolled back, and no version has changed; 0 entries are owed a bust" in problem.detail
        it.mend()
        it.acts["committed"] = it.breaking
        problem = await problem_of(client, HOTSWAP, SWAP, 500)
        assert problem.detail.endswith(
            "the swap was rolled back; 1 entries are owed a bust, which is retried until it is done"
        )
        assert {stage for stage, _ in await history_of(client)} == {7}
        it.mend()
    assert any(record.levelno == logging.ERROR for record in caplog.records)


async def test_a_registry_that_fails_refuses_announcements_and_swaps(tmp_path: Path) -> None:
    """With what became of them: nothing."""
    async with served(House(tmp_path / "r")) as client:
        await post(client, DEPENDENCIES, MODEL)
        with files_limited(0):
            told = await problem_of(client, DEPENDENCIES, {"name": "other", "versions": ["1.0.0"]}, 500)
            assert told.detail.endswith("; nothing was announced")
            told = await problem_of(client, FORGET, {"name": "model"}, 500)
            assert told.detail.endswith("; nothing was forgotten")
            assert (await problem_of(client, HOTSWAP, SWAP, 500)).detail.endswith("; no version has changed")
        assert (await post(client, HOTSWAP, SWAP))[0] == 200


async def test_a_full_registry_takes_a_dependency_once_another_is_forgotten() -> None:
    """Until then it is a 507; a dependency in use is a 409, and what is not known is forgotten already."""
    it = House()
    async with served(it) as client:
        known = it.registry._dependencies
        await post(client, DEPENDENCIES, MODEL)
        known.update({f"m{number}": known["model"] for number in range(MOST_DEPENDENCIES - 1)})
        more = {"name": "more", "versions": ["2.0.0"]}
        assert "most dependencies" in (await problem_of(client, DEPENDENCIES, more, 507)).detail
        await post(client, ENTRIES, {"key": "page", "depends_on": ["model"]})
        problem = await problem_of(client, FORGET, {"name": "model"}, 409)
        assert problem.field == "name"
        assert problem.detail.endswith("entries depend on it; register them without it first; nothing was forgotten")
        await post(client, ENTRIES, {"key": "page"})
        for _ in range(2):
            status, body, _ = await post(client, FORGET, {"name": "model"})
            assert (status, ForgetReply.model_validate_json(body)) == (200, ForgetReply(name="model"))
        assert (await post(client, DEPENDENCIES, more))[0] == 200


async def test_the_257th_version_is_known_and_the_lowest_is_not() -> None:
    """However many there were."""
    async with served(House()) as client:
        await post(client, DEPENDENCIES, {**MODEL, "versions": [f"1.0.{number}" for number in range(256)]})
        _, body, _ = await post(client, DEPENDENCIES, {"name": "model", "versions": ["2.0.0"]})
        versions = DependencyReply.model_validate_json(body).versions
        assert (len(versions), versions[:2], versions[-1]) == (256, ("1.0.0", "1.0.2"), "2.0.0")


async def test_the_keys_of_a_token_are_its_own(tmp_path: Path) -> None:
    """Whoever has another token has other keys."""
    told: list[str | None] = []
    for token in ("first", "first", "second"):
        async with served(House(tmp_path / "r"), token=token) as client:
            headers = {"Authorization": f"Bearer {token}"}
            if not told:
                await post(client, DEPENDENCIES, MODEL, **headers)
            swap = {"swaps": [{"name": "model", "to": "1.1.0"}]}
            told.append((await post(client, HOTSWAP, swap, **headers, **{KEY: "k"}))[2])
    assert told == [None, "true", None]


async def test_a_memory_backend_forgets_what_a_swap_busted(tmp_path: Path) -> None:
    """Also over a restart."""
    indexes = Indexes()
    swaps = Swaps(engine_over(MemoryBackend(indexes), indexes), Registry(tmp_path / "r"))
    await swaps.open()
    await swaps.registry.announce(AnnounceRequest(name="model", versions=("1.0.0",)))
    swaps._engine.register("page", ["model"])
    await swaps.registry.save()
    assert (await swaps.swap(asking(model="1.1.0"))).reply.busted == 1
    await swaps.close()
    async with house(tmp_path / "r") as it:
        assert len(it.engine.indexes) == 0


async def test_a_bust_over_http_notes_what_it_removed(tmp_path: Path) -> None:
    """Before it is answered."""
    indexes = Indexes()
    engine = engine_over(MemoryBackend(indexes), indexes)
    app = create_app(engine, DaemonSettings(registry=tmp_path / "r"))
    async with TestClient(TestServer(app)) as client:
        await post(client, ENTRIES, {"key": "page", "depends_on": ["model"]})
        assert (await post(client, BUST, {"target": "model"}))[0] == 200
    registry, engine = Registry(tmp_path / "r"), engine_over(Cache())
    await registry.open(engine.indexes, engine.check_key)
    assert len(engine.indexes) == 0
    await registry.close()


# Any order of things

happenings = st.lists(
    st.tuples(st.sampled_from([*STEPS, "rolled back", "owed"]), st.sampled_from(["break", "mend", "make"])), max_size=6
)


def over(it: House) -> bool:
    return not it.registry.unfinished()


async def play(runs: list[tuple[str, list[tuple[str, str]]]], path: Path) -> None:
    """Swap while the cache breaks, is mended, and is read; hold what must be true of any of it."""
    cache = Cache()
    for number, (to, acts) in enumerate(runs):
        async with house(path, cache) as it:

            def act(what: str, it: House = it, number: int = number) -> None:
                match what:
                    case "break":
                        it.breaking()
                    case "mend":
                        it.mend()
                    case _:
                        it.make(f"made{number}")
                        it.make(f"framed{number}", "templates")

            for step, what in acts:
                it.acts[step] = partial(act, what)
            before = facts(it)[:2]
            try:
                answer = await it.swap(model=to, templates=to)
            except SwapFailed:
                assert facts(it)[:2] == before
            else:
                assert facts(it)[:2] == (to, to)
                assert {(swap.from_, swap.to) for swap in answer.reply.swaps} == {(before[0], to)}
            it.acts.clear()
            it.mend()
            await eventually(partial(over, it))
            assert set(it.cache.held.values()) <= {it.current()}


@pytest.mark.requirement("IMP-12")
@given(st.lists(st.tuples(st.sampled_from(["1.1.0", "1.2.0", "1.3.0"]), happenings), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_in_any_order_of_things_a_swap_is_all_or_none(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[str, list[tuple[str, str]]]]
) -> None:
    """Both versions change or neither, and no entry is left that was made with another version than the current one."""
    asyncio.run(play(runs, tmp_path_factory.mktemp("r") / "r"))
