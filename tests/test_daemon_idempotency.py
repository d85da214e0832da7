"""Idempotency keys: once applied, often answered; remembered over restarts; a memory that fails refuses nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import resource
import signal
import sqlite3
import stat
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from pybustcall.daemon import (
    BackendFailure,
    DaemonSettings,
    Engine,
    FaultHistory,
    Idempotency,
    KeyReused,
    create_app,
    serve,
)
from pybustcall.daemon import idempotency as module
from pybustcall.daemon.idempotency import fingerprint_of, name_of
from pybustcall.errors import ConfigurationError
from pybustcall.models import BustRequest, CapabilityDocument, cache_key_of
from tests.conftest import PATIENCE, StartDaemon, eventually
from tests.plain_cache import engine_over
from tests.test_daemon_app import BINDINGS, BUST, CAPABILITIES, Gate, history_of, refused, running, serving

KEY = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
TOKEN = "s3cret-t0ken"
THREAD = "pybustcall-idempotency"


class Clock:
    """A wall clock that stands until it is set."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Work:
    """Applies requests, and counts it; fails as often as it is told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.begun = 0
        self.applied = 0
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self) -> bytes:
        self.begun += 1
        await self.open.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.applied += 1
        return b"answer %d" % self.applied


@asynccontextmanager
async def remembering(path: Path | None = None, **more: Any) -> AsyncIterator[Idempotency]:
    """Open a memory; afterwards it is closed, and neither task nor thread of it is left."""
    tasks = asyncio.all_tasks()
    memory = Idempotency(path, **more)
    await memory.open()
    try:
        yield memory
    finally:
        await memory.close()
    assert asyncio.all_tasks() <= tasks
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


async def once(memory: Idempotency, work: Callable[[], Awaitable[bytes]], key: str = "k", request: str = "r") -> str:
    """Ask with a key; a "+" after the body stands for a replay."""
    answer = await memory.once(name_of(None, key), request.encode(), work)
    return answer.body.decode() + "+" * answer.replayed


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def modes_in(directory: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}


def all_in(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in directory.iterdir())


# Once


async def test_a_repeat_is_answered_from_memory() -> None:
    """With the same body, and without being applied."""
    work = Work()
    async with remembering() as memory:
        assert await once(memory, work) == "answer 1"
        assert await once(memory, work) == "answer 1+"
        assert await once(memory, work, key="other") == "answer 2"
    assert work.applied == 2


async def test_a_key_of_another_request_is_refused() -> None:
    """From memory, and also while the other is being applied; nothing is applied for it."""
    work, other = Work(), Work()
    work.open.clear()
    async with remembering() as memory:
        first = asyncio.create_task(once(memory, work))
        await eventually(lambda: work.begun)
        with pytest.raises(KeyReused, match="used for another request"):
            await once(memory, other, request="s")
        work.open.set()
        await first
        with pytest.raises(KeyReused):
            await once(memory, other, request="s")
        assert await once(memory, work) == "answer 1+"
    assert other.begun == 0


async def test_a_failure_is_not_remembered() -> None:
    """The next one with the key is applied, even if it asks for something else."""
    work = Work(BackendFailure("x"), LookupError("y"))
    async with remembering() as memory:
        with pytest.raises(BackendFailure):
            await once(memory, work)
        with pytest.raises(LookupError):
            await once(memory, work, request="s")
        assert await once(memory, work) == "answer 1"


async def test_those_who_wait_take_over_one_by_one_when_the_first_fails() -> None:
    """Each failure is told to one; the first success is everybody's."""
    work = Work(BackendFailure("1"), BackendFailure("2"))
    work.open.clear()
    async with remembering() as memory:
        asked = [asyncio.create_task(once(memory, work)) for _ in range(10)]
        await eventually(lambda: work.begun)
        work.open.set()
        told = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(error) for error in told if isinstance(error, BackendFailure)] == ["1", "2"]
    assert Counter(answer for answer in told if isinstance(answer, str)) == {"answer 1": 1, "answer 1+": 7}
    assert (work.begun, work.applied) == (3, 1)


