"""The journal: what was begun is on the disk, in order, and what could not be written was promised to nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybustcall.daemon import journal as module
from pybustcall.daemon.history import Fault
from pybustcall.daemon.journal import Entry, Journal, JournalFailure, Wish
from pybustcall.errors import ConfigurationError
from pybustcall.models import KINDS, OVER, JobState, LayerReply
from tests.conftest import PATIENCE, eventually
from tests.test_bench import check_table, run_bench
from tests.test_daemon_idempotency import (
    SPOILERS,
    files_limited,
    make_dangling,
    make_database,
    make_fifo,
    make_it_newer,
    modes_in,
    warnings_in,
)

ROOT = Path(__file__).parent.parent
THREAD = "pybustcall-journal"
SECOND = 1_000_000_000
STATES: tuple[JobState, ...] = get_args(JobState)
ANSWERED = "its disk has not answered for"


class Clock:
    """A clock that stands still unless it is set, in nanoseconds."""

    def __init__(self, now: int = 1_700_000_000 * SECOND) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def a_bust(target: str = "a", **more: Any) -> Entry:
    wish = Wish(namespace=more.pop("namespace", "default"), kind="key", target=target, strategy="direct")
    return Entry(**{"job": os.urandom(16).hex(), "wish": wish, "at": 1, **more})


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@asynccontextmanager
async def journaling(path: Path | None = None, **more: Any) -> AsyncIterator[Journal]:
    """Open a journal; afterwards it is closed, and neither task nor thread of it is left."""
    tasks = asyncio.all_tasks()
    journal = Journal(path, **more)
    await journal.open()
    try:
        yield journal
    finally:
        await journal.close()
    assert asyncio.all_tasks() <= tasks
    assert not threads()


async def begun(journal: Journal, *targets: str) -> list[Entry]:
    """Begin busts of these targets at once."""
    return await asyncio.gather(*(journal.begin(a_bust(target)) for target in targets))


async def unfinished_in(path: Path) -> list[str]:
    """Tell the targets of what a new process finds to be done."""
    journal = Journal(path)
    found = await journal.open()
    await journal.close()
    return [entry.wish.target for entry in found]


async def all_in(path: Path) -> list[tuple[str, JobState]]:
    """Tell what a new process finds in the file, oldest first."""
    async with journaling(path, retention=1e9) as journal:
        return [(it.wish.target, it.state) for it in reversed(await journal.recent(limit=1000))]


async def targets_of(journal: Journal, **more: Any) -> list[str]:
    return [entry.wish.target for entry in await journal.recent(**more)]


async def in_thread(journal: Journal, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """Do something with the journal's own connection, in its thread."""
    assert journal._thread is not None
    return await asyncio.get_running_loop().run_in_executor(journal._thread, journal._store.database.use, work)


def value_of(statement: str, db: sqlite3.Connection) -> Any:
    return db.execute(statement).fetchone()[0]


@contextmanager
def held_up(journal: Journal) -> Iterator[threading.Event]:
    """Let the journal's thread do nothing meanwhile, as a disk does that does not answer."""
    assert journal._thread is not None
    free = threading.Event()
    journal._thread.submit(free.wait, PATIENCE)
    try:
        yield free
    finally:
        free.set()


