"""A full disk, a real one: a file system of 1 MB holds the journal, and busts are refused instead of promised.

It is mounted in a mount namespace of its own, which ends with the test, so that nothing is left of it on the machine.
Where that is not allowed, as in many containers, these tests are skipped, in CI too: nothing that could be installed
would change it.
"""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import final

import aiohttp
import pytest

from pybustcall import BustcallClient, BustFailed
from pybustcall.integrations.redis import RedisCache
from tests.configured_daemons import REDIS_AND_PAGES, ConfiguredDaemons
from tests.conftest import PATIENCE
from tests.engines import RedisProcess

SIZE = 1 << 20
MOUNT = 'mount -t tmpfs -o size="$1" bustcall "$2" && echo mounted && exec cat'  # ends with the pipe that it reads


@final
class SmallDisk:
    """A file system of SIZE bytes at `path`, for the processes that are started with `command` only."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self._user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self._holder = subprocess.Popen(
            ["unshare", "--mount", *self._user, "sh", "-c", MOUNT, "sh", str(SIZE), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        self.mounted = self._holder.stdout.readline() == b"mounted\n"

    def command(self, command: list[str]) -> list[str]:
        """Tell how to start a program so that it sees it."""
        user = ["--user", "--preserve-credentials"] if self._user else []
        return ["nsenter", "--target", str(self._holder.pid), "--mount", *user, *command]

    @property
    def _filler(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/root{self.path}/filler")

    def fill(self) -> None:
        """Let there be no room at all."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017 - what is expected, after any number of writes

    def make_room(self) -> None:
        """Let there be room again."""
        self._filler.unlink()

    def close(self) -> str:
        """Let it vanish, once no process that was started sees it any more; tell what went wrong with it."""
        said = self._holder.communicate(timeout=PATIENCE)[1]
        return said.decode(errors="replace").strip()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        small = SmallDisk(tmp_path / "disk")
    except FileNotFoundError as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    if not small.mounted:
        pytest.skip(f"a file system cannot be mounted here: {small.close()}")
    yield small
    small.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path) as server:
        yield server


@pytest.fixture
def daemons(disk: SmallDisk, redis: RedisProcess, pages: Path) -> Iterator[ConfiguredDaemons]:
    configuration = f'[journal]\npath = "{disk.path}/journal"\n' + REDIS_AND_PAGES.format(redis=redis.url)
    made = ConfiguredDaemons(pages.parent, configuration, wrapped=disk.command)
    yield made
    made.close()


async def refused(client: BustcallClient, root: Path, numbers: Iterator[int]) -> tuple[BustFailed, list[str]]:
    """Bust until the disk is full in earnest: tell the refusal, and the jobs of those that were still taken."""
    taken: list[str] = []
    for number in itertools.islice(numbers, 1000):
        page = root / f"page-{number}"
        page.touch()
        try:
            result = await client.bust(page.name, strategy="direct")
        except BustFailed as error:
            assert page.exists(), "it was refused, and done all the same"
            return error, taken
        assert result.job is not None
        assert not page.exists()
        taken.append(result.job)
    raise AssertionError("a thousand busts were written to a full disk")


async def post(url: str, target: str) -> tuple[int, dict[str, object]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/v1/bust", json={"target": target}) as response,
    ):
        return response.status, await response.json(content_type=None)


async def test_a_full_disk_refuses_busts_instead_of_promising_until_there_is_room(
    disk: SmallDisk, daemons: ConfiguredDaemons, pages: Path
) -> None:
    """With a problem that says so, by daemon and client; what it has promised it still tells, then it goes on."""
    daemon, numbers = daemons.start(), itertools.count()
    async with BustcallClient(daemon.url, probes=None, timeout=5.0) as client:
        (pages / "before").touch()
        before = await client.bust("before", reason="before")
        for _ in range(2):
            disk.fill()
            error, taken = await refused(client, pages, numbers)
            assert error.applied == "no"
            assert "it was not applied" in str(error)
            assert "disk is full" in str(error)
            assert "nothing was busted" in str(error)
            (pages / "refused").touch()
            status, problem = await post(daemon.url, "refused")
            assert (status, problem["status"]) == (507, 507)
            assert "disk is full; make room on its disk" in str(problem["detail"])
            assert str(problem["detail"]).endswith("nothing was busted")
            assert (pages / "refused").exists()
            assert (await client.status()).daemon_pid == daemon.process.pid
            listed = [job.job for job in await client.jobs(limit=1000)]
            assert before.job in listed
            assert set(taken) <= set(listed)
            disk.make_room()
            after = await client.bust("refused")
            assert after.ok
            assert not (pages / "refused").exists()


async def test_what_was_promised_before_the_disk_was_full_is_kept(
    disk: SmallDisk, daemons: ConfiguredDaemons, redis: RedisProcess, pages: Path
) -> None:
    """Through a kill while it is full: what waits for a layer that is down is done after the restart, each once."""
    numbers = itertools.count()
    redis.kill()
    daemon = daemons.start()
    promised: dict[str, str] = {}
    async with BustcallClient(daemon.url, probes=None, timeout=5.0) as client:
        for number in range(10):
            result = await client.bust(f"owed/{number}", reason=str(number))
            assert result.job is not None
            assert "redis" in [layer.name for layer in result.layers if not layer.ok]
            promised[result.job] = f"owed/{number}"
        disk.fill()
        _, taken = await refused(client, pages, numbers)
    daemon.kill()
    full = daemons.start()  # it can be started, and keeps what it finds
    async with BustcallClient(full.url, probes=None, timeout=5.0) as client:
        await refused(client, pages, numbers)
        assert {job.job for job in await client.jobs(limit=1000)} >= {*promised, *taken}
    full.kill()
    disk.make_room()
    redis.start()
    cache = RedisCache(redis.url)
    for key in promised.values():
        assert await cache.set(key, b"old", ttl=600.0)
    async with BustcallClient(daemons.start().url, probes=None, timeout=5.0) as client:
        for job in [*promised, *taken]:
            assert (await client.wait_job(job, timeout=PATIENCE)).state == "done"
        listed = [job.job for job in await client.jobs(limit=1000)]
        assert len(listed) == len(set(listed))
        assert {*promised, *taken} <= set(listed)
    assert [await cache.get(key) for key in promised.values()] == [None] * 10
    await cache.aclose()
