"""The examples, run as a reader would run them: the demo to its end and interrupted, the quickstart, the shop."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from pybustcall import BustcallClient
from tests.conftest import PATIENCE
from tests.example_process import EXAMPLES, Ended, run_example

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartDaemon

TOTAL = re.compile(r"^(\d+) of (\d+) expectations held", re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Run the demo to its end, once."""
    return asyncio.run(run_example("demo", tmp_path_factory.mktemp("demo")))


def test_demo_succeeds(demo: Ended) -> None:
    """The demo exits with 0, and has nothing to say on standard error."""
    assert (demo.code, demo.errors) == (0, "")


def test_demo_prints_a_table_in_which_everything_is_ok(demo: Ended) -> None:
    """Every line of the table says yes, and there is one for each expectation."""
    verdicts = re.findall(r"^[a-j]\. .* \d+\.\d (\S+)$", demo.output, re.MULTILINE)
    total = TOTAL.search(demo.output)
    assert total is not None
    assert total[1] == total[2] == str(len(verdicts))
    assert set(verdicts) == {"yes"}


def test_demo_shows_that_the_peer_takes_over(demo: Ended) -> None:
    """With the first daemon killed, the bust is served by the peer, at stage 9."""
    assert re.search(r"^e\. POST price 13\.00 .* busted by peer, stage 9 .* yes$", demo.output, re.MULTILINE)


def test_demo_shows_that_an_outage_is_told(demo: Ended) -> None:
    """With both daemons killed, the shop says which error it was and that nothing was applied."""
    assert re.search(r"^f\. its error .* DaemonsUnavailable .* yes$", demo.output, re.MULTILINE)
    assert re.search(r"^f\. was the bust applied\? .* no .* yes$", demo.output, re.MULTILINE)


def test_demo_shows_that_one_bust_reaches_the_memories_of_two_workers(demo: Ended) -> None:
    """Each held the old price until one of them busted it; with the daemon gone neither serves what it holds."""
    for number in (1, 2):
        assert re.search(rf"^h\. worker {number} .* 14\.00 held .* yes$", demo.output, re.MULTILINE)
        assert re.search(rf"^i\. worker {number}.* 16\.00 loaded .* yes$", demo.output, re.MULTILINE)
        assert re.search(rf"^j\. worker {number}.* 17\.00 loaded .* yes$", demo.output, re.MULTILINE)


def test_demo_fits_a_terminal_and_a_pipe(demo: Ended) -> None:
    """No line is longer than 100 columns, and a pipe gets no colours."""
    assert max(len(line) for line in demo.output.splitlines()) <= 100
    assert "\x1b" not in demo.output


def test_demo_leaves_no_files(demo: Ended) -> None:
    """Its temporary directory is gone at its end."""
    assert demo.left_files == []


def test_demo_leaves_no_processes(demo: Ended) -> None:
    """The daemons that it started are gone at its end."""
    assert not demo.left_processes


@pytest.mark.parametrize("stop_at", ["Two daemons start", "c. ", "Now a daemon", "h. "])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_stopped_demo_clears_everything_away(
    number: signal.Signals, code: int, stop_at: str, tmp_path: Path
) -> None:
    """Stopped midway, the demo exits with 128 and the signal's number, and leaves no process and no file."""
    ended = await run_example("demo", tmp_path, stop_at=stop_at, number=number)
    assert (ended.code, ended.left_processes, ended.left_files) == (code, False, [])
    assert TOTAL.search(ended.output) is None