def limit(pages: int, db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA max_page_count = {pages}")  # no less than there are already


@asynccontextmanager
async def full(journal: Journal) -> AsyncIterator[None]:
    """Let the database have no page more than it has; afterwards there is room again."""
    await in_thread(journal, partial(limit, 1))
    yield
    await in_thread(journal, partial(limit, 1_000_000))


LARGE = "x" * 8000  # more than there is room for in a page that is there


# Begun


async def test_what_was_begun_is_found_by_the_next_process(tmp_path: Path) -> None:
    """All of it, as it was; the file is nobody else's to read."""
    path = tmp_path / "j"
    wish = Wish(namespace="shop", kind="prefix", target="ä/1", strategy="hybrid", soft=True, verify=True, settle=1.5)
    layers = (
        LayerReply(name="redis", ok=True, removed=3, settle=0.5),
        LayerReply(name="cdn", ok=False, error="down: \u00e9"),
    )
    asked = Entry(
        job="ab" * 16, wish=wish, who="token", binding="lua", reason="new price", daemon="hub", at=5, state="running"
    )
    async with journaling(path) as journal:
        first = await journal.begin(asked)
        journal.put(second := replace(first, state="waiting", attempts=2, removed=3, layers=layers))
        assert modes_in(tmp_path) == {0o600}
        assert journal.durable
        assert repr(journal) == f"Journal({path}, 1 at hand, 1 unwritten)"
    assert replace(asked, number=1) == first
    journal = Journal(path)
    assert await journal.open() == (second,)
    assert await journal.find(asked.job) == second
    await journal.close()


@pytest.mark.parametrize("path", ["j", None])
async def test_a_bust_may_be_kept_for_ever(tmp_path: Path, path: str | None) -> None:
    """However large the number is that says so."""
    async with journaling(None if path is None else tmp_path / path, retention=1e300) as journal:
        journal.put(replace(await journal.begin(a_bust()), state="done"))
        await journal.flush()
        assert [it.state for it in await journal.recent()] == ["done"]


async def test_numbers_only_grow(tmp_path: Path) -> None:
    """Over restarts, also if nothing is left of those before."""
    clock = Clock()
    async with journaling(tmp_path / "j", retention=1, clock=clock) as journal:
        entries = await begun(journal, "a", "b", "c")
        assert [entry.number for entry in entries] == [1, 2, 3]
        for entry in entries:
            journal.put(replace(entry, state="done", ended=clock()))
        await journal.flush()
        clock.now += 2 * SECOND
        journal.put_fault(Fault(place=0, stage=3, message="m", at=1, first=1))
        await journal.flush()
        assert await in_thread(journal, partial(value_of, "SELECT count(*) FROM busts")) == 0
    async with journaling(tmp_path / "j", retention=1, clock=clock) as journal:
        assert (await journal.begin(a_bust())).number == 4


async def test_those_who_come_while_a_commit_is_under_way_share_the_next(tmp_path: Path) -> None:
    """A hundred take two commits, and come in the order in which they asked."""
    async with journaling(tmp_path / "j") as journal:
        with held_up(journal):
            first = asyncio.create_task(journal.begin(a_bust("0")))
            await eventually(lambda: journal._watch is not None)
            rest = [asyncio.create_task(journal.begin(a_bust(str(number)))) for number in range(1, 100)]
            await asyncio.sleep(0)
            assert not first.done()
        entries = await asyncio.gather(first, *rest)
        assert journal.commits == 2
    assert [(entry.number, entry.wish.target) for entry in entries] == [(n + 1, str(n)) for n in range(100)]
    assert await unfinished_in(tmp_path / "j") == [str(number) for number in range(100)]


async def test_a_commit_takes_no_more_than_the_event_loop_can_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others come with the next, in order."""
    monkeypatch.setattr(module, "_MOST_AT_ONCE", 3)
    async with journaling(tmp_path / "j") as journal:
        entries = await begun(journal, *map(str, range(10)))
        assert [entry.number for entry in entries] == list(range(1, 11))
        assert journal.commits == 4
    assert await unfinished_in(tmp_path / "j") == [str(number) for number in range(10)]


async def test_a_begin_is_safe_from_a_loss_of_power_and_a_new_version_from_a_kill(tmp_path: Path) -> None:
    """FULL is 2, NORMAL is 1."""
    async with journaling(tmp_path / "j") as journal:
        assert await in_thread(journal, partial(value_of, "PRAGMA journal_mode")) == "wal"
        (entry,) = await begun(journal, "a")
        assert await in_thread(journal, partial(value_of, "PRAGMA synchronous")) == 2
        journal.put(replace(entry, state="running"))
        await eventually(lambda: not journal._unwritten)
        assert await in_thread(journal, partial(value_of, "PRAGMA synchronous")) == 1
        journal.put(replace(entry, state="done"))
        await journal.flush()
        assert await in_thread(journal, partial(value_of, "PRAGMA synchronous")) == 2


async def test_new_versions_go_with_the_next_begin(tmp_path: Path) -> None:
    """One commit carries both."""
    async with journaling(tmp_path / "j") as journal:
        (entry,) = await begun(journal, "a")
        journal.put(replace(entry, state="running"))
        journal.put(replace(entry, state="done", removed=7))
        await begun(journal, "b")
        assert journal.commits == 2
        assert not journal._unwritten
        found = await journal.find(entry.job)
        assert found is not None
        assert (found.state, found.removed) == ("done", 7)
    assert await all_in(tmp_path / "j") == [("a", "done"), ("b", "waiting")]


async def test_very_many_new_versions_do_not_wait_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written at once."""
    monkeypatch.setattr(module, "_LINGER", 1000.0)
    monkeypatch.setattr(module, "_MANY", 10)
    async with journaling(tmp_path / "j") as journal:
        for entry in await begun(journal, *map(str, range(10))):
            assert journal._writer is None
            journal.put(replace(entry, state="running"))
        await eventually(lambda: not journal._unwritten)


async def test_a_begin_beyond_the_most_that_may_wait_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; those that wait already are written."""
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    async with journaling(tmp_path / "j") as journal:
        tasks = [asyncio.create_task(journal.begin(a_bust(str(number)))) for number in range(5)]
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(it, JournalFailure) for it in told] == [False] * 3 + [True] * 2
        assert str(told[3]) == "the journal cannot be used: 3 busts wait for it already"
    assert await unfinished_in(tmp_path / "j") == ["0", "1", "2"]


async def test_texts_that_are_not_utf_8_spoil_no_commit(tmp_path: Path) -> None:
    """What a peer calls itself is written so that it can be read."""
    async with journaling(tmp_path / "j") as journal:
        entry = await journal.begin(a_bust(who="\udce9", binding="ä", reason="\ud800"))
        journal.put_fault(Fault(place=0, stage=3, message="no file '\udcff'", at=1, first=1))
    async with journaling(tmp_path / "j") as journal:
        found = await journal.find(entry.job)
        assert found is not None
        assert (found.who, found.binding, found.reason) == ("\\udce9", "ä", "\\ud800")
        assert journal.faults[0].message == "no file '\\udcff'"


names = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers(0, 2**63 - 1)
layer_replies = st.builds(
    LayerReply,
    name=names,
    ok=st.booleans(),
    removed=st.integers(0, 10**9),
    error=st.none() | names,
    settle=st.none() | st.floats(0, 3600),
)
entries_asked = st.builds(
    Entry,
    number=st.integers(1, 2**62),
    job=st.text("0123456789abcdef", min_size=32, max_size=32),
    wish=st.builds(
        Wish,
        namespace=st.sampled_from(["default", "shop"]),
        kind=st.sampled_from(KINDS),
        target=names,
        strategy=names,
        soft=st.booleans(),
        verify=st.booleans(),
        settle=st.none() | st.floats(0, 3600),
    ),
    who=names,
    binding=names,
    reason=st.none() | names,
    daemon=names,
    at=numbers,
    state=st.sampled_from(STATES),
    ended=st.none() | numbers,
    removed=numbers,
    attempts=numbers,
    layers=st.lists(layer_replies, max_size=3).map(tuple),
)


@given(entry=entries_asked)
def test_every_entry_is_read_as_it_was_written(entry: Entry) -> None:
    """Whatever it says; and a version of it, too."""
    store = module._Store(None, 1e9, 10, lambda: 0)
    begun = replace(entry, state="waiting", ended=None, removed=0, attempts=0, layers=())
    for put in (begun, entry):
        store.database.use(partial(store.write, module._Batch(puts={entry.number: put})))
        assert store.database.use(partial(store.find, entry.job)) == put
    store.database.close()


# Withdrawn


async def test_a_begin_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    """At whatever point: in the queue, during its commit, or when it is done. One beside it is not touched."""
    path = tmp_path / "j"
    cancelled = 0
    async with journaling(path) as journal:
        for turns in range(40):
            task = asyncio.create_task(journal.begin(a_bust(f"c{turns}")))
            other = asyncio.create_task(journal.begin(a_bust(str(turns))))
            for _ in range(turns):
                await asyncio.sleep(0.00005)
            if not task.done():
                task.cancel()
            cancelled += (await asyncio.gather(task, return_exceptions=True))[0].__class__ is asyncio.CancelledError
            await other
            assert not task.cancelled() or f"c{turns}" not in await targets_of(journal)
        assert cancelled
        assert len(await journal.recent()) == 80 - cancelled
    assert len(await unfinished_in(path)) == 80 - cancelled


async def test_a_begin_that_is_cancelled_in_the_queue_is_never_written(tmp_path: Path) -> None:
    """It is taken out before the commit that would have carried it."""
    async with journaling(tmp_path / "j") as journal:
        with held_up(journal):
            first = asyncio.create_task(journal.begin(a_bust("1")))
            await eventually(lambda: journal._watch is not None)
            second = asyncio.create_task(journal.begin(a_bust("2")))
            await eventually(lambda: journal._begins)
            second.cancel()
            await asyncio.wait({second})
            assert not journal._begins
        await first
        assert not journal._unwritten
    assert await unfinished_in(tmp_path / "j") == ["1"]


async def test_a_begin_that_is_cancelled_during_its_commit_is_deleted_by_the_next(tmp_path: Path) -> None:
    """Nobody sees it in between, by its name or in the list."""
    async with journaling(tmp_path / "j") as journal:
        asked = a_bust("1")
        with held_up(journal):
            task = asyncio.create_task(journal.begin(asked))
            await eventually(lambda: journal._watch is not None)
            task.cancel()
            await asyncio.wait({task})
        await eventually(lambda: journal._unwritten)
        assert await in_thread(journal, partial(value_of, "SELECT count(*) FROM busts")) == 1
        assert await journal.find(asked.job) is None
        assert await journal.recent() == ()
        await journal.flush()
        assert await in_thread(journal, partial(value_of, "SELECT count(*) FROM busts")) == 0


async def test_a_begin_that_is_cancelled_when_it_was_just_written_is_deleted(tmp_path: Path) -> None:
    """The caller cannot know that it was."""
    async with journaling(tmp_path / "j") as journal:
        asked = a_bust("1")
        task = asyncio.create_task(journal.begin(asked))
        while not (begins := list(journal._begins.values())):
            await asyncio.sleep(0)
        begins[0].told.add_done_callback(lambda _: task.cancel())
        await asyncio.wait({task})
        assert task.cancelled()
        assert await journal.find(asked.job) is None
    assert await all_in(tmp_path / "j") == []


async def test_a_disk_that_does_not_answer_refuses_begins_after_a_while(tmp_path: Path) -> None:
    """And at once when that is known; what is written in the end all the same is deleted, and never worked off."""
    async with journaling(tmp_path / "j", give_up=0.05) as journal:
        (before,) = await begun(journal, "before")
        with held_up(journal):
            task = asyncio.create_task(journal.begin(a_bust("1")))
            await eventually(lambda: journal._watch is not None)
            journal.put(replace(before, state="running"))
            with pytest.raises(JournalFailure, match=ANSWERED) as caught:
                await task
            assert not caught.value.full
            await eventually(lambda: journal._is_silent)
            with pytest.raises(JournalFailure, match="has not answered for more than"):
                await journal.begin(a_bust("2"))
            with pytest.raises(JournalFailure, match=ANSWERED):
                await journal.recent()
            with pytest.raises(JournalFailure, match=ANSWERED):
                await journal.find("0" * 32)
            with pytest.raises(JournalFailure, match=ANSWERED):
                await journal.flush()
            found = await journal.find(before.job)  # in memory
            assert found is not None
            assert found.state == "running"
        await eventually(lambda: journal._watch is None)
        await journal.flush()
        assert await targets_of(journal) == ["before"]
        assert await in_thread(journal, partial(value_of, "SELECT count(*) FROM busts")) == 1
        await begun(journal, "after")
    assert await unfinished_in(tmp_path / "j") == ["before", "after"]


async def test_a_process_that_was_stopped_does_not_blame_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it runs again, the disk has its time anew, for what waits and for what is asked then."""
    loop = asyncio.get_running_loop()
    clock, stopped = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: clock() + stopped)
    async with journaling(tmp_path / "j") as journal:
        await begun(journal, "before")
        with held_up(journal):
            written = asyncio.gather(begun(journal, "a", "b"), journal.flush())
            await eventually(lambda: journal._watch is not None)
            asked = asyncio.gather(written, journal.recent())
            for _ in range(3):
                stopped += 2 * module.GIVE_UP
                for _ in range(10):  # of the loop
                    await asyncio.sleep(0)
            late = asyncio.create_task(journal.begin(a_bust("late")))
            await asyncio.sleep(0)
            assert not late.done()
            assert not asked.done()
        await asked
        await late
    assert sorted(await unfinished_in(tmp_path / "j")) == ["a", "b", "before", "late"]


