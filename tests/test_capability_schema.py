"""The schema of capability documents: every document that is served fits it, no wrong one does; and files are read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from jsonschema import Draft202012Validator, ValidationError

from pybustcall.capabilities import SCHEMA_ID, advertisement_bytes, capability_schema, load_document
from pybustcall.errors import ConfigurationError
from pybustcall.models import CapabilityDocument
from pybustcall.testing import FakeDaemon
from tests.conftest import PATIENCE, StartDaemon
from tests.interop import PeerProcess
from tests.interop.node_lua import start_lua_peer, start_node_peer
from tests.interop.rust_daemon import start_rust_daemon

pytestmark = [pytest.mark.requirement("RES-04"), pytest.mark.requirement("RES-09")]

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "docs/reference/capabilities.schema.json"
PAGE = ROOT / "docs/reference/capabilities.md"
LONG = 120.0


def check(document: object) -> None:
    """Raise if a document does not fit the committed schema."""
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(document)


def served(url: str, path: str = "/api/v1/capabilities") -> Any:
    """Ask a daemon for its document."""
    with urlopen(f"{url}{path}", timeout=PATIENCE) as answer:
        return json.load(answer)


def samples() -> dict[str, Any]:
    """Tell the documents that the reference page shows, by their bindings."""
    blocks = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    documents = [json.loads(block) for block in blocks]
    return {document["binding"]: document for document in documents if "binding" in document}


# The schema


def test_the_committed_schema_is_that_of_the_model() -> None:
    """`make schema` writes it anew."""
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == capability_schema()


def test_the_schema_is_one() -> None:
    """Of JSON Schema 2020-12, with a name of its own."""
    schema = capability_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert schema["$id"] == SCHEMA_ID


def test_every_field_says_what_it_means() -> None:
    """In the schema itself, and in the page."""
    schema = capability_schema()
    page = PAGE.read_text(encoding="utf-8")
    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        for name, field in part["properties"].items():
            assert field["description"], name
            assert f"`{name}`" in page, name


def test_only_the_binding_is_required() -> None:
    """And what is not known is ignored, at every level."""
    assert capability_schema()["required"] == ["binding"]
    check({"binding": "new", "colour": "green", "limits": {"max_colours": 3}, "requires": {"moon": "full"}})


# What fits it


def test_our_own_document_fits_it() -> None:
    """capabilities.json at the root, and what the package sends."""
    check(json.loads((ROOT / "capabilities.json").read_text(encoding="utf-8")))
    check(json.loads(advertisement_bytes()))


def test_the_document_in_the_wheel_fits_it(tmp_path: Path) -> None:
    """As it is built, whatever the checkout holds."""
    hatch = str(Path(sys.executable).parent / "hatchling")
    command = [hatch, "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=LONG)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        check(json.loads(wheel.read("pybustcall/capabilities.json")))


@pytest.mark.parametrize(
    "options",
    [(), ("--access", "cache.hotswap=private", "--require-semverx", "^0.1.0-0", "--require-capability", "cache.bust")],
    ids=["open", "with tiers and requirements"],
)
def test_the_reference_daemon_s_document_fits_it(options: tuple[str, ...], start_daemon: StartDaemon) -> None:
    """However it was started."""
    check(served(start_daemon(*options).url))


async def test_the_fake_daemon_s_document_fits_it() -> None:
    """So that what is tested with it is tested with a sound one."""
    async with FakeDaemon(capabilities=["cache.bust.idempotent"]) as fake:
        check(json.loads(fake._document_bytes()))


@pytest.mark.requirement("IMP-13")
@pytest.mark.parametrize("start", [start_node_peer, start_lua_peer], ids=["node", "lua"])
def test_the_documents_of_daemons_in_other_languages_fit_it(start: Callable[[], PeerProcess]) -> None:
    """As they are served."""
    with start() as peer:
        check(served(peer.url))


@pytest.mark.requirement("IMP-13")
def test_what_the_rust_daemon_says_in_the_older_form_fits_it() -> None:
    """Each binding's entry reads as a document that says less."""
    with start_rust_daemon() as peer:
        entries = served(peer.url, "/api/v1/bindings/capabilities")
    assert entries
    for entry in entries.values():
        check(entry)


@pytest.mark.requirement("IMP-13")
@pytest.mark.parametrize("binding", ["node", "lua", "rust"])
def test_the_samples_of_the_page_fit_it(binding: str, tmp_path: Path) -> None:
    """And are read as they stand, versions and ranges included."""
    sample = samples()[binding]
    check(sample)
    path = tmp_path / "capabilities.json"
    path.write_text(json.dumps(sample))
    assert load_document(path).binding == binding


# What does not