async def test_those_who_wait_take_over_when_the_work_is_cancelled() -> None:
    """Whatever cancelled it, the first of them begins anew."""
    work = Work()
    work.open.clear()
    async with remembering() as memory:
        asked = [asyncio.create_task(once(memory, work)) for _ in range(3)]
        await eventually(lambda: work.begun)
        next(iter(memory._flights.values())).task.cancel()
        await eventually(lambda: work.begun == 2)
        work.open.set()
        told = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(told[0], asyncio.CancelledError)
    assert told[1:] == ["answer 1", "answer 1+"]


async def test_a_caller_that_is_cancelled_breaks_nothing_off() -> None:
    """Whoever waits gets the answer, whoever comes later finds it, and it was applied once."""
    work = Work()
    work.open.clear()
    async with remembering() as memory:
        first, second, third = (asyncio.create_task(once(memory, work)) for _ in range(3))
        await eventually(lambda: work.begun)
        for task in (first, second):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert repr(memory) == "Idempotency(in memory, 1 under way)"
        work.open.set()
        assert await third == "answer 1+"
        assert await once(memory, work) == "answer 1+"
        assert repr(memory) == "Idempotency(in memory, 0 under way)"
    assert (work.begun, work.applied) == (1, 1)


async def test_a_failure_that_nobody_is_told_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Its caller went away."""
    work = Work(BackendFailure("the disk is gone"))
    work.open.clear()
    async with remembering() as memory:
        first = asyncio.create_task(once(memory, work))
        await eventually(lambda: work.begun)
        first.cancel()
        work.open.set()
        await eventually(lambda: not memory._flights)
    assert warnings_in(caplog) == ["a request whose client went away failed: the disk is gone"]


async def test_closing_breaks_off_what_is_under_way() -> None:
    """And a memory that is closed remembers nothing, while requests are still applied."""
    work = Work()
    work.open.clear()
    async with remembering() as memory:
        first = asyncio.create_task(once(memory, work))
        await eventually(lambda: work.begun)
        await memory.close()
        with pytest.raises(asyncio.CancelledError):
            await first
        work.open.set()
        assert await once(memory, work) == "answer 1"
        assert await once(memory, work) == "answer 2"


# How long, and how many


async def test_an_answer_is_remembered_for_ten_minutes() -> None:
    """And not a moment longer, counted from its remembering."""
    clock, work = Clock(), Work()
    async with remembering(clock=clock) as memory:
        await once(memory, work)
        clock.now += 599.9
        assert await once(memory, work) == "answer 1+"
        clock.now += 0.1
        assert await once(memory, work) == "answer 2"
        assert await once(memory, work) == "answer 2+"
    assert (module.WINDOW, module.MOST) == (600, 100_000)


async def test_what_is_too_old_is_removed() -> None:
    """As soon as something else is remembered."""
    clock, work = Clock(), Work()
    async with remembering(clock=clock) as memory:
        for number in range(5):
            await once(memory, work, key=str(number))
        clock.now += 600
        await once(memory, work, key="5")
        assert memory._store._count == 1


async def test_a_clock_set_back_keeps_nothing_for_ever() -> None:
    """What then lies in the future is known for ten minutes more."""
    clock, work = Clock(), Work()
    async with remembering(clock=clock) as memory:
        await once(memory, work)
        clock.now -= 86_400
        assert await once(memory, work) == "answer 1+"
        clock.now += 599
        assert await once(memory, work) == "answer 1+"
        clock.now += 1
        assert await once(memory, work) == "answer 2"


async def test_a_clock_set_back_between_two_runs_keeps_nothing_for_ever(tmp_path: Path) -> None:
    """The same, where nobody saw it happen."""
    clock, work = Clock(), Work()
    async with remembering(tmp_path / "s", clock=clock) as memory:
        await once(memory, work)
    clock.now -= 86_400
    async with remembering(tmp_path / "s", clock=clock) as memory:
        assert await once(memory, work) == "answer 1+"
        clock.now += 600
        assert await once(memory, work) == "answer 2"


async def test_a_clock_set_forward_forgets_and_then_remembers_again() -> None:
    """It costs what was remembered, and nothing else."""
    clock, work = Clock(), Work()
    async with remembering(clock=clock) as memory:
        await once(memory, work)
        clock.now += 86_400
        assert await once(memory, work) == "answer 2"
        clock.now -= 86_400
        assert await once(memory, work) == "answer 2+"


async def test_beyond_the_limit_the_oldest_go(tmp_path: Path) -> None:
    """In the order in which they were remembered, also after a restart with a lower limit."""
    work = Work()
    async with remembering(tmp_path / "s", most=3) as memory:
        for key in "abcd":
            await once(memory, work, key=key)
        assert [await once(memory, work, key=key) for key in "dcb"] == ["answer 4+", "answer 3+", "answer 2+"]
        assert await once(memory, work, key="a") == "answer 5"
    async with remembering(tmp_path / "s", most=2) as memory:
        await once(memory, work, key="e")
        assert [await once(memory, work, key=key) for key in "ae"] == ["answer 5+", "answer 6+"]
        assert memory._store._count == 2
        assert await once(memory, work, key="d") == "answer 7"


# Names and fingerprints


def test_a_name_belongs_to_a_token_and_a_key() -> None:
    """And shows neither."""
    names = {name_of(token, key) for token in (None, "a", "b") for key in ("k", "l")}
    assert len(names) == 6
    assert {len(name) for name in names} == {32}


def test_a_fingerprint_is_of_what_changes_the_effect() -> None:
    """The target and the strategy, whether said or left to the default; not who asks, nor what they tolerate."""

    def fingerprint(**fields: object) -> bytes:
        return fingerprint_of(BustRequest.model_validate({"target": "a", **fields}))

    assert fingerprint() == fingerprint(strategy="dimensional", binding="go", fault_tolerance=0)
    assert len({fingerprint(), fingerprint(target="b"), fingerprint(strategy="direct")}) == 3
    assert fingerprint(target='a", "b', strategy="c") != fingerprint(target="a", strategy='b", "c')


# The file


async def test_a_file_outlives_the_process(tmp_path: Path) -> None:
    """It is private, whatever the umask; nothing of SQLite's stays beside it."""
    path, work = tmp_path / "s", Work()
    mask = os.umask(0)
    try:
        async with remembering(path) as memory:
            await once(memory, work)
            assert modes_in(tmp_path) == {0o600}
            assert str(path) in repr(memory)
    finally:
        os.umask(mask)
    path.chmod(0o644)
    async with remembering(path) as memory:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await once(memory, work) == "answer 1+"
        with pytest.raises(KeyReused):
            await once(memory, work, request="s")
    assert os.listdir(tmp_path) == ["s"]