# A disk that is full or fails


async def test_on_a_full_disk_nothing_is_begun_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was put is seen, and written when there is room again; the log says it once."""
    async with journaling(tmp_path / "j") as journal:
        (entry,) = await begun(journal, "before")
        async with full(journal):
            for _ in range(2):
                with pytest.raises(JournalFailure, match="database or disk is full") as caught:
                    await journal.begin(a_bust(LARGE))
                assert caught.value.full
                assert caught.value.why == "database or disk is full"
            grown = (LayerReply(name="l", ok=False, error=LARGE),)
            journal.put(replace(entry, state="failed", layers=grown))
            with pytest.raises(JournalFailure) as caught:
                await journal.flush()
            assert caught.value.full
            assert [(it.wish.target, it.state) for it in await journal.recent()] == [("before", "failed")]
            assert (await journal.find(entry.job)) == replace(entry, state="failed", layers=grown)
        await begun(journal, LARGE)
        assert not journal._unwritten
        assert entry.job not in journal._known
        assert (await journal.find(entry.job)) == replace(entry, state="failed", layers=grown)
    assert await all_in(tmp_path / "j") == [("before", "failed"), (LARGE, "waiting")]
    assert warnings_in(caplog) == [
        "busts cannot be written down, and those that must be are refused: database or disk is full"
    ]


async def test_what_could_not_be_written_is_tried_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody begins anything; not at once however much gathers meanwhile."""
    monkeypatch.setattr(module, "_RETRY", 0.01)
    monkeypatch.setattr(module, "_MANY", 1)
    async with journaling(tmp_path / "j") as journal:
        (entry,) = await begun(journal, "a")
        async with full(journal):
            journal.put(replace(entry, layers=(LayerReply(name="l", ok=False, error=LARGE),)))
            await eventually(lambda: journal._has_failed)
            before = journal.commits
            journal.put(replace(entry, layers=(LayerReply(name="m", ok=False, error=LARGE),)))
            assert journal._writer is None or journal._has_failed
        await eventually(lambda: not journal._unwritten)
        assert journal.commits > before
    (found,) = await opened(tmp_path / "j")
    assert found.layers[0].name == "m"


