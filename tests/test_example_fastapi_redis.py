"""The example of Redis behind FastAPI as a reader runs it: to its end, with a Redis of theirs, stopped, incomplete."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.engines import RedisProcess, free_port
from tests.example_process import Ended, run_example
from tests.interop import require

INSTALL = "pip install fastapi uvicorn 'pybustcall[daemon,redis]'"
ROW = re.compile(r"^[a-e]\. .* \d+\.\d (yes|NO)$", re.MULTILINE)


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Run the whole of it, once."""
    require("redis-server", "apt-get install redis-server")
    return asyncio.run(run_example("fastapi_redis", tmp_path_factory.mktemp("show")))


@pytest.mark.requirement("REL-04")
def test_everything_came_as_expected(show: Ended) -> None:
    """It ends with 0, with nothing on standard error, and each line of the table says yes."""
    assert (show.code, show.errors) == (0, ""), show.output
    verdicts = ROW.findall(show.output)
    assert verdicts == ["yes"] * 15
    assert "15 of 15 expectations held" in show.output


@pytest.mark.requirement("REL-04")
@pytest.mark.parametrize(
    "line",
    [
        r"a\. GET again +10\.00 cached +10\.00 cached",
        r"b\. PUT 11\.00, and bust +busted +busted",
        r"b\. GET +11\.00 made +11\.00 made",
        r"c\. the slow GET, from before +12\.00 +12\.00",
        r"c\. GET: was the old one stored\? +13\.00 cached +13\.00 cached",
        r"d\. GET +13\.00 made +13\.00 made",
        r"d\. PUT 14\.00, and bust +accepted or partial +(accepted|partial)",
        r"e\. the bust of 14\.00 +done +done",
        r"e\. GET +14\.00 cached +14\.00 cached",
    ],
)
def test_the_table_tells(line: str, show: Ended) -> None:
    """What it is for: a hit, a bust, a late fill that is refused, a dead Redis, and what was promised meanwhile."""
    assert re.search(rf"^{line} +\d+\.\d yes$", show.output, re.MULTILINE), show.output


def test_it_leaves_nothing_behind(show: Ended) -> None:
    """Its files and processes are gone at its end."""
    assert (show.left_files, show.left_processes) == ([], False)


def test_it_fits_a_terminal(show: Ended) -> None:
    """No line is longer than 100 columns."""
    assert max(map(len, show.output.splitlines())) <= 100


async def test_a_redis_of_the_readers_own_is_used_and_left_as_it_was(tmp_path: Path) -> None:
    """It is not killed, what it held is still there, and nothing else is."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    with RedisProcess(theirs) as server:
        server.ask("SET", "other", "value")
        server.ask("CONFIG", "SET", "requirepass", "secret")
        url = f"redis://:secret@127.0.0.1:{server.port}/0"
        ended = await run_example("fastapi_redis", ours, url)
        assert (ended.code, ended.errors, ended.left_files, ended.left_processes) == (0, "", [], False), ended.output
        assert "10 of 10 expectations held" in ended.output
        assert "secret" not in ended.output
        async with Redis.from_url(url) as redis:
            assert await redis.keys("*") == [b"other"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_run_that_is_stopped_clears_everything_away(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Stopped while Redis is dead, it exits with 128 and the signal's number, and leaves no process and no file."""
    require("redis-server", "apt-get install redis-server")
    ended = await run_example("fastapi_redis", tmp_path, stop_at="d. ", number=number)
    assert (ended.code, ended.left_processes, ended.left_files) == (code, False, []), ended.errors
    assert ended.errors == f"\nstopped by {number.name}; all cleared away.\n"


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "redis"])
async def test_a_missing_package_is_named_with_how_to_install_it(missing: str, tmp_path: Path) -> None:
    """A package that cannot be imported is an exit code of 1 and one line, and no traceback."""
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "__init__.py").write_text(f"raise ModuleNotFoundError('', name={missing!r})")
    ended = await run_example(
        "fastapi_redis", tmp_path, env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert (ended.code, ended.errors) == (1, f"{missing} is missing; install it with: {INSTALL}\n")


async def test_a_missing_server_is_named_with_how_to_install_it(tmp_path: Path) -> None:
    """Without redis-server and valkey-server it says which command installs one, and how to name one that runs."""
    ended = await run_example("fastapi_redis", tmp_path, env={"PATH": str(tmp_path)})
    assert (ended.code, ended.output, ended.left_files) == (1, "", [])
    assert ended.errors.startswith("redis-server is missing; install it, ")
    assert "apt-get install redis-server" in ended.errors


async def test_a_server_that_does_not_answer_is_told_at_once(tmp_path: Path) -> None:
    """Nothing is played on a Redis that was named and is not there."""
    ended = await run_example("fastapi_redis", tmp_path, f"redis://127.0.0.1:{free_port()}/0")
    assert (ended.code, ended.output, ended.left_files) == (1, "", [])
    assert ended.errors.startswith("the Redis that was given cannot be used: ")


@pytest.mark.parametrize("arguments", [["x"], ["redis://127.0.0.1:1/0", "redis://127.0.0.1:2/0"]])
async def test_wrong_arguments_tell_the_usage(arguments: list[str], tmp_path: Path) -> None:
    """It exits with 2."""
    ended = await run_example("fastapi_redis", tmp_path, *arguments)
    assert (ended.code, ended.errors) == (2, "usage: python examples/fastapi_redis.py [redis://HOST:PORT/DB]\n")
