"""The contract: the same as a file, at the daemon, and under arbitrary requests."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from pybustcall.daemon import DaemonSettings, Indexes, MemoryBackend, create_app
from pybustcall.daemon.app import ROUTES
from pybustcall.daemon.openapi import openapi_document
from pybustcall.models import BustReply, Problem, RegisterReply
from tests.conftest import PATIENCE, StartDaemon
from tests.plain_cache import engine_over

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.requirement("RES-02")


def test_the_committed_file_is_the_contract_of_the_code() -> None:
    """`make openapi` writes it anew."""
    committed = yaml.safe_load((ROOT / "docs/reference/openapi.yaml").read_text(encoding="utf-8"))
    assert committed == openapi_document()


def test_every_route_of_the_daemon_is_in_the_contract_and_in_the_page() -> None:
    """And nothing else is."""
    indexes = Indexes()
    app = create_app(engine_over(MemoryBackend(indexes), indexes), DaemonSettings())
    served = {
        (route.resource.canonical, route.method.lower())
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    told = {(path, method) for path, methods in openapi_document()["paths"].items() for method in methods}
    assert served - {("/openapi.json", "get")} == told
    page = (ROOT / "docs/reference/protocol.md").read_text(encoding="utf-8")
    assert {path for path, _ in told} <= set(re.findall(r"/api/v1/[a-z/{}]+", page))


def operations() -> dict[str, dict[str, Any]]:
    """Tell the contract's operations by the name of each."""
    methods = [operation for path in openapi_document()["paths"].values() for operation in path.values()]
    return {operation["operationId"]: operation for operation in methods}


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference within the contract."""
    found: Any = openapi_document() if "$ref" in part else part
    for name in part.get("$ref", "#").split("/")[1:]:
        found = found[name]
    return dict(found)


def test_every_route_tells_the_capability_that_it_takes() -> None:
    """As the daemon asks for it."""
    told = {
        (method.upper(), path): operation["x-bustcall-capability"]
        for path, methods in openapi_document()["paths"].items()
        for method, operation in methods.items()
    }
    assert told == {(it.method, it.path): it.capability for it in ROUTES if it.path != "/openapi.json"}


@pytest.mark.parametrize("name", operations())
def test_every_answer_carries_the_digest_of_the_document(name: str) -> None:
    """Of each status, in the contract; that it really does, the daemon's own tests and `test_contract` show."""
    for response in operations()[name]["responses"].values():
        header = resolved(resolved(response)["headers"]["Bustcall-Capabilities"])
        assert header["required"] is True


@pytest.mark.parametrize("name", operations())
def test_every_example_is_what_it_is_an_example_of(name: str) -> None:
    """Of requests and of answers: the schema beside it takes it."""
    operation = operations()[name]
    done = [operation["responses"][status] for status in ("200", "202") if status in operation["responses"]]
    contents = [content for answer in done for content in answer["content"].values()]
    if "requestBody" in operation:
        contents.append(operation["requestBody"]["content"]["application/json"])
    for content in contents:
        schema = {**content["schema"], "components": openapi_document()["components"]}
        Draft202012Validator(schema).validate(content["example"])


@pytest.mark.parametrize("name", operations())
def test_every_link_leads_to_an_operation(name: str) -> None:
    """By its name; what it hands over are headers and a body that the operation takes."""
    for link in operations()[name]["responses"]["200"].get("links", {}).values():
        target = operations()[link["operationId"]]
        taken = {"{in}.{name}".format(**resolved(parameter)) for parameter in target["parameters"]}
        assert set(link.get("parameters", {})) <= taken
        assert "requestBody" not in link or "requestBody" in target


def test_the_daemon_measures_every_client_but_those_that_only_ask() -> None:
    """428 is told exactly of the operations of which it is given."""
    measured = {name for name, operation in operations().items() if "428" in operation["responses"]}
    assert set(operations()) - measured == {"advertise", "bindings", "capabilities", "status"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
near_misses = st.fixed_dictionaries(
    {},
    optional={
        "target": st.text(max_size=40) | json_values,
        "key": st.text(max_size=40) | json_values,
        "strategy": st.sampled_from(["direct", "dimensional", "hybrid", "x"]) | json_values,
        "fault_tolerance": st.integers(-1, 14) | json_values,
        "depends_on": st.lists(st.text(max_size=20), max_size=3) | json_values,
        "binding": st.text(max_size=10) | json_values,
    },
)
bodies = st.binary(max_size=60) | (near_misses | json_values).map(lambda value: json.dumps(value).encode())
MODELS: dict[str, type[BaseModel]] = {"/api/v1/bust": BustReply, "/api/v1/entries": RegisterReply}


def ask(port: int, path: str, body: bytes, key: str | None = None) -> tuple[int, str, bytes]:
    """Send one POST; tell status, type and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {} if key is None else {"Idempotency-Key": key}
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    told = answer.status, answer.headers.get_content_type(), answer.read()
    connection.close()
    return told


@pytest.mark.parametrize("path", MODELS)
def test_whatever_is_sent_gets_an_answer_of_the_contract(path: str, start_daemon: StartDaemon) -> None:
    """Arbitrary bytes and near misses: a declared status, and a reply or a problem that reads as one."""
    port = int(start_daemon().url.rsplit(":", 1)[1])
    declared: dict[str, Any] = openapi_document()["paths"][path]["post"]["responses"]

    @given(bodies)
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    def fuzz(body: bytes) -> None:
        status, content_type, answer = ask(port, path, body)
        assert str(status) in declared
        assert status < 500
        assert content_type in resolved(declared[str(status)])["content"]
        (MODELS[path] if status == 200 else Problem).model_validate_json(answer)

    fuzz()


printable = st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_categories=["Cc"])


def test_a_key_is_taken_exactly_if_the_contract_says_so(start_daemon: StartDaemon) -> None:
    """Arbitrary header values: a refusal that names the header, or an answer."""
    port = int(start_daemon().url.rsplit(":", 1)[1])
    parameter = openapi_document()["components"]["parameters"]["Idempotency-Key"]
    assert {"$ref": "#/components/parameters/Idempotency-Key"} in operations()["bust"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("Idempotency-Key", "header")

    @given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=300) | st.text(printable))
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    def fuzz(key: str) -> None:
        status, _, answer = ask(port, "/api/v1/bust", b'{"target": "a"}', key)
        value = key.strip(" ")  # what surrounds a header's value is not part of it
        assert status == (200 if re.fullmatch(parameter["schema"]["pattern"].strip("^$"), value) else 400)
        if status == 400:
            assert Problem.model_validate_json(answer).field == "Idempotency-Key"

    fuzz()


def test_the_daemon_serves_the_contract(start_daemon: StartDaemon) -> None:
    """At /openapi.json, to everybody, also when it asks for a token."""
    port = int(start_daemon(env={"BUSTCALL_TOKEN": "s3cret"}).url.rsplit(":", 1)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/openapi.json")
    served = json.loads(connection.getresponse().read())
    connection.close()
    assert served == openapi_document()