async def test_a_file_is_one_daemons_alone(tmp_path: Path) -> None:
    """What another daemon did to its own cache must not be told here."""
    path, work = tmp_path / "s", Work()
    async with remembering(path) as memory:
        with pytest.raises(ConfigurationError, match="in use by another process") as caught:
            await Idempotency(path).open()
        assert caught.value.setting == "state"
        assert await once(memory, work) == "answer 1"
        assert await once(memory, work) == "answer 1+"
    async with remembering(path) as memory:
        assert await once(memory, work) == "answer 1+"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.symlink_to("missing")


def make_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE precious (x)")
    db.close()


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
    path = tmp_path / "s"
    make(path)
    before = path.lstat()
    with pytest.raises(ConfigurationError, match=reason) as caught:
        await Idempotency(path).open()
    assert caught.value.setting == "state"
    assert str(path) in str(caught.value)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


async def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    """With what to do."""
    with pytest.raises(ConfigurationError, match="No such file or directory; choose another path, or make its direct"):
        await Idempotency(tmp_path / "missing" / "s").open()


def spoil_wholly(path: Path) -> None:
    path.write_bytes(random.Random(7).randbytes(20_000))


def spoil_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


def spoil_the_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:200] = b"\xff" * 100
    path.write_bytes(data)


def make_it_newer(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


SPOILERS = [spoil_wholly, spoil_a_page, spoil_the_header, make_it_newer]


@pytest.mark.parametrize("spoil", SPOILERS)
async def test_a_damaged_file_is_set_aside(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Whole, under a name that is free; a new one is begun, and one line of the log says so."""
    path, work = tmp_path / "s", Work()
    (tmp_path / "s.corrupt-1").write_text("of an earlier time")
    async with remembering(path) as memory:
        await once(memory, work)
    spoil(path)
    spoilt = path.read_bytes()
    async with remembering(path) as memory:
        assert await once(memory, work) == "answer 2"
        assert await once(memory, work) == "answer 2+"
    assert (tmp_path / "s.corrupt-1").read_text() == "of an earlier time"
    aside = tmp_path / "s.corrupt-2"
    assert spoil is make_it_newer or aside.read_bytes()[100:] == spoilt[100:]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (told,) = warnings_in(caplog)
    assert "cannot be used" in told
    assert repr(str(aside)) in told


async def test_a_file_damaged_in_the_midst_of_the_work_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The request that meets it is applied, and remembered in the new file."""
    path, work = tmp_path / "s", Work()
    async with remembering(path) as memory:
        for number in range(200):
            await once(memory, work, key=str(number))
    async with remembering(path) as memory:
        data = bytearray(path.read_bytes())
        with path.open("r+b") as file:  # the schema stays, all pages of the table and its indexes go
            file.seek(4096)
            file.write(b"\xff" * (len(data) - 4096))
        await asyncio.get_running_loop().run_in_executor(memory._thread, shrink, memory)
        assert await once(memory, work, key="7") == "answer 201"
        assert await once(memory, work, key="7") == "answer 201+"
    assert sorted(os.listdir(tmp_path))[:2] == ["s", "s.corrupt-1"]
    assert len(warnings_in(caplog)) == 1


def test_without_a_file_there_is_nothing_to_set_aside() -> None:
    """The memory is begun anew."""
    store = module._Store(None, 600, 10, Clock())
    store.remember(b"n", b"r", b"body")
    assert store.recall(b"n") == (b"r", b"body")
    store.database.set_aside("as if")
    assert store.recall(b"n") is None
    store.database.close()
    store.database.close()


def shrink(memory: Idempotency) -> None:
    """Let SQLite forget the pages that it has read."""
    db = memory._store.database._db
    assert db is not None
    db.execute("PRAGMA shrink_memory")


# A memory that fails


@contextmanager
def files_limited(pid: int, size: int = 0) -> Iterator[None]:
    """Let a process write no file beyond `size` bytes, as on a disk that is full."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


async def test_what_cannot_be_remembered_is_applied_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full database costs the repeat another effect, and one line of the log; once there is room it remembers."""
    work = Work()
    async with remembering(tmp_path / "s") as memory:

        def limit(pages: int) -> None:
            db = memory._store.database._db
            assert db is not None
            db.execute(f"PRAGMA max_page_count = {pages}")

        loop = asyncio.get_running_loop()
        await loop.run_in_executor(memory._thread, limit, 1)  # no less than there are already
        answers = [await once(memory, work, key=str(number)) for number in range(300)]
        assert answers == [f"answer {number}" for number in range(1, 301)]
        full = await once(memory, work, key="299")
        assert full == "answer 301"
        await loop.run_in_executor(memory._thread, limit, 1_000_000)
        assert await once(memory, work, key="299") == "answer 302"
        assert await once(memory, work, key="299") == "answer 302+"
        assert await once(memory, work, key="0") == "answer 1+"
        count = memory._store._count
    async with remembering(tmp_path / "s") as memory:
        assert memory._store._count == count
    (told,) = warnings_in(caplog)
    assert told.startswith("an idempotency key could not be remembered; a repeat may be applied again: ")
    assert "full" in told


async def test_a_disk_that_is_full_at_the_start_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon starts, applies, and remembers as soon as it can."""
    work = Work()
    memory = Idempotency(tmp_path / "s")
    with files_limited(0):
        await memory.open()
        assert await once(memory, work) == "answer 1"
    assert await once(memory, work) == "answer 2"
    assert await once(memory, work) == "answer 2+"
    await memory.close()
    (told,) = warnings_in(caplog)
    assert told.startswith("idempotency keys cannot be remembered for now: ")


class Stuck(Clock):
    """A clock that stops whoever asks it, as a disk does that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()

    def __call__(self) -> float:
        self.free.wait(PATIENCE)
        return self.now


async def test_a_memory_that_does_not_answer_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Neither when the key is looked up nor when it is remembered; what waits there is done when it can be."""
    clock, work = Stuck(), Work()
    async with remembering(clock=clock, patience=0.05) as memory:
        clock.free.clear()
        assert await once(memory, work) == "answer 1"
        assert memory._waiting == 2
        clock.free.set()
        await eventually(lambda: not memory._waiting)
        assert await once(memory, work) == "answer 1+"
    (told,) = warnings_in(caplog)
    assert told == "an idempotency key could not be looked up, and its request is applied: no answer in 0.05 seconds"


async def test_a_failure_that_is_no_longer_waited_for_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    """It is not reported as an error that was never looked at."""
    clock = Stuck()
    async with remembering(clock=clock, patience=0.01) as memory:
        clock.free.clear()

        def fail() -> None:
            clock()
            raise sqlite3.OperationalError("late")

        with pytest.raises(TimeoutError):
            await memory._ask(fail)
        clock.free.set()
        await eventually(lambda: not memory._waiting)
    assert not caplog.records


async def test_what_waits_for_a_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it nothing is asked of it."""
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    clock, work = Stuck(), Work()
    async with remembering(clock=clock, patience=0.02) as memory:
        clock.free.clear()
        for number in range(5):
            assert await once(memory, work, key=str(number)) == f"answer {number + 1}"
        assert memory._waiting == 3
        clock.free.set()


async def test_a_memory_that_hangs_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """It is left behind, and ends when it can."""
    clock = Stuck()
    memory = Idempotency(clock=clock, patience=0.02)
    await memory.open()
    clock.free.clear()
    assert await once(memory, Work()) == "answer 1"
    await memory.close()
    clock.free.set()
    await eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)])
    assert "not closed properly" in warnings_in(caplog)[-1]