async def opened(path: Path) -> tuple[Entry, ...]:
    journal = Journal(path)
    found = await journal.open()
    await journal.close()
    return found


CHILD = """
import asyncio, os, resource, signal, sys
from pybustcall.daemon.journal import Entry, Journal, JournalFailure, Wish

def a_bust(target):
    wish = Wish(namespace="default", kind="key", target=target, strategy="direct")
    return Entry(job=os.urandom(16).hex(), wish=wish, at=1)

def say(*words):
    print(*words, flush=True)

journal = Journal(sys.argv[1])
"""

BEGINS_FOR_EVER = """
async def main():
    count = 0
    async def worker():
        nonlocal count
        while True:
            count += 1
            say((await journal.begin(a_bust(str(count)))).number)
    await journal.open()
    await asyncio.gather(*(worker() for _ in range(20)))
asyncio.run(main())
"""

BEGINS_UNTIL_FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
async def main():
    await journal.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    count = 0
    try:
        while count < 10_000:
            await journal.begin(a_bust("secret" * 100))
            count += 1
    except JournalFailure as error:
        say(count, "secret" in str(error), error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    say((await journal.begin(a_bust("after"))).number - count)
    await journal.close()
asyncio.run(main())
"""


@contextmanager
def child(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run this code in a process of its own."""
    command = [sys.executable, "-c", CHILD + code, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)
        assert process.stdout is not None
        process.stdout.close()


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Read what it prints."""
    assert process.stdout is not None
    return (line.strip() for line in process.stdout if line.endswith("\n"))


@pytest.mark.requirement("IMP-12")
async def test_what_was_begun_survives_a_kill(tmp_path: Path) -> None:
    """Four times over, at whatever moment among many: every one that was told is there, in order, and each once."""
    told: list[int] = []
    for size in (1, 7, 50, 200):
        with child(BEGINS_FOR_EVER, tmp_path / "j") as process:
            printed = lines(process)
            told += [int(next(printed)) for _ in range(size)]
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
            told += map(int, printed)
    found = [entry.number for entry in await opened(tmp_path / "j")]
    assert len(told) >= 258
    assert told == sorted(told)
    assert set(told) <= set(found)
    assert found == sorted(set(found))


def test_a_disk_at_its_limit_refuses_begins_until_there_is_room(tmp_path: Path) -> None:
    """A write that the system refuses; nothing of before is lost, and it goes on."""
    with child(BEGINS_UNTIL_FULL, tmp_path / "j") as process:
        failed, after = list(lines(process))
        assert process.wait(PATIENCE) == 0
    count, shown, text = failed.split(" ", 2)
    assert int(count) > 10
    assert shown == "False"
    assert text.startswith("the journal cannot be used: ")
    found = asyncio.run(unfinished_in(tmp_path / "j"))
    assert found == ["secret" * 100] * int(count) + ["after"]
    assert int(after) == 2
    assert os.listdir(tmp_path) == ["j"]


@pytest.mark.parametrize("number", [28, 122])
def test_no_room_is_told_apart_from_other_failures(number: int) -> None:
    """ENOSPC and EDQUOT, too."""
    assert module._failure(OSError(number, "x")).full
    assert not module._failure(OSError(5, "x")).full
    assert not module._failure(ConfigurationError("x")).full


# Retention


async def test_what_is_over_goes_after_its_time_and_what_is_not_never_does(tmp_path: Path) -> None:
    """It is not shown any more at once, and deleted with the next commit."""
    clock = Clock()
    async with journaling(tmp_path / "j", retention=60, clock=clock) as journal:
        entries = await begun(journal, "waiting", "done", "failed", "cancelled", "late")
        for entry, state in zip(entries[1:4], ("done", "failed", "cancelled"), strict=True):
            journal.put(replace(entry, state=state, ended=clock()))  # type: ignore[arg-type]
        await journal.flush()
        clock.now += 30 * SECOND
        journal.put(replace(entries[4], state="done", ended=clock()))
        await journal.flush()
        clock.now += 30 * SECOND
        assert await targets_of(journal) == ["late", "waiting"]
        await begun(journal, "new")
        assert await in_thread(journal, partial(value_of, "SELECT count(*) FROM busts")) == 3
        clock.now += 1000 * SECOND
        await begun(journal, "newer")
    assert await unfinished_in(tmp_path / "j") == ["waiting", "new", "newer"]


@pytest.mark.parametrize("path", [True, False])
async def test_beyond_the_most_those_go_that_ended_first(tmp_path: Path, path: bool) -> None:
    """Also without a file; what is not over is not counted."""
    clock = Clock()
    async with journaling(tmp_path / "j" if path else None, most=2, clock=clock) as journal:
        entries = await begun(journal, *"abcdef")
        for entry in (entries[2], entries[0], entries[3], entries[1]):
            clock.now += 1
            journal.put(replace(entry, state="done", ended=clock()))
        await written(journal)
        assert await targets_of(journal) == ["f", "e", "d", "b"]
        journal.put(replace(entries[3], state="done", ended=clock() - 1, removed=1))  # is counted once
        await written(journal)
        assert await targets_of(journal) == ["f", "e", "d", "b"]
        assert journal._store._over == 2
    if path:
        async with journaling(tmp_path / "j", most=1, clock=clock) as journal:
            assert journal._store._over == 2
            await begun(journal, "g")
            assert await targets_of(journal) == ["g", "f", "e", "b"]


async def written(journal: Journal) -> None:
    """Wait until nothing is unwritten and nothing more is to be trimmed."""
    journal._wake()
    await eventually(lambda: journal._writer is None)


async def test_trimming_much_takes_several_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them bounded, so that no begin waits for long; they follow by themselves."""
    monkeypatch.setattr(module, "_FEWEST_TRIMMED", 5)
    clock = Clock()
    async with journaling(tmp_path / "j", retention=60, clock=clock) as journal:
        for entry in await begun(journal, *map(str, range(50))):
            journal.put(replace(entry, state="done", ended=clock()))
        await journal.flush()
        clock.now += 61 * SECOND
        before = journal.commits
        await journal.flush()
        assert await in_thread(journal, partial(value_of, "SELECT count(*) FROM busts")) >= 40
        await written(journal)
        assert await in_thread(journal, partial(value_of, "SELECT count(*) FROM busts")) == 0
        assert journal.commits - before >= 10


async def test_a_clock_that_is_set_back_keeps_nothing_for_ever(tmp_path: Path) -> None:
    """What ended an hour from now is kept as if it had ended now; what is not over stays in any case."""
    clock = Clock()
    async with journaling(tmp_path / "j", retention=60, clock=clock) as journal:
        entries = await begun(journal, "done", "waiting")
        journal.put(replace(entries[0], state="done", ended=clock()))
        await journal.flush()
        clock.now -= 3600 * SECOND
        await begun(journal, "other")
        assert await targets_of(journal) == ["other", "waiting", "done"]
        clock.now += 61 * SECOND
        await begun(journal, "another")
        assert await targets_of(journal) == ["another", "other", "waiting"]
        clock.now -= 10 * 3600 * SECOND
        assert await targets_of(journal) == ["another", "other", "waiting"]


async def test_what_ends_in_the_future_is_kept_from_now(tmp_path: Path) -> None:
    """Whoever told it has another clock; and one that tells no end ends now."""
    clock = Clock()
    async with journaling(tmp_path / "j", retention=60, clock=clock) as journal:
        entries = await begun(journal, "far", "none")
        journal.put(replace(entries[0], state="done", ended=clock() + 10**15))
        journal.put(replace(entries[1], state="done"))
        await journal.flush()
        clock.now += 61 * SECOND
        assert await journal.recent() == ()


# Looking


async def test_the_newest_come_first_page_by_page(tmp_path: Path) -> None:
    """What is unwritten stands in its place."""
    async with journaling(tmp_path / "j") as journal:
        entries = await begun(journal, *map(str, range(10)))
        for number in (0, 4, 5):
            journal.put(replace(entries[number], state="done", removed=number))
        assert await targets_of(journal, limit=4) == ["9", "8", "7", "6"]
        assert await targets_of(journal, limit=4, before=entries[6].number) == ["5", "4", "3", "2"]
        assert await targets_of(journal, limit=4, before=entries[2].number) == ["1", "0"]
        assert await targets_of(journal, before=1) == []
        assert await targets_of(journal, before=10**30, limit=1) == ["9"]
        assert await targets_of(journal, limit=0) == []
        assert await targets_of(journal, state="done") == ["5", "4", "0"]
        assert await targets_of(journal, state="waiting", limit=3, before=entries[6].number) == ["3", "2", "1"]


async def test_busts_can_be_looked_for_by_namespace_and_target(tmp_path: Path) -> None:
    """Written or not."""
    async with journaling(tmp_path / "j") as journal:
        for namespace in ("shop", "blog"):
            for target in ("a", "b"):
                await journal.begin(a_bust(target, namespace=namespace))
        (newest,) = await journal.recent(limit=1)
        journal.put(replace(newest, state="running"))
        assert await targets_of(journal, namespace="shop") == ["b", "a"]
        assert [it.wish.namespace for it in await journal.recent(target="b")] == ["blog", "shop"]
        assert [it.number for it in await journal.recent(target="b", namespace="blog", state="running")] == [4]


async def test_an_unknown_name_is_not_found(tmp_path: Path) -> None:
    """Neither in memory nor in the file."""
    async with journaling(tmp_path / "j") as journal:
        assert await journal.find("0" * 32) is None
    async with journaling() as journal:
        assert await journal.find("0" * 32) is None


async def test_a_reader_sees_what_was_put_while_it_waited(tmp_path: Path) -> None:
    """It never tells an older version than one that was there when its turn came."""
    async with journaling(tmp_path / "j") as journal:
        (entry,) = await begun(journal, "a")
        with held_up(journal):
            flushing = asyncio.create_task(journal.flush())
            await eventually(lambda: journal._watch is not None)
            looking = asyncio.create_task(journal.recent())
            await asyncio.sleep(0)
            journal.put(replace(entry, state="done"))
        assert [it.state for it in await looking] == ["done"]
        await flushing


async def test_everybody_sees_what_they_put_last(tmp_path: Path) -> None:
    """While others begin, put and look, and commits come and go."""
    async with journaling(tmp_path / "j") as journal:

        async def work(name: str) -> None:
            for _ in range(15):
                entry = await journal.begin(a_bust(name))
                for state in ("running", "done"):
                    journal.put(entry := replace(entry, state=state))
                    assert await journal.find(entry.job) == entry
                    assert (await journal.recent(target=name, limit=1)) == (entry,)

        await asyncio.gather(*(work(name) for name in "abcdefgh"))
        found = await journal.recent(limit=1000)
        assert [entry.number for entry in found] == list(range(120, 0, -1))
        assert {entry.state for entry in found} == {"done"}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.sampled_from(["a", "b"])),
        st.tuples(st.just("put"), st.integers(0, 20), st.sampled_from(STATES)),
        st.just(("write",)),
        st.tuples(st.just("recent"), st.none() | st.integers(0, 22), st.integers(0, 8), st.none() | st.just("done")),
        st.tuples(st.just("find"), st.integers(0, 20)),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(steps=steps)
