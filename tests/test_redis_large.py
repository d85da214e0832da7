"""100,000 entries of one branch in a real Redis, and one hybrid bust of it: accepted, in force, told, and over.

The branch is stored and busted once; each test looks at one side of what came of it. How long it takes is told by
`bench/redis_prefix.py`, which is run small here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pybustcall import BustJob, BustResult
from pybustcall.integrations.redis import RedisCache
from pybustcall.keys import covers
from tests.conftest import PATIENCE
from tests.engines import RedisProcess
from tests.interop import require
from tests.redis_branch import PLAIN, PREFIX, branch, connect, contents, put_others, store
from tests.test_bench import check_table, run_bench
from tests.test_redis_daemon import daemon

ENTRIES = 100_000
OTHERS = 4000
OURS = "bustcall:{default}:"
LAST = max(branch(ENTRIES))  # in the order in which the sweep goes


@dataclass
class Swept:
    """What was seen of the bust.

    - `told`: how the job stood, each time it was asked for; `over`: what `wait_job` told
    - `missed`: whether readers missed the last entry when the bust was answered; `held`: how many entries there still
      were in the server then
    - `left`: what still tells of the branch afterwards: names in the server, and what is noted in the index
    - `before`, `after`: what all other keys held
    """

    result: BustResult
    missed: bool
    held: int
    told: list[BustJob]
    over: BustJob
    left: list[str] = field(default_factory=list)
    before: dict[bytes, Any] = field(default_factory=dict)
    after: dict[bytes, Any] = field(default_factory=dict)


async def bust(server: RedisProcess, journal: Path) -> Swept:
    """Bust the branch, and ask for the job until it is over."""
    async with daemon(server.url, journal) as client, RedisCache(server.url) as cache:
        assert await cache.get(LAST) is not None
        result = await client.bust(PREFIX, kind="prefix", strategy="hybrid", reason="all users have moved")
        missed = await cache.get(LAST) is None
        with connect(server.port) as redis:
            held = redis.zcard(f"{OURS}i")
        assert result.job is not None
        told: list[BustJob] = []
        async with asyncio.timeout(6 * PATIENCE):
            while not told or not told[-1].is_over:
                told.append(await client.job(result.job))
                await asyncio.sleep(0.005)
        return Swept(result, missed, held, told, await client.wait_job(result.job, timeout=PATIENCE))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """Store the branch beside all kinds of other keys, and bust it, once."""
    directory = tmp_path_factory.mktemp("large")
    with RedisProcess(directory) as server, connect(server.port) as redis:
        others = put_others(redis, OTHERS)
        store(redis, branch(ENTRIES))
        before = contents(redis, others)
        seen = asyncio.run(bust(server, directory / "journal"))
        seen.before, seen.after = before, contents(redis, others)
        own = [name.decode() for name in redis.scan_iter(f"{OURS}*", count=1000)]
        noted = [*redis.zrange(f"{OURS}i", 0, -1), *redis.hkeys(f"{OURS}h"), *redis.hkeys(f"{OURS}n")]
        seen.left = [name for name in own if covers(PREFIX, name.removeprefix(OURS).partition(":")[2])]
        seen.left += [key.decode() for key in noted if covers(PREFIX, key.decode())]
        yield seen


def test_the_bust_of_a_large_branch_is_accepted_as_a_job(swept: Swept) -> None:
    """The answer names the job and the layer, and does not wait for the end."""
    assert (swept.result.status, swept.result.applied) == ("accepted", "yes")
    assert [job.job for job in swept.told] == [swept.result.job] * len(swept.told)
    assert (swept.told[0].state, swept.told[0].reason) == ("running", "all users have moved")


def test_readers_miss_all_of_a_large_branch_once_its_bust_is_answered(swept: Swept) -> None:
    """Even what the sweep comes to last; the memory is freed later."""
    assert swept.missed
    assert swept.held > 0


def test_progress_rises_to_100_per_cent(swept: Swept) -> None:
    """It never falls, is seen on its way, and `wait_job` tells the same end."""
    shares = [job.done / job.total for job in swept.told if job.total]
    assert all(one <= other for one, other in pairwise(shares))
    assert any(0 < share < 1 for share in shares)
    assert shares[-1] == 1.0
    assert (swept.over.state, swept.over.done, swept.over.total) == ("done", ENTRIES, ENTRIES)
    assert (swept.over.removed, swept.over.attempts) == (ENTRIES, 1)


def test_nothing_of_a_large_branch_is_left(swept: Swept) -> None:
    """Neither an entry nor a lease, nor a key in the index, nor a tag."""
    assert swept.left == []


def test_keys_beside_a_large_branch_are_untouched(swept: Swept) -> None:
    """Similar keys, other tenants', other programs' of each type: all are there, with what they held."""
    assert len(swept.before) > 0.95 * OTHERS
    assert {f"{OURS}e:usersAbc:1".encode(), b"users:1", f"{PLAIN}usersAbc:1".encode()} <= swept.before.keys()
    assert None not in swept.before.values()
    assert swept.after == swept.before


def test_the_bench_tells_answer_and_blocks_of_each_case(tmp_path: Path) -> None:
    """Run small: nothing is left, nothing else touched, progress whole; times are not judged."""
    require("redis-server", "apt-get install redis-server")
    ran = run_bench("redis_prefix", tmp_path, "--entries", "1000", "--runs", "1")
    check_table(ran)
    assert [row["answer_goal_ms"] for row in ran.rows] == [50.0, None, None, None]
    for row in ran.rows:
        assert (row["entries"], row["runs"], row["right"], row["left"], row["touched"]) == (1000, 1, 1, 0, 0)
        assert min(row["answer_ms"], row["block_max_ms"], row["computed_ms"], row["read"], row["asked"]) > 0