async def test_an_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    """The thread closes what it was about to open, and ends."""
    clock = Stuck()
    memory = Idempotency(tmp_path / "s", clock=clock)
    clock.free.clear()
    opening = asyncio.create_task(memory.open())
    await eventually((tmp_path / "s").exists)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    clock.free.set()
    await eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)])
    async with remembering(tmp_path / "s"):
        pass


# Over HTTP


async def ask(client: Any, key: str | None = "k", **fields: object) -> tuple[int, bytes, str | None]:
    """Bust with a key; tell the status, the body and whether it was replayed."""
    headers = {} if key is None else {KEY: key}
    async with client.post(BUST, json={"target": "a", **fields}, headers=headers) as response:
        return response.status, await response.read(), response.headers.get(REPLAYED)


def opened(gate: Gate) -> Gate:
    gate.open.set()
    return gate


@pytest.mark.requirement("RES-02")
async def test_a_repeated_bust_is_answered_alike_and_applied_once() -> None:
    """The very same JSON, marked as replayed; other tolerance and another binding make it no other request."""
    gate = opened(Gate())
    async with running(engine_over(gate)) as client:
        status, body, replayed = await ask(client)
        assert (status, replayed) == (200, None)
        assert json.loads(body)["cache_key"] == cache_key_of("a")
        assert await ask(client, strategy="dimensional", binding="go", fault_tolerance=0) == (200, body, "true")
        assert gate.removed == ["a"]
        assert (await ask(client, key="l"))[2] is None
        assert (await ask(client, key=None))[2] is None
        assert gate.removed == ["a"] * 3