def test_what_is_seen_does_not_depend_on_what_is_written(steps: list[tuple[Any, ...]]) -> None:
    """In any order of begins, new versions, commits and looks, the journal tells what a plain list would."""

    async def run() -> None:
        model: list[Entry] = []
        async with journaling(retention=1e9) as journal:
            for step, *more in steps:
                if step == "begin":
                    model.append(await journal.begin(a_bust(more[0])))
                elif step == "put" and more[0] < len(model):
                    model[more[0]] = replace(model[more[0]], state=more[1], attempts=model[more[0]].attempts + 1)
                    journal.put(model[more[0]])
                elif step == "write":
                    await written(journal)
                    assert not journal._unwritten
                elif step == "recent":
                    before, most, state = more
                    expected = [it for it in reversed(model) if before is None or it.number < before]
                    expected = [it for it in expected if state in {None, it.state}]
                    found = await journal.recent(before=before, limit=most, state=state)
                    assert list(found) == expected[:most]
                elif step == "find" and more[0] < len(model):
                    assert await journal.find(model[more[0]].job) == model[more[0]]
            assert {it.job for it in model if it.state not in OVER} <= journal._known.keys()

    asyncio.run(run())


# Without a file


async def test_without_a_file_nothing_is_waited_for() -> None:
    """There is no thread; everything else is as with one, until it is closed."""
    async with journaling() as journal:
        assert not journal.durable
        assert repr(journal) == "Journal(in memory, 0 at hand, 0 unwritten)"
        coroutine = journal.begin(a_bust())
        with pytest.raises(StopIteration) as stopped:
            coroutine.send(None)
        entry = stopped.value.value
        assert entry.number == 1
        assert not threads()
        journal.put(replace(entry, state="done"))
        await journal.flush()
        await eventually(lambda: not journal._unwritten)
        assert [it.state for it in await journal.recent()] == ["done"]
        assert await journal.find(entry.job) == replace(entry, state="done")
    assert await journal.open() == ()
    assert await journal.recent() == ()
    await journal.close()