WRONG = [
    ("", "expected JSON"),
    ("[", "expected JSON"),
    ('{"binding": "x"} x', "expected JSON"),
    ('\ufeff{"binding": "x"}', "expected JSON"),
    ('{"binding": "\\ud800"}', "expected JSON"),
    ("[" * 100_000, "expected JSON"),
    ('{"binding": "x", "limits": {"max_batch": 1' + "0" * 5000 + "}}", "expected JSON"),
    ("[]", "expected an object, found a list"),
    ('"pybustcall"', "expected an object, found a string"),
    ("null", "expected an object, found null"),
    ("7", "expected an object, found a number"),
    ("{}", "binding: Field required"),
    ('{"binding": 7}', "binding: expected a valid string, found a number"),
    ('{"binding": "x", "binding": null}', "binding: expected a valid string, found null"),
    ('{"binding": "x", "version": 1.5}', "version: expected a valid string, found a number"),
    ('{"binding": "x", "capabilities": "cache.bust"}', "capabilities: expected a valid array, found a string"),
    ('{"binding": "x", "capabilities": ["a", null]}', "capabilities.1: expected a valid string, found null"),
    ('{"binding": "x", "capabilities": {"a": true}}', "capabilities: expected a valid array, found an object"),
    ('{"binding": "x", "endpoints": {"a": ["/"]}}', "endpoints.a: expected a valid string, found a list"),
    (
        '{"binding": "x", "supported_strategies": [1]}',
        "supported_strategies.0: expected a valid string, found a number",
    ),
    ('{"binding": "x", "fault_tolerance": 12}', "fault_tolerance: expected an object, found a number"),
    (
        '{"binding": "x", "fault_tolerance": {"max_stage": "12"}}',
        "fault_tolerance.max_stage: expected a valid integer, found a string",
    ),
    (
        '{"binding": "x", "fault_tolerance": {"p2p_fallback": "yes"}}',
        "fault_tolerance.p2p_fallback: expected a valid boolean, found a string",
    ),
    ('{"binding": "x", "requires": []}', "requires: expected an object, found a list"),
    ('{"binding": "x", "requires": {"semverx": 1}}', "requires.semverx: expected a valid string, found a number"),
    (
        '{"binding": "x", "requires": {"capabilities": "cache.bust"}}',
        "requires.capabilities: expected a valid array, found a string",
    ),
    ('{"binding": "x", "limits": {"max_batch": true}}', "limits.max_batch: expected a valid integer, found a boolean"),
    (
        '{"binding": "x", "access": {"cache.bust": "secret"}}',
        "access.cache.bust: expected 'public', 'protected' or 'private', found a string",
    ),
]


@pytest.mark.parametrize(("text", "why"), WRONG, ids=[why if len(text) < 200 else "hostile" for text, why in WRONG])
def test_a_wrong_document_is_told_by_file_field_expected_and_found(text: str, why: str, tmp_path: Path) -> None:
    """What cannot be read at all, and what does not fit."""
    path = tmp_path / "capabilities.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load_document(path)
    assert caught.value.setting == "capabilities"
    assert str(caught.value).startswith(f"capability document {str(path)!r}: {why}")


@pytest.mark.parametrize("text", [text for text, why in WRONG if "expected JSON" not in why])
def test_a_wrong_document_does_not_fit_the_schema_either(text: str) -> None:
    """The schema refuses what the model does."""
    with pytest.raises(ValidationError):
        check(json.loads(text))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("semverx", "one", "semverx: version 'one'"),
        ("semverx", "1.2", "semverx: version '1.2'"),
        ("requires", {"semverx": "^^1"}, "requires.semverx: range '^^1'"),
        ("requires", {"semverx": ""}, "requires.semverx: range ''"),
    ],
)
def test_a_document_with_a_version_that_is_none_is_told(field: str, value: object, why: str, tmp_path: Path) -> None:
    """The schema takes any text there; reading a file says what is wrong with it."""
    path = tmp_path / "capabilities.json"
    path.write_text(json.dumps({"binding": "x", field: value}))
    check({"binding": "x", field: value})
    with pytest.raises(ConfigurationError) as caught:
        load_document(path)
    assert why in str(caught.value)


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    """UTF-16, which JSON once was allowed to be, and what is nothing at all."""
    path = tmp_path / "capabilities.json"
    for wrong in ('{"binding": "x"}'.encode("utf-16"), b'{"binding": "\xff"}'):
        path.write_bytes(wrong)
        with pytest.raises(ConfigurationError, match="expected JSON: 'utf-8' codec"):
            load_document(path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """By its path, with the system's reason."""
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none.json", "No such file or directory")):
        with pytest.raises(ConfigurationError) as caught:
            load_document(path)
        assert str(caught.value) == f"capability document {str(path)!r}: cannot be read: {why}"


def test_our_own_file_is_read() -> None:
    """Whole, with everything that the client can do."""
    document = load_document(ROOT / "capabilities.json")
    assert document.binding == "pybustcall"
    of_busts = {name for name in document.capabilities if name.startswith("cache.bust.")}
    assert set(document.endpoints) == set(document.capabilities) - of_busts | {"cache.bust.jobs"}
    assert {name.removeprefix("cache.bust.") for name in of_busts} == {
        "all", "dry_run", "idempotent", "jobs", "namespace", "prefix", "settle", "soft", "tag", "verify",
    }  # fmt: skip


def test_a_document_that_says_little_is_read_with_defaults(tmp_path: Path) -> None:
    """What is not said is not required, not limited and not offered."""
    path = tmp_path / "capabilities.json"
    path.write_text('{"binding": "x", "colour": "green"}')
    document = load_document(path)
    assert document == CapabilityDocument(binding="x")
    assert (document.capabilities, document.requires.semverx, document.limits.max_batch) == ((), "*", None)