@pytest.mark.parametrize("fields", [{"target": "b"}, {"strategy": "direct"}, {"strategy": "x"}])
async def test_a_key_of_another_bust_is_a_422(fields: dict[str, object]) -> None:
    """The problem names the header, and repeats neither key nor target; nothing is applied."""
    gate, history = opened(Gate()), FaultHistory()
    async with running(engine_over(gate), history) as client:
        await ask(client, key="private")
        async with client.post(
            BUST, json={"target": "private", "binding": "go", **fields}, headers={KEY: "private"}
        ) as response:
            problem = await refused(response, 422)
        assert problem.field == KEY
        assert "private" not in problem.detail
        assert await history_of(client) == [(4, "go")]
    assert gate.removed == ["a"]


@pytest.mark.parametrize("key", ["", "x" * 256, "two words", "a\tb", "é", "a, b"])
async def test_what_cannot_be_a_key_is_a_400(key: str) -> None:
    """The problem names the header; nothing is applied."""
    gate = opened(Gate())
    async with running(engine_over(gate)) as client:
        async with client.post(BUST, json={"target": "a"}, headers={KEY: key}) as response:
            problem = await refused(response, 400)
    assert problem.field == KEY
    assert gate.removed == []


@pytest.mark.parametrize("key", ["!", "~" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "a,b"])
async def test_what_can_be_a_key_is_taken_as_it_is(key: str) -> None:
    """Any visible ASCII, quotes included."""
    async with running() as client:
        assert [(await ask(client, key))[2] for _ in range(2)] == [None, "true"]