# Files


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is not a regular file"),
        (make_fifo, "is not a regular file"),
        (make_dangling, "No such file or directory"),
        (make_database, "is a database of something else"),
    ],
)
async def test_what_is_not_ours_is_left_as_it_is(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    """It is a mistake of the operator's, told by name."""
    path = tmp_path / "j"
    make(path)
    before = path.lstat()
    with pytest.raises(ConfigurationError, match=reason) as caught:
        await Journal(path).open()
    assert caught.value.setting == "journal"
    assert str(path) in str(caught.value)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)
    assert not threads()


async def test_another_daemons_file_is_refused(tmp_path: Path) -> None:
    """It goes on with it."""
    async with journaling(tmp_path / "j") as journal:
        with pytest.raises(ConfigurationError, match="in use by another process; give each daemon a file of its own"):
            await Journal(tmp_path / "j").open()
        await begun(journal, "a")
    assert await unfinished_in(tmp_path / "j") == ["a"]


async def test_a_disk_that_is_full_at_the_start_is_the_operators_to_mend(tmp_path: Path) -> None:
    """Nothing could be promised."""
    with files_limited(0), pytest.raises(ConfigurationError, match="make room, or choose another path") as caught:
        await Journal(tmp_path / "j").open()
    assert caught.value.setting == "journal"
    assert not threads()


