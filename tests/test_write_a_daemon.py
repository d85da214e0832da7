"""The page on daemons in other languages: its samples are the daemons' own, and are what pybustcall takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from pydantic import TypeAdapter

from pybustcall.models import (
    BindingCapabilities,
    BustReply,
    BustRequest,
    CapabilityDocument,
    LayerReply,
    StreamedBust,
    StreamedLive,
)
from pybustcall.sse import StreamParser
from pybustcall.testing import CHECKS
from tests.conftest import PATIENCE
from tests.interop import PeerProcess
from tests.interop.node_lua import start_lua_peer, start_node_peer
from tests.interop.rust_daemon import start_rust_daemon

pytestmark = [pytest.mark.requirement("IMP-13"), pytest.mark.requirement("RES-04")]

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "how-to" / "write-a-daemon.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SOURCES = {"js": "tests/interop/node/peer.mjs", "lua": "tests/interop/lua/peer.lua"}


def section(title: str) -> str:
    """Cut out the section under a heading."""
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found.group(1)


def sample(title: str) -> Any:
    """Read the first JSON block of a section."""
    return json.loads(next(block["text"] for block in FENCE.finditer(section(title)) if block["language"] == "json"))


@pytest.mark.parametrize(("title", "binding"), [("Node\\.js", "node"), ("Lua", "lua")])
def test_a_document_is_one_that_a_client_takes(title: str, binding: str) -> None:
    """Every field of it is known, so that none is a slip."""
    document = CapabilityDocument.model_validate(sample(title))
    assert document.binding == binding
    shown = sample(title)
    assert shown.keys() == CapabilityDocument.model_fields.keys()
    for part in ("fault_tolerance", "requires", "limits"):
        assert shown[part].keys() <= type(getattr(document, part)).model_fields.keys()


def test_a_map_of_bindings_is_one_that_a_client_takes() -> None:
    """The older form, as the Rust daemon has it."""
    bindings = TypeAdapter(dict[str, BindingCapabilities]).validate_python(sample("Rust"))
    assert "cache.bust" in bindings["rust"].capabilities
    assert {name: binding.binding for name, binding in bindings.items()} == {name: name for name in bindings}
    assert all(entry.keys() == BindingCapabilities.model_fields.keys() for entry in sample("Rust").values())


@pytest.mark.parametrize(
    ("title", "start", "path"),
    [
        ("Node\\.js", start_node_peer, "/api/v1/capabilities"),
        ("Lua", start_lua_peer, "/api/v1/capabilities"),
        ("Rust", start_rust_daemon, "/api/v1/bindings/capabilities"),
    ],
)
def test_a_sample_is_what_the_daemon_serves(title: str, start: Callable[[], PeerProcess], path: str) -> None:
    """To the letter, but for white space."""
    with start() as peer, urlopen(peer.url + path, timeout=PATIENCE) as answer:
        assert json.load(answer) == sample(title)


def test_the_reply_is_one_that_acknowledges() -> None:
    """And it answers the question that the reference shows."""
    assert BustReply.model_validate(sample("Answer")).answers("cdn/main.css")


def test_the_replies_of_kinds_and_jobs_are_ones_that_a_client_takes() -> None:
    """They repeat what the page says was asked, and every field of them is known."""
    asked = BustRequest(target="products", kind="prefix", namespace="shop", soft=True)
    for title, request in (("Kinds, and how", asked), ("Jobs", BustRequest(target="cdn/main.css"))):
        reply = BustReply.model_validate(sample(title))
        assert reply.answers(request.target)
        assert reply.unechoed(request) == ""
        assert reply.accepted is (title == "Jobs")
        assert sample(title).keys() <= BustReply.model_fields.keys()
        assert all(layer.keys() <= LayerReply.model_fields.keys() for layer in sample(title)["layers"])
        assert reply.removed == sum(layer.removed for layer in reply.layers)


def test_the_stream_is_one_that_a_reader_takes() -> None:
    """It is live, is told of a bust with every field that must be there, and hears the newest id in a heartbeat."""
    (shown,) = (block["text"] for block in FENCE.finditer(section("Events")))
    live, bust, beat = StreamParser().feed(shown.encode())
    assert (live.name, StreamedLive.model_validate_json(live.data or "").heartbeat) == ("live", 5)
    assert (bust.name, beat.data, beat.id) == ("bust", None, bust.id)
    told = StreamedBust.model_validate_json(bust.data or "")
    assert json.loads(bust.data or "").keys() == told.model_dump(exclude={"also"}).keys()


def test_every_extension_is_on_the_page() -> None:
    """Whatever the suite asks of whoever lists it; those of busts may share a line."""
    extensions = {name for check in CHECKS for name in check.needs if not name.startswith("cache.bust.")}
    assert "events.stream" in extensions
    assert [name for name in extensions if f"`{name}`" not in TEXT] == []


def test_every_extension_of_busts_is_on_the_page() -> None:
    """With what the suite asks of whoever lists it."""
    of_busts = {name for check in CHECKS for name in (*check.needs, *check.any_of) if name.startswith("cache.bust.")}
    assert len(of_busts) == 10
    for name in of_busts:
        assert f"`{name}`" in TEXT or f"`.{name.removeprefix('cache.bust.')}`" in TEXT, name


@pytest.mark.parametrize("language", list(SOURCES))
def test_code_is_the_daemons_own(language: str) -> None:
    """What the page shows stands in the daemon word for word."""
    source = (ROOT / SOURCES[language]).read_text(encoding="utf-8")
    shown = [block["text"] for block in FENCE.finditer(TEXT) if block["language"] == language]
    assert len(shown) == 2
    assert [text for text in shown if text not in source] == []


def test_links_lead_somewhere() -> None:
    """Files and, where one is named, headings."""
    links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", TEXT)
    assert len(links) > 10
    for path, heading in links:
        target = PAGE.parent / path if path else PAGE
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading[1:] in slugs