async def test_two_keys_in_one_request_are_a_400() -> None:
    """Also if they are the same."""
    async with running() as client:
        for key in ("l", "k"):
            async with client.post(BUST, json={"target": "a"}, headers=[(KEY, "k"), (KEY, key)]) as response:
                assert (await refused(response, 400)).field == KEY


async def test_a_request_that_says_too_little_is_told_that_first() -> None:
    """A malformed body before the key, the key before the fields; and none of it is remembered."""
    async with running() as client:
        async with client.post(BUST, data=b"{", headers={KEY: "two words", "Content-Type": "application/json"}) as it:
            assert (await refused(it, 400)).field is None
        async with client.post(BUST, json={}, headers={KEY: "two words"}) as it:
            assert (await refused(it, 400)).field == KEY
        for document in ({}, {"target": "a", "strategy": "x"}):
            async with client.post(BUST, json=document, headers={KEY: "k"}) as it:
                assert (await refused(it, 422)).field in {"target", "strategy"}
        assert (await ask(client))[2] is None


async def test_a_bust_that_failed_is_not_remembered() -> None:
    """The repeat is applied, and succeeds once the cache is mended."""
    gate = opened(Gate(BackendFailure("the disk is gone")))
    async with running(engine_over(gate)) as client:
        assert [(await ask(client))[0] for _ in range(2)] == [500, 500]
        gate.failure = None
        assert [(await ask(client))[0::2] for _ in range(2)] == [(200, None), (200, "true")]


async def test_fifty_repeats_at_once_are_applied_once() -> None:
    """All get the same body, one of them as the first."""
    gate = Gate()
    async with serving(engine_over(gate), port=0) as (url, _), aiohttp.ClientSession(url) as client:
        asked = [asyncio.create_task(ask(client)) for _ in range(50)]
        await asyncio.to_thread(gate.entered.wait, PATIENCE)
        gate.open.set()
        told = await asyncio.gather(*asked)
    assert gate.removed == ["a"]
    assert {(status, body) for status, body, _ in told} == {(200, told[0][1])}
    assert Counter(replayed for _, _, replayed in told) == {None: 1, "true": 49}


@asynccontextmanager
async def served(engine: Engine, *, cancels: bool) -> AsyncIterator[tuple[int, web.Server]]:
    """Serve with a runner that cancels the handlers of clients that went away, or one that does not, as `serve`."""
    runner = web.AppRunner(create_app(engine, DaemonSettings()), handler_cancellation=cancels)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        assert runner.server is not None
        yield runner.addresses[0][1], runner.server
    finally:
        await runner.cleanup()


def connected(server: web.Server) -> int:
    return sum(connection.transport is not None for connection in server.connections)


