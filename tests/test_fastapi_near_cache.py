"""A FastAPI service with a near cache in each of its workers, as the how-to page has it, over one database."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from pybustcall import BustcallClient
from tests.conftest import StartDaemon, eventually
from tests.test_fastapi_redis import Workers, run_tests_of_page

PAGE: Final = Path(__file__).parent.parent / "docs" / "how-to" / "near-cache-in-fastapi.md"
SERVICE, CACHETOOLS, FUNCTOOLS, IN_TESTS = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


async def get(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with http.get(url) as response:
        found: dict[str, Any] = await response.json()
        return found


async def test_a_write_in_one_worker_is_seen_by_all(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """By itself at once, by the other soon; and what is held is not read from the database again."""
    daemon = start_daemon("--journal", str(tmp_path / "journal.db"))
    workers = Workers(tmp_path, SERVICE, {"BUSTCALL_URL": daemon.url})
    try:
        async with aiohttp.ClientSession() as http:
            await workers.listen(http)
            first, second = workers.urls
            for url in workers.urls:
                while not (await get(http, f"{url}/health"))["trusted"]:
                    await get(http, f"{url}/products/7")
                assert await get(http, f"{url}/products/7") == {"price": "1"}
            reads = workers.reads()
            for url in workers.urls:
                assert await get(http, f"{url}/products/7") == {"price": "1"}
            assert workers.reads() == reads
            async with http.put(f"{first}/products/7/price", json={"price": "2"}) as response:
                assert await response.json() == {"status": "busted"}
            assert await get(http, f"{first}/products/7") == {"price": "2"}
            seen: list[str] = []
            while seen[-1:] != ["2"]:
                seen.append((await get(http, f"{second}/products/7"))["price"])
            assert len(seen) < 1000
            health = await get(http, f"{first}/health")
            assert (health["trusted"], health["reason"]) == (True, "")
    finally:
        workers.close()


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_the_service_can_be_started_again_in_one_process(
    disabled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its tests on the page do; here without a daemon."""
    monkeypatch.setenv("BUSTCALL_DISABLED", disabled)
    monkeypatch.setenv("BUSTCALL_URL", "http://127.0.0.1:1")
    run_tests_of_page(IN_TESTS, SERVICE, tmp_path, monkeypatch)


async def test_caches_that_one_has_already_are_attached_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of cachetools by its keys, and a function of functools."""

    class TTLCache(dict[Any, Any]):
        def __init__(self, maxsize: int, ttl: float) -> None:
            super().__init__()

    monkeypatch.setitem(sys.modules, "cachetools", module := types.ModuleType("cachetools"))
    monkeypatch.setitem(sys.modules, "cachetools.keys", keys := types.ModuleType("cachetools.keys"))
    vars(module).update(TTLCache=TTLCache)
    vars(keys).update(hashkey=lambda *arguments: arguments)
    client = BustcallClient("http://127.0.0.1:1", retry=None)
    names: dict[str, Any] = {"client": client}
    exec(CACHETOOLS.replace("TTLCache[tuple[int], str]", "TTLCache"), names)
    exec(FUNCTOOLS, names)
    names["users"].update({(7,): "a", (8,): "b"})
    names["country_names"]()
    await client.bust("users/7", fault_tolerance=12)
    assert names["users"] == {(8,): "b"}
    assert names["country_names"].cache_info().currsize == 1
    await client.bust("countries", fault_tolerance=12)
    await eventually(lambda: names["country_names"].cache_info().currsize == 0)
    await client.aclose()
