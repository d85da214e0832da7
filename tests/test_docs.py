"""The documentation's cURL lines, run as they stand against a daemon in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pybustcall.daemon.app import ROUTES as SERVED
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.requirement("RES-12"), pytest.mark.requirement("RES-02")]

ROOT = Path(__file__).parent.parent
HTTP_PAGE = ROOT / "docs" / "reference" / "http.md"
ROUTES = [
    "POST /api/v1/bust",
    "GET /api/v1/jobs",
    "GET /api/v1/jobs/{job}",
    "DELETE /api/v1/jobs/{job}",
    "GET /api/v1/events",
    "GET /api/v1/status",
    "GET /api/v1/capabilities",
    "GET /api/v1/bindings/capabilities",
    "POST /api/v1/entries",
    "POST /api/v1/dependencies",
    "POST /api/v1/dependencies/forget",
    "GET /api/v1/dependencies",
    "POST /api/v1/resolve",
    "POST /api/v1/hotswap",
    "POST /api/v1/capabilities",
]

_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One cURL line, and the answer that the page shows for it, if it shows one."""

    page: str
    line: int
    command: str
    answer: Any = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def examples_of(page: Path) -> list[Example]:
    """Find a page's cURL lines; the last one of a block is answered by the JSON block that comes right after it."""
    text = page.read_text(encoding="utf-8")
    blocks = list(_FENCE.finditer(text))
    found = []
    for block, after in zip_longest(blocks, blocks[1:]):
        if block["language"] not in {"bash", "sh", "shell", "console"}:
            continue
        commands = [
            (text.count("\n", 0, block.start("text") + match.start()) + 1, match.group())
            for match in re.finditer(r"^(?:[^\n]*\\\n)*[^\n]*$", block["text"], re.MULTILINE)
            if re.search(r"\bcurl\b", match.group())
        ]
        for number, (line, command) in enumerate(commands, start=1):
            answered = number == len(commands) and after is not None and after["language"] == "json"
            answer = json.loads(after["text"]) if answered and after is not None else None
            found.append(Example(page.relative_to(ROOT).as_posix(), line, command, answer))
    return found


PAGES = [*sorted((ROOT / "docs").glob("**/*.md")), ROOT / "README.md"]
EXAMPLES = [example for page in PAGES for example in examples_of(page)]


def shape(document: Any) -> Any:
    """Reduce a document to its keys; of a list, to the shape of its first element, if it has one."""
    if isinstance(document, dict):
        return {key: shape(value) for key, value in document.items()}
    if isinstance(document, list):
        return [shape(element) for element in document[:1]]
    return None


def same_shape(shown: Any, real: Any) -> bool:
    """Tell whether two shapes have the same keys; an empty list is like any list."""
    if isinstance(shown, dict) and isinstance(real, dict):
        return shown.keys() == real.keys() and all(same_shape(shown[key], real[key]) for key in shown)
    if isinstance(shown, list) and isinstance(real, list):
        return not shown or not real or same_shape(shown[0], real[0])
    return type(shown) is type(real)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Tell the URL of one daemon that all the lines are run against."""
    if shutil.which("curl") is None or shutil.which("bash") is None:
        missing = "curl and bash are needed to run the documentation's lines"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    root = tmp_path_factory.mktemp("cache")
    process = subprocess.Popen(
        [sys.executable, "-m", "pybustcall", "daemon", "--root", str(root), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if not key.startswith("BUSTCALL_")},
    )
    with process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.wait(PATIENCE)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_curl_line_does_what_the_page_shows(example: Example, url: str) -> None:
    """A cURL line exits with 0, and answers with the keys, the status and the cache key that the page shows."""
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", example.command],
        capture_output=True,
        timeout=PATIENCE,
        env={**os.environ, "BUSTCALL_URL": url, "BUSTCALL_TOKEN": "none-is-asked-for", "NO_PROXY": "*"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    if example.answer is not None:
        answer = json.loads(ran.stdout)
        assert same_shape(shape(example.answer), shape(answer)), answer
        for told in ("status", "cache_key"):
            assert example.answer.get(told) == answer.get(told)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_curl_line_names_the_daemon_by_variable(example: Example) -> None:
    """A cURL line uses $BUSTCALL_URL, so that it can be run against any daemon, and here."""
    assert re.search(r'"\$BUSTCALL_URL/', example.command)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_shown_with_curl(route: str) -> None:
    """The reference page has a section for each route, with a cURL line that calls it and the answer."""
    method, path = route.split()
    section = HTTP_PAGE.read_text(encoding="utf-8").partition(f"\n## {route}\n")[2].partition("\n## ")[0]
    assert section
    assert any(
        example.command.startswith("curl ")
        and f"$BUSTCALL_URL{path.partition('{')[0]}" in example.command
        and (re.findall(r"-X (\w+)", example.command.partition("$(")[0]) or ["GET"]) == [method]
        and example.command in section
        and example.answer is not None
        for example in EXAMPLES
    )


def test_the_table_of_routes_has_all_that_is_served() -> None:
    """Each with its capability, and with a link to a section that there is, or to the contract."""
    page = HTTP_PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[?`([A-Z]+) ([^`]+)`(?:\]\(#([^)]+)\))? \|.*\| `([a-z.]+)` \|$", page, re.MULTILINE)
    assert sorted((method, path, name) for method, path, _, name in rows) == sorted(
        (route.method, route.path, route.capability) for route in SERVED
    )
    titles = re.findall(r"^## (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    assert {anchor for _, _, anchor, _ in rows if anchor} <= anchors


@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 405, 409, 413, 415, 417, 421, 422, 426, 428, 429, 500, 503, 507]
)
def test_every_refusal_is_shown_with_an_example(status: int) -> None:
    """The reference page has a section for each refusal, with a problem document of that status."""
    page = HTTP_PAGE.read_text(encoding="utf-8")
    section = page.partition(f"\n### {status} ")[2].partition("\n### ")[0]
    problems = [json.loads(block["text"]) for block in _FENCE.finditer(section) if block["language"] == "json"]
    assert problems
    assert {problem["status"] for problem in problems} == {status}