@pytest.mark.parametrize("cancels", [False, True])
async def test_the_answer_of_a_client_that_went_away_is_for_those_who_wait(cancels: bool) -> None:
    """Closing the connection in the middle breaks no bust off, and has it applied no second time."""
    gate = Gate()
    body = b'{"target": "a"}'
    async with (
        served(engine_over(gate), cancels=cancels) as (port, server),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client,
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {BUST} HTTP/1.1\r\nHost: localhost\r\n{KEY}: k\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.to_thread(gate.entered.wait, PATIENCE)
        waiting = asyncio.create_task(ask(client))
        try:
            await eventually(lambda: connected(server) == 2)
            writer.transport.abort()
            await eventually(lambda: connected(server) == 1)
            assert not waiting.done()
        finally:
            gate.open.set()
        status, told, replayed = await waiting
        assert (status, replayed) == (200, "true")
        assert await ask(client) == (200, told, "true")
    assert gate.removed == ["a"]


async def test_a_daemon_that_stops_answers_those_who_wait() -> None:
    """The drain lets the first finish, and so its repeats."""
    gate = Gate()
    async with serving(engine_over(gate), port=0) as (url, task), aiohttp.ClientSession(url) as client:
        asked = [asyncio.create_task(ask(client)) for _ in range(2)]
        await asyncio.to_thread(gate.entered.wait, PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)
        gate.open.set()
        assert sorted(str(replayed) for _, _, replayed in await asyncio.gather(*asked)) == ["None", "true"]
        await asyncio.wait_for(task, PATIENCE)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


async def test_a_drain_that_is_over_breaks_off_the_first_and_its_repeats() -> None:
    """Nothing of them is left, neither task nor thread of ours."""
    gate = Gate()
    async with serving(engine_over(gate), port=0, drain=0.05) as (url, task), aiohttp.ClientSession(url) as client:
        asked = [asyncio.create_task(ask(client)) for _ in range(3)]
        await asyncio.to_thread(gate.entered.wait, PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, PATIENCE)
        gate.open.set()
        told = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(error, aiohttp.ClientConnectionError) for error in told)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


async def test_the_token_is_not_in_the_file_and_its_keys_are_its_own(tmp_path: Path) -> None:
    """A daemon that was given another token knows nothing of the old one's keys."""
    path, gate = tmp_path / "s", opened(Gate())
    told = []
    for token in (TOKEN, TOKEN, "another", None):
        app = create_app(engine_over(gate), DaemonSettings(token=token, state=str(path)))
        async with TestClient(TestServer(app), headers={"Authorization": f"Bearer {token}"}) as client:
            told.append((await ask(client, key="key-to-look-for"))[2])
            assert not [word for word in (TOKEN.encode(), b"key-to-look-for") if word in all_in(tmp_path)]
    assert told == [None, "true", None, None]


@pytest.mark.parametrize("token", [None, TOKEN])
async def test_the_capability_is_advertised_with_the_access_of_a_bust(token: str | None) -> None:
    """On both routes; it has no endpoint of its own."""
    async with running(token=token) as client:
        async with client.get(CAPABILITIES) as response:
            document = CapabilityDocument.model_validate_json(await response.read())
        async with client.get(BINDINGS) as response:
            assert "cache.bust.idempotent" in (await response.json())["pybustcall"]["capabilities"]
    assert "cache.bust.idempotent" in document.capabilities
    assert "cache.bust.idempotent" not in document.endpoints
    assert document.access["cache.bust.idempotent"] == document.access["cache.bust"]


