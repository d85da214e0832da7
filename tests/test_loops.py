"""One client over many event loops, processes and threads: every one is served, and none leaves anything behind.

Forks happen in an interpreter of their own, so that no child inherits the test runner. What one loop, one fork or one
thread needs of the pool alone is in test_session.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pybustcall import BustcallClient, Probes
from pybustcall.telemetry import BustDeferred, Event
from pybustcall.testing import FakeDaemon
from tests.conftest import PATIENCE, StartDaemon, eventually, wait_until

DEAD = "http://127.0.0.1:1"


def descriptors() -> int:
    """Count the open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def client_threads() -> list[str]:
    """List the threads that belong to clients."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pybustcall-")]


def run_hundred(factory: Callable[[], asyncio.AbstractEventLoop] | None, hub: str, path: Path) -> None:
    """Run a hundred loops with one client that has everything: peers, probes, an outbox and a hook."""
    events: list[Event] = []
    troubles: list[dict[str, Any]] = []
    client = BustcallClient(hub, peers=[DEAD], outbox=path, retry=None, probes=Probes(hub=0.001, peers=0.001))
    client.on_event(events.append)
    counts: list[int] = []

    async def use(number: int) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, trouble: troubles.append(trouble))
        assert (await client.bust(f"key/{number}")).ok
        result = await client.bust(f"owed/{number}", delivery="all")  # the peer is down, and is owed it
        assert result.status == "partial"
        await asyncio.sleep(0)
        assert (await client.outbox.counts()).aside == 0

    async def close() -> int:
        pending = [row.bust.target for row in await client.outbox.rows()]
        assert sorted(pending) == sorted(f"owed/{number}" for number in range(100))
        await client.aclose()
        return client.statistics().deferred

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.sleep(0))  # uvloop keeps two descriptors for good
    before = descriptors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(100):
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(use(number))
            counts.append(descriptors())
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(close()) == 100
        gc.collect()
    assert max(counts[10:]) <= counts[9], "descriptors grow with the loops"
    assert descriptors() <= before
    assert troubles == []
    assert sum(isinstance(event, BustDeferred) for event in events) == 100
    wait_until(lambda: not client_threads(), "a thread is left")


def test_a_client_with_everything_serves_a_hundred_loops_in_a_row(
    start_daemon: StartDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing grows, no task is destroyed while it is pending, and the outbox holds what each loop put there."""
    run_hundred(None, start_daemon().url, tmp_path / "o.db")
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_client_with_everything_serves_a_hundred_loops_of_uvloop(
    start_daemon: StartDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same on another implementation of the loop."""
    uvloop = pytest.importorskip("uvloop")
    run_hundred(uvloop.new_event_loop, start_daemon().url, tmp_path / "o.db")
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def test_threads_with_loops_of_their_own_share_a_client_and_its_outbox(tmp_path: Path) -> None:
    """Eight threads at once: each loop has its own fleet and courier, all rows are in one file, hooks are told all."""
    async with FakeDaemon() as fake:
        client = BustcallClient(DEAD, peers=[fake.url], outbox=tmp_path / "o.db", delivery="all", probes=Probes())
        events: list[Event] = []
        client.on_event(events.append)
        failures: list[BaseException] = []

        def work(name: int) -> None:
            async def run() -> None:
                results = await asyncio.gather(*(client.bust(f"t{name}/{number}") for number in range(5)))
                assert [result.status for result in results] == ["partial"] * 5
                assert len(client.topology().daemons) == 2

            try:
                asyncio.run(run())
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join, PATIENCE)
        assert failures == []
        wanted = {f"t{name}/{number}" for name in range(8) for number in range(5)}
        rows = await client.outbox.rows()
        assert {row.bust.target for row in rows} == wanted
        assert {row.destination for row in rows} == {DEAD}
        assert {bust.target for bust in fake.applied} == wanted
        assert client.statistics().deferred == 40
        await client.aclose()
        assert {event.target for event in events if isinstance(event, BustDeferred)} == wanted
        await eventually(lambda: not client_threads(), "a thread is left")


FORKS = """
import asyncio, gc, json, os, sys, threading, warnings
from pybustcall import BustcallClient
from pybustcall.telemetry import BustDeferred

warnings.simplefilter("error")
hub, used, path, children = sys.argv[1], sys.argv[2] == "used", sys.argv[3], 4
dead = [f"http://127.0.0.1:{port}" for port in range(1, 7)]
events = []
client = BustcallClient(hub, peers=dead, outbox=path, delivery="first")
client.on_event(events.append)

async def bust(name, times):
    troubles = []
    asyncio.get_running_loop().set_exception_handler(lambda _, trouble: troubles.append(trouble))
    for number in range(times):
        assert (await client.bust(f"{name}/{number}")).ok
    result = await client.bust(f"{name}/owed", delivery="quorum", fault_tolerance=6)
    assert result.status == "partial", result
    assert not troubles, troubles
    return client.topology().order, len(result.rows)

async def close(name, owed):
    rows = await client.outbox.rows()
    assert sum(row.bust.target == f"{name}/owed" for row in rows) == owed
    await client.aclose()

def work(name, before):
    order, owed = asyncio.run(bust(name, 3))
    asyncio.run(close(name, owed))
    told = sum(isinstance(event, BustDeferred) and event.target == f"{name}/owed" for event in events)
    assert told == owed == 6, (told, owed)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("pybustcall-outbox")]
    assert not left, left
    return order

