"""A daemon that is killed at any step of a sweep: its next start does what was not done, and the audit has it once."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from pybustcall import BustcallClient
from tests.conftest import PATIENCE, StartDaemon

MANY = 1200  # files: more than two batches of a walk, and several slices


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """See to it that a process is gone at the end, also one that was to kill itself and did not."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("strategy", "step", "times"),
    [
        ("dimensional", "journaled", 1),
        ("dimensional", "begun files", 1),
        ("dimensional", "swept files", 3),
        ("dimensional", "ended files", 1),
        ("dimensional", "applied", 1),
        ("hybrid", "swept files", 4),
        ("hybrid", "ended files", 1),
    ],
)
async def test_a_sweep_is_finished_after_a_kill_at_any_step(
    step: str, times: int, strategy: str, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    """Nothing under the prefix is left, nothing beside it is touched, and one bust is in the audit, done."""
    root, journal = tmp_path / "cache", tmp_path / "journal.db"
    (root / "pages").mkdir()
    for number in range(MANY):
        (root / "pages" / f"{number}.html").touch()
    (root / "pagesAbc.html").touch()
    process = subprocess.Popen(  # noqa: ASYNC220 - it takes a moment, and nothing else goes on here
        [
            sys.executable, "-m", "tests.stepwise_daemon", "--root", str(root), "--journal", str(journal),
            "--kill-at", step, "--times", str(times),
        ],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    with process, ended(process):
        assert process.stdout is not None
        url = json.loads(await asyncio.to_thread(process.stdout.readline))["url"]
        asked = {"target": "pages", "kind": "prefix", "strategy": strategy, "reason": "a new design", "settle": 0.1}
        async with aiohttp.ClientSession() as session:
            try:
                async with session.post(f"{url}/api/v1/bust", json=asked) as response:
                    assert response.status == 202  # it was promised, and killed after that
            except aiohttp.ClientConnectionError:
                pass  # it was killed before it could answer
        assert await asyncio.to_thread(process.wait, PATIENCE) == -signal.SIGKILL
    async with BustcallClient(start_daemon("--journal", str(journal)).url) as client:
        [job] = await client.jobs()
        done = await client.wait_job(job.job, timeout=PATIENCE)
        assert (done.state, done.reason, done.target) == ("done", "a new design", "pages")
        assert len(await client.jobs()) == 1
    assert list((root / "pages").iterdir()) == []
    assert (root / "pagesAbc.html").exists()