async def test_a_memory_of_ones_own_is_opened_and_closed_with_the_application() -> None:
    """So that a test can have its clock."""
    clock = Clock()
    gate = opened(Gate())
    app = create_app(engine_over(gate), DaemonSettings(), idempotency=Idempotency(clock=clock))
    async with TestClient(TestServer(app)) as client:
        told = [(await ask(client))[2]]
        clock.now += 600
        told += [(await ask(client))[2] for _ in range(2)]
    assert told == [None, None, "true"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


async def test_a_state_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    """The daemon does not begin to serve, and leaves nothing."""

    def unexpected(url: str) -> None:
        raise AssertionError(url)

    with pytest.raises(ConfigurationError, match="is not a regular file") as caught:
        await serve(engine_over(Gate()), DaemonSettings(port=0, state=tmp_path), ready=unexpected)
    assert caught.value.setting == "state"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


# In a process of its own


async def test_a_killed_daemon_still_knows(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Kill -9, and a new process with the same file: the answer is the same, and what came after the bust stays."""
    state = tmp_path / "kept" / "state"
    state.parent.mkdir()
    daemon = start_daemon("--state", str(state))
    page = daemon.root / "a"
    page.write_text("old")
    async with aiohttp.ClientSession(daemon.url) as client:
        status, body, replayed = await ask(client)
    assert (status, json.loads(body)["removed"], replayed) == (200, 1, None)
    assert modes_in(state.parent) == {0o600}
    daemon.kill()
    page.write_text("new")
    async with aiohttp.ClientSession(start_daemon("--state", str(state)).url) as client:
        assert await ask(client) == (200, body, "true")
        assert (await ask(client, target="b"))[0] == 422
    assert page.read_text() == "new"


async def test_a_daemon_without_a_file_forgets_when_it_ends(start_daemon: StartDaemon) -> None:
    """It keeps its keys in memory."""
    for _ in range(2):
        daemon = start_daemon()
        async with aiohttp.ClientSession(daemon.url) as client:
            assert [(await ask(client))[2] for _ in range(2)] == [None, "true"]
        daemon.kill()


async def test_on_a_full_disk_busts_are_applied_and_answered(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """They are not remembered; with room again, they are."""
    daemon = start_daemon("--state", str(tmp_path / "state"))
    async with aiohttp.ClientSession(daemon.url) as client:
        with files_limited(daemon.process.pid):
            assert [(await ask(client))[0::2] for _ in range(3)] == [(200, None)] * 3
        assert [(await ask(client))[0::2] for _ in range(2)] == [(200, None), (200, "true")]


# Any order of things


@dataclass(frozen=True)
class Request:
    """One request of a random run: when it comes, what it asks, how long its work takes, and what befalls it."""

    wait: int
    key: str
    request: str
    work: int
    fails: bool
    cancelled_after: int | None


ticks = st.integers(0, 40)
requests = st.builds(
    Request,
    wait=ticks,
    key=st.sampled_from("kl"),
    request=st.sampled_from("rrrs"),
    work=st.integers(0, 20),
    fails=st.booleans(),
    cancelled_after=st.none() | ticks,
)


async def tick(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def quiet(memory: Idempotency) -> bool:
    return not memory._flights


async def play(runs: list[list[Request]], path: Path) -> None:
    """Play requests that overlap, in several lives of one memory; hold what must be true of any of them."""
    applied: dict[tuple[str, str], list[str]] = {}
    answered: dict[tuple[str, str], list[tuple[str, bool]]] = {}

    async def one(memory: Idempotency, asked: Request) -> None:
        async def work() -> bytes:
            await tick(asked.work)
            if asked.fails:
                raise BackendFailure("x")
            bodies = applied.setdefault((asked.key, asked.request), [])
            bodies.append(f"{asked.key}{asked.request}{len(bodies)}")
            return bodies[-1].encode()

        await tick(asked.wait)
        asking = asyncio.create_task(memory.once(name_of(None, asked.key), asked.request.encode(), work))
        if asked.cancelled_after is not None:
            await tick(asked.cancelled_after)
            asking.cancel()
        try:
            answer = await asking
        except KeyReused:
            return
        except BackendFailure:
            assert asked.fails
        except asyncio.CancelledError:
            assert asked.cancelled_after is not None
        else:
            answered.setdefault((asked.key, asked.request), []).append((answer.body.decode(), answer.replayed))

    for run in runs:
        async with remembering(path, clock=Clock(), patience=10 * PATIENCE) as memory:  # a slow disk is another test
            await asyncio.gather(*(one(memory, asked) for asked in run))
            await eventually(partial(quiet, memory))
    for key in "kl":
        assert sum(len(applied.get((key, request), [])) for request in "rs") <= 1
    for what, answers in answered.items():
        assert {body for body, _ in answers} == set(applied[what])
        assert sum(not replayed for _, replayed in answers) <= 1


@given(st.lists(st.lists(requests, max_size=8), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_in_any_order_of_things_a_key_has_one_effect(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[Request]]
) -> None:
    """Overlapping, failing and cancelled requests, other requests with the same key, restarts: one effect per key."""
    asyncio.run(play(runs, tmp_path_factory.mktemp("s") / "s"))