if used:
    asyncio.run(bust("before", 2))
pipes = []
for child in range(children):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writing, json.dumps(work(f"child{child}", used)).encode())
            gc.collect()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    pipes.append((pid, reading))
mine = work("parent", used)
orders = [tuple(mine)]
for pid, reading in pipes:
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    with open(reading, "rb") as pipe:
        orders.append(tuple(json.loads(pipe.read())))
assert {order[0] for order in orders} == {hub}
assert len(set(orders)) > 1, "every process asks the peers in the same order"
print("well")
"""


def interpret(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own, with this one's packages."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("used", ["unused", "used"])
def test_a_client_made_before_a_fork_serves_parent_and_children(
    used: str, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """As under gunicorn with preload: all bust, share the outbox, have their own hooks and their own order of peers."""
    ended = interpret(FORKS, start_daemon().url, used, str(tmp_path / "o.db"))
    assert (ended.stdout, ended.returncode) == ("well\n", 0), ended.stderr
    assert ended.stderr == ""


FORK_IN_LOOP = """
import asyncio, os, sys, threading, warnings
from pybustcall import BustcallClient

warnings.simplefilter("error")
client = BustcallClient(sys.argv[1], outbox=sys.argv[2])
told = []
client.on_event(told.append)

async def child_busts():
    ok = (await client.bust("child")).ok
    await client.aclose()
    return ok

def in_child():
    asyncio._set_running_loop(None)
    asyncio.set_event_loop_policy(None)
    done = []
    thread = threading.Thread(target=lambda: done.append(asyncio.run(child_busts())))
    thread.start()
    thread.join(20)
    os._exit(0 if done == [True] else 1)

async def main():
    assert (await client.bust("before")).ok
    under_way = [asyncio.create_task(client.bust(f"under way/{n}", write_ahead=True)) for n in range(8)]
    for _ in range(3):
        await asyncio.sleep(0)
    pid = os.fork()
    if pid == 0:
        in_child()
    assert all(result.ok for result in await asyncio.gather(*under_way))
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert status == 0, status
    assert (await client.bust("after")).ok
    assert await client.outbox.rows() == ()
    await client.aclose()
    print("well")

asyncio.run(main())
"""


def test_a_fork_in_the_middle_of_calls_that_store_harms_neither_side(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The parent's calls end well, the child's bust too, and no row is left by either."""
    ended = interpret(FORK_IN_LOOP, start_daemon().url, str(tmp_path / "o.db"))
    assert (ended.stdout, ended.returncode) == ("well\n", 0), ended.stderr
    assert ended.stderr == ""


DROPPED = """
import asyncio, gc, sys, threading, warnings
from pybustcall import BustcallClient, Probes

warnings.simplefilter("always")
told = []

async def main():
    troubles = []
    asyncio.get_running_loop().set_exception_handler(lambda _, trouble: troubles.append(trouble))
    client = BustcallClient(sys.argv[1], outbox=sys.argv[2], probes=Probes(hub=0.01))
    client.on_event(told.append)
    assert (await client.bust("a")).ok
    background = [task for task in asyncio.all_tasks() if task.get_name().startswith("pybustcall-")]
    assert len(background) == 2, background
    with warnings.catch_warnings(record=True) as warned:
        del client
        gc.collect()
    texts = [str(one.message) for one in warned if one.category is ResourceWarning]
    assert any("was dropped open; use `async with`" in text for text in texts), texts
    await asyncio.wait(background, timeout=20)
    assert all(task.done() for task in background)
    for _ in range(100):
        await asyncio.sleep(0.001)
    assert not troubles, troubles
    assert not [t for t in asyncio.all_tasks() if t is not asyncio.current_task()], asyncio.all_tasks()

asyncio.run(main())
gc.collect()
for thread in threading.enumerate():
    if thread.name == "pybustcall-hooks":
        thread.join(20)
        assert not thread.is_alive(), thread
print("well" if told else "no event")
"""


def test_a_client_that_is_dropped_open_ends_its_background(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """ResourceWarning; then prober and courier end, and nobody sees a traceback."""
    ended = interpret(DROPPED, start_daemon().url, str(tmp_path / "o.db"))
    assert (ended.stdout, ended.returncode) == ("well\n", 0), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "destroyed" not in ended.stderr