def quickstart(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    """Run the quickstart against a daemon."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "BUSTCALL_URL": url},
        check=False,
    )


@pytest.mark.requirement("RES-08")
def test_quickstart_busts_one_key(start_daemon: StartDaemon) -> None:
    """The quickstart says what happened, and the cached file is gone."""
    daemon = start_daemon()
    (daemon.root / "main.css").write_text("old")
    ran = quickstart("main.css", url=daemon.url)
    assert re.fullmatch(rf"busted main\.css by {daemon.url}, stage 12, in \d\.\d{{3}} s\n", ran.stdout), ran.stderr
    assert not (daemon.root / "main.css").exists()


@pytest.mark.requirement("RES-08")
def test_quickstart_fails_aloud_without_a_daemon(start_daemon: StartDaemon) -> None:
    """Where no daemon listens, the quickstart exits with 1, and its last line says what to do."""
    daemon = start_daemon()
    daemon.kill()
    ran = quickstart("main.css", url=daemon.url)
    assert ran.returncode == 1
    assert "Check that a daemon runs there" in ran.stderr.splitlines()[-1]


def test_quickstart_without_a_key_says_how_to_use_it() -> None:
    """Without its argument the quickstart prints its usage."""
    assert "usage: " in quickstart(url="http://127.0.0.1:1").stderr


@pytest.fixture
def shop() -> Any:
    """Load the shop's module."""
    spec = importlib.util.spec_from_file_location("shop", EXAMPLES / "shop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_shop(shop: Any, directory: Path) -> Any:
    """Open the shop with a client that does nothing: the daemon's part is shown by the demo."""
    return TestClient(
        TestServer(shop.create_app(directory / "shop.db", directory / "cache", BustcallClient.disabled()))
    )


def test_shop_makes_what_it_and_a_daemon_need(shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by itself, the shop makes its directory, with the database, the cache and the registrations."""
    monkeypatch.setattr(shop.web, "run_app", lambda *_, **__: None)
    shop.main(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "entries.json").read_text()) == shop.registrations()
    assert (tmp_path / "new" / "shop.db").is_file()
    assert (tmp_path / "new" / "cache" / "products").is_dir()


@pytest.mark.parametrize(
    ("path", "encoding", "name"),
    [
        ("/", "identity", "index.html"),
        ("/products/7.html", "identity", "products/7.html"),
        ("/products/007.html?utm=1", "identity", "products/7.html"),
        ("/products/7.html?lang=de", "identity", "products/7.html?lang=de"),
        ("/products/7.html?lang=../../x", "identity", "products/7.html"),
        ("/products/7.html", "gzip", "products/7.html.gz"),
        ("/products/7.html?lang=de", "gzip", "products/7.html.gz?lang=de"),
    ],
)
async def test_shop_stores_a_page_under_the_name_that_is_busted(
    path: str, encoding: str, name: str, shop: Any, tmp_path: Path
) -> None:
    """A page is cached under its key, with the suffixes of the variants that are known and nothing else."""
    headers = {"Accept-Encoding": encoding}
    async with open_shop(shop, tmp_path) as visitor, visitor.get(path, headers=headers) as response:
        assert response.status == 200
    cache = tmp_path / "cache"
    assert [file.relative_to(cache).as_posix() for file in cache.rglob("*") if file.is_file()] == [name]


async def test_shop_does_not_store_a_page_that_a_change_overtook(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page rendered from the old price, but ready only after the change was busted, is not kept."""
    render, rendered, go_on = shop.render, threading.Event(), threading.Event()

    def slow_render(*arguments: Any, **options: Any) -> Any:
        body = render(*arguments, **options)
        rendered.set()
        assert go_on.wait(PATIENCE)
        return body

    monkeypatch.setattr(shop, "render", slow_render)
    async with open_shop(shop, tmp_path) as visitor:
        reader = asyncio.create_task(visitor.get("/products/7.html"))
        assert await asyncio.to_thread(rendered.wait, PATIENCE)
        async with visitor.post("/products/7/price", json={"price": "12.00"}) as response:
            assert response.status == 200
        go_on.set()
        async with await reader as response:
            assert "10.00" in await response.text()
        async with visitor.get("/products/7.html") as response:
            assert "12.00" in await response.text()


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"price": 12}', '{"price": "-1.00"}', '{"price": "1"}'])
async def test_shop_refuses_what_is_no_price(body: str, shop: Any, tmp_path: Path) -> None:
    """A body without a price is answered with 400."""
    async with open_shop(shop, tmp_path) as visitor, visitor.post("/products/7/price", data=body) as response:
        assert response.status == 400


async def test_shop_knows_no_other_products(shop: Any, tmp_path: Path) -> None:
    """A product that is not there is answered with 404, for readers and for the owner."""
    async with open_shop(shop, tmp_path) as visitor:
        async with visitor.get("/products/1.html") as response:
            assert response.status == 404
        async with visitor.post("/products/1/price", json={"price": "12.00"}) as response:
            assert response.status == 404


@pytest.mark.requirement("IMP-12")
def test_the_hot_swap_replaces_a_model_and_what_was_made_with_it(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Twice: the registry remembers which version is current."""
    daemon = start_daemon("--registry", str(tmp_path / "registry.db"))
    for before in ("2.1.0", "2.2.0"):
        command = [sys.executable, str(EXAMPLES / "hot_swap.py"), str(daemon.root)]
        env = {**os.environ, "BUSTCALL_URL": daemon.url}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "refused, nothing changed:\n  pricing-model: " in done.stdout
        assert f"pricing-model {before} -> 2.2.0, 2 pages went\nleft: about.html\n" in done.stdout


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the web worker's module, which finds the shop's beside itself."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("worker")


async def test_worker_serves_from_the_database_where_no_daemon_is(worker: Any, tmp_path: Path) -> None:
    """A client that is disabled follows nothing, and so nothing is served from memory; its own writes are seen."""
    app = worker.create_app(tmp_path / "shop.db", BustcallClient.disabled())
    async with TestClient(TestServer(app)) as visitor:

        async def ask(number: int) -> tuple[int, Any]:
            async with visitor.get(f"/products/{number}") as response:
                return response.status, await response.json() if response.status == 200 else None

        async def post(number: int, body: Any) -> int:
            async with visitor.post(f"/products/{number}/price", json=body) as response:
                return response.status

        for _ in range(2):
            assert await ask(7) == (200, {"price": "10.00", "source": "loaded"})
        assert await ask(99) == (404, None)
        assert [await post(99, {"price": "1.00"}), await post(7, {"price": "cheap"}), await post(7, [])] == [
            404,
            400,
            400,
        ]
        assert await post(7, {"price": "11.00"}) == 200
        assert await ask(7) == (200, {"price": "11.00", "source": "loaded"})
        async with visitor.get("/health") as response:
            told = await response.json()
    assert (told["trusted"], told["reason"], told["hits"]) == (False, "the client is disabled", 0)


def test_worker_without_its_arguments_says_how_to_use_it(worker: Any) -> None:
    """With one too few, and with a port that is none."""
    for arguments in (["shop.db"], ["shop.db", "-1"]):
        with pytest.raises(SystemExit, match="usage: "):
            worker.main(arguments)