@pytest.mark.parametrize("spoil", SPOILERS)
async def test_a_damaged_file_is_set_aside(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Also one of a later version; a new one is begun, and one line of the log says so."""
    path = tmp_path / "j"
    async with journaling(path) as journal:
        await begun(journal, "a")
    spoil(path)
    spoilt = path.read_bytes()
    async with journaling(path) as journal:
        assert await journal.recent() == ()
        await begun(journal, "b")
    assert await unfinished_in(path) == ["b"]
    aside = tmp_path / "j.corrupt-1"
    assert spoil is make_it_newer or aside.read_bytes()[100:] == spoilt[100:]
    (told,) = warnings_in(caplog)
    assert repr(str(aside)) in told
    assert "busts that a killed daemon had not applied yet never will be" in told


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE busts SET state = 'gone'",
        "UPDATE busts SET kind = 'regex'",
        "UPDATE busts SET target = x'00'",
        "UPDATE busts SET target = CAST(x'61ff' AS TEXT)",
        "UPDATE busts SET layers = '[{}]'",
        "UPDATE busts SET layers = '['",
        "UPDATE busts SET at = 'now'",
    ],
)
async def test_a_row_that_cannot_be_read_is_damage(tmp_path: Path, spoil: str) -> None:
    """Of whatever kind."""
    async with journaling(tmp_path / "j") as journal:
        await begun(journal, "a")
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute(spoil)
    db.close()
    assert await unfinished_in(tmp_path / "j") == []
    assert (tmp_path / "j.corrupt-1").exists()


def spoil_in_use(path: Path, db: sqlite3.Connection) -> None:
    """Spoil all pages but the first, and have them read again."""
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    db.execute("PRAGMA shrink_memory")


@pytest.mark.parametrize("look", [True, False])
async def test_a_file_damaged_in_the_midst_of_the_work_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, look: bool
) -> None:
    """By one that has all that is not over, and every fault, whether a look or a begin met the damage."""
    path = tmp_path / "j"
    async with journaling(path) as journal:
        entries = await begun(journal, *map(str, range(60)))
        for entry in entries[:30]:
            journal.put(replace(entry, state="done"))
        journal.put_fault(Fault(place=3, stage=4, message="m", at=1, first=1))
        await journal.flush()
        await in_thread(journal, partial(spoil_in_use, path))
        if look:
            assert await targets_of(journal, limit=3) == ["59", "58", "57"]
        assert (await begun(journal, "new"))[0].number == 61
        assert not journal._unwritten
        assert journal._store._over == 0
    assert await unfinished_in(path) == [*map(str, range(30, 60)), "new"]
    async with journaling(path) as journal:
        assert [fault.place for fault in journal.faults] == [3]
    assert len(warnings_in(caplog)) == 1


async def test_a_look_that_the_disk_fails_is_told(tmp_path: Path) -> None:
    """As a failure of the journal, and not as an empty list."""
    async with journaling(tmp_path / "j") as journal:
        await begun(journal, "a")
        await in_thread(journal, lambda db: db.execute("ALTER TABLE busts RENAME TO other").fetchall())
        with pytest.raises(JournalFailure, match="no such table"):
            await journal.recent()
        await in_thread(journal, lambda db: db.execute("ALTER TABLE other RENAME TO busts").fetchall())


@pytest.mark.parametrize("path", ["j", None])
async def test_a_fault_of_ours_is_told_as_what_it_is_and_ends_no_writer(
    tmp_path: Path, path: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits hears of it at once, the log has all of it, and what can be written later is."""
    monkeypatch.setattr(module, "_RETRY", 0.01)
    clock = Clock()
    async with journaling(None if path is None else tmp_path / path, clock=clock) as journal:
        (entry,) = await begun(journal, "a")
        right, clock.now = clock.now, 2**63  # no number of SQLite's
        journal.put(replace(entry, state="done"))
        if path is not None:
            with pytest.raises(JournalFailure, match=r"an unexpected error \(OverflowError\), which the daemon's log"):
                await journal.begin(a_bust("b"))
        await eventually(lambda: "OverflowError: Python int too large" in caplog.text)
        clock.now = right
        await begun(journal, "c")
        await eventually(lambda: not journal._unwritten)
        assert [it.state for it in await journal.recent()] == ["waiting", "done"]


async def test_an_error_of_the_database_is_no_damage(tmp_path: Path) -> None:
    """While rows are read."""
    store = module._Store(tmp_path / "j", 1, 1, Clock())

    def fail(db: sqlite3.Connection) -> None:
        with module._rows(db, "SELECT * FROM busts") as rows:
            list(rows)
            db.execute("SELECT * FROM missing")

    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        store.database.use(fail)
    store.database.close()


# Closing


async def test_closing_writes_what_has_gathered(tmp_path: Path) -> None:
    """Those who wait for it are told, and a second time it does nothing."""
    async with journaling(tmp_path / "j") as journal:
        (entry,) = await begun(journal, "a")
        journal.put(replace(entry, state="running"))
        beginning = asyncio.create_task(journal.begin(a_bust("b")))
        flushing = asyncio.create_task(journal.flush())
        await asyncio.sleep(0)
        await journal.close()
        await journal.close()
        await asyncio.gather(beginning, flushing)
        assert not threads()
    assert await all_in(tmp_path / "j") == [("a", "running"), ("b", "waiting")]


@pytest.mark.parametrize("path", [True, False])
async def test_a_closed_journal_takes_nothing(tmp_path: Path, path: bool) -> None:
    """And says why; a new version is kept for nobody."""
    async with journaling(tmp_path / "j" if path else None) as journal:
        pass
    for refused in (journal.begin(a_bust()), journal.find("0" * 32), journal.recent()):
        with pytest.raises(JournalFailure, match="it is closed"):
            await refused
    if path:
        with pytest.raises(JournalFailure, match="it is closed"):
            await journal.flush()
    journal.put(a_bust())
    assert journal._timer is None


async def test_closing_does_not_wait_for_a_disk_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever waits for a commit is told that it failed."""
    journal = Journal(tmp_path / "j", patience=0.05)
    await journal.open()
    with held_up(journal):
        first = asyncio.create_task(journal.begin(a_bust("1")))
        await eventually(lambda: journal._watch is not None)
        second = asyncio.create_task(journal.begin(a_bust("2")))
        flushing = asyncio.create_task(journal.flush())
        await asyncio.sleep(0)
        await journal.close()
        told = await asyncio.gather(first, second, flushing, return_exceptions=True)
    assert [getattr(it, "why", None) for it in told] == ["it was closed meanwhile", "it is closed", "it is closed"]
    assert warnings_in(caplog) == ["the journal was not closed properly; busts that were done may be done once more"]
    await eventually(lambda: not threads())


async def test_closing_that_is_cancelled_still_ends_the_thread(tmp_path: Path) -> None:
    """And the task."""
    tasks = asyncio.all_tasks()
    journal = Journal(tmp_path / "j")
    await journal.open()
    with held_up(journal):
        beginning = asyncio.create_task(journal.begin(a_bust("1")))
        await eventually(lambda: journal._watch is not None)
        closing = asyncio.create_task(journal.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({closing, beginning})
    assert closing.cancelled()
    await eventually(lambda: not threads())
    assert asyncio.all_tasks() <= tasks


async def test_opening_that_is_cancelled_leaves_no_thread(tmp_path: Path) -> None:
    """Nor a lock on the file."""
    opening = asyncio.create_task(Journal(tmp_path / "j").open())
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait({opening})
    assert opening.cancelled()
    await eventually(lambda: not threads())
    assert await unfinished_in(tmp_path / "j") == []


# Faults


async def test_faults_outlive_the_process(tmp_path: Path) -> None:
    """In the order of their places, as they were put last."""
    first = Fault(place=2, stage=4, message="m", binding="go", at=7, first=5, times=3, denial=True)
    async with journaling(tmp_path / "j") as journal:
        for place in (1, 3, 2):
            journal.put_fault(Fault(place=place, stage=3, message="x", at=1, first=1))
        await journal.flush()
        journal.put_fault(first)
        journal.drop_fault(3)
        journal.drop_fault(9)
        assert [fault.place for fault in journal.faults] == [1, 2]
    async with journaling(tmp_path / "j") as journal:
        assert journal.faults == (Fault(place=1, stage=3, message="x", at=1, first=1), first)


async def test_a_fault_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    """The file is set aside."""
    async with journaling(tmp_path / "j") as journal:
        journal.put_fault(Fault(place=1, stage=3, message="x", at=1, first=1))
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("UPDATE faults SET message = x'00'")
    db.close()
    async with journaling(tmp_path / "j") as journal:
        assert journal.faults == ()
    assert (tmp_path / "j.corrupt-1").exists()


# Figures


def test_the_bench_tells_each_number_of_callers(tmp_path: Path) -> None:
    """Begins of many callers share commits; times are not judged."""
    ran = run_bench("journal", tmp_path, "--begins", "128", "--callers", "1,64")
    check_table(ran)
    assert [row["callers"] for row in ran.rows] == [1, 64]
    alone, many = ran.rows
    assert alone["begins"] == many["begins"] == 128
    assert alone["begins_per_commit"] == 1.0
    assert many["begins_per_commit"] > 2
    assert min(alone["bytes_per_entry"], many["bytes_per_entry"]) > 0
