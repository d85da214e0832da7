"""The contract against a daemon in a process of its own: schemathesis makes the requests and judges the answers.

It runs as a process, too, with its own settings (tests/schemathesis.toml, where every departure from its defaults is
explained) and what it has to be told of our formats (tests/contract_hooks.py). It is deterministic: the same requests
in every run of one version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pybustcall.daemon.openapi import openapi_document
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.requirement("RES-02"), pytest.mark.requirement("INT-04")]

ROOT = Path(__file__).parent.parent
LONG = 300.0
"""Seconds for one run of schemathesis; it takes 30 on an idle machine."""
TOKENS = {"BUSTCALL_TOKEN": "s3cret", "BUSTCALL_OPERATOR_TOKEN": "0perator"}
OPERATIONS = {
    operation["operationId"]: f"{method.upper()} {path}"
    for path, methods in openapi_document()["paths"].items()
    for method, operation in methods.items()
    if operation["operationId"] != "events"
}
"""All but the stream, which has no end that could be waited for."""


@contextmanager
def daemon(*options: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """Run a daemon with a cache in memory, which takes every target that the contract allows; tell its URL."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "pybustcall", "daemon", "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**inherited, **(env or {})},
    )
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the daemon ended with {process.wait(PATIENCE)} before it listened"
        try:
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait(PATIENCE)


def get(url: str) -> Any:
    """Ask for a JSON document."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


def enforced(contract: dict[str, Any], access: dict[str, str]) -> dict[str, Any]:
    """Write into a contract what a daemon's access makes of it: where a token may be wanted, it is."""
    for methods in contract["paths"].values():
        for operation in methods.values():
            if access[operation["x-bustcall-capability"]] != "public":
                operation["security"] = [{"token": []}]
    return contract


def route_of(asked: str, url: str) -> str:
    """Tell the path of a request as the contract writes it."""
    path = asked.removeprefix(url).partition("?")[0]
    return re.sub(r"(?<=^/api/v1/jobs/).*", "{job}", path)


LEFT_OUT = ("use_after_free",)
"""A job that is cancelled stays in the audit, where a resource that is deleted should be gone."""


def run(
    location: str, url: str, tmp_path: Path, *options: str, token: str = "none", left_out: tuple[str, ...] = ()
) -> Counter[tuple[str, int]]:
    """Have schemathesis run; fail with what it found. Tell how often each operation was answered with each status."""
    har = tmp_path / "run.har"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BUSTCALL_", "COVERAGE_"))}
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(ROOT / "tests/schemathesis.toml"),
            "run", location, "--url", url, "--no-color", "--generation-deterministic", "--checks", "all",
            "--report-har-path", str(har), "--exclude-checks", ",".join((*LEFT_OUT, *left_out)),
            "--exclude-operation-id", "events", *options,
        ],
        cwd=tmp_path,  # where it leaves its notes
        env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_PROXY": "*", "BUSTCALL_TOKEN": token},
        capture_output=True,
        encoding="utf-8",
        timeout=LONG,
        check=False,
    )  # fmt: skip
    told = "\n".join(line[:400] for line in done.stdout.splitlines())  # some of its requests have a megabyte
    assert done.returncode == 0, told + done.stderr
    return Counter(
        (f"{entry['request']['method']} {route_of(entry['request']['url'], url)}", entry["response"]["status"])
        for entry in json.loads(har.read_text(encoding="utf-8"))["log"]["entries"]
    )


def test_the_daemon_keeps_the_contract(tmp_path: Path) -> None:
    """Examples, borders, arbitrary requests and chains of them: whatever is sent is answered as the contract says.

    Every operation is carried out, and refuses; the registry is in a file, so that its writing is under test, too.
    """
    with daemon("--registry", str(tmp_path / "registry.db")) as url:
        answered = run(f"{url}/openapi.json", url, tmp_path)
    assert {name for name, operation in OPERATIONS.items() if not answered[operation, 200]} == set()
    assert answered["GET /api/v1/capabilities", 304]
    posts = {operation for operation in OPERATIONS.values() if operation.startswith("POST")}
    assert {operation for operation in posts if not answered[operation, 422]} == set()
    assert answered["POST /api/v1/hotswap", 409]
    assert {status for _, status in answered if status >= 500} == set()


def test_the_daemon_keeps_the_contract_when_it_wants_a_token(tmp_path: Path) -> None:
    """The same with the token; without it, or with another, whatever is protected is refused."""
    with daemon(env=TOKENS) as url:
        contract = tmp_path / "openapi.json"
        access = get(f"{url}/api/v1/capabilities")["access"]
        assert set(access.values()) == {"public", "protected"}
        contract.write_text(json.dumps(enforced(get(f"{url}/openapi.json"), access)))
        answered = run(str(contract), url, tmp_path, token=TOKENS["BUSTCALL_TOKEN"])
    assert {name for name, operation in OPERATIONS.items() if not answered[operation, 200]} == set()
    unguarded = {name for name, operation in OPERATIONS.items() if not answered[operation, 401]}
    assert unguarded == {"capabilities", "bindings"}


ALWAYS = {"capabilities", "advertise", "bindings", "status"}
"""What a client that does not fit may still ask."""


@pytest.mark.parametrize(
    ("status", "options", "env", "spared"),
    [
        (401, (), TOKENS, {"capabilities", "bindings"}),
        (403, tuple(f"--access={name}=private" for name in ("cache.bust", "cache.hotswap")), {}, None),
        (426, ("--require-semverx", ">=99.0.0"), {}, ALWAYS - {"advertise"}),
        (428, ("--require-capability", "cache.bust"), {}, ALWAYS),
    ],
    ids=["a token", "private", "a version", "a capability"],
)
def test_a_daemon_that_lets_nobody_in_refuses_by_the_contract(
    status: int, options: tuple[str, ...], env: dict[str, str], spared: set[str] | None, tmp_path: Path
) -> None:
    """The examples of the contract, to a daemon that wants a token, a version or a capability that they do not have.

    `positive_data_acceptance` is left out: that well-formed requests are refused is the point.
    """
    contract = tmp_path / "openapi.json"
    contract.write_text(json.dumps(openapi_document()))
    with daemon(*options, env=env) as url:
        answered = run(str(contract), url, tmp_path, "--phases", "examples", left_out=("positive_data_acceptance",))
    refused = {name for name, operation in OPERATIONS.items() if answered[operation, status]}
    assert refused == ({"bust", "hotswap"} if spared is None else set(OPERATIONS) - spared)
    assert not any(answered[OPERATIONS[name], 200] for name in refused)


def wanted(contract: dict[str, Any]) -> None:
    """Say that an answer has a field that it has not."""
    contract["components"]["schemas"]["ResolveReply"]["required"].append("colour")


def closed(contract: dict[str, Any]) -> None:
    """Say that a token is wanted everywhere, which the daemon was not told."""
    enforced(contract, dict.fromkeys(access_of(contract), "protected"))


def headed(contract: dict[str, Any]) -> None:
    """Say that every answer has a header that it has not."""
    contract["components"]["headers"]["Bustcall-Capabilities"]["schema"]["pattern"] = "^md5:"


def access_of(contract: dict[str, Any]) -> set[str]:
    """Tell the capabilities that a contract names."""
    return {
        operation["x-bustcall-capability"] for methods in contract["paths"].values() for operation in methods.values()
    }


@pytest.mark.parametrize(
    ("twist", "told"),
    [
        (wanted, '"colour" is a required property'),
        (closed, "API accepts requests without authentication"),
        (headed, "Response header does not conform to the schema"),
    ],
)
def test_a_contract_that_is_not_kept_is_told(
    twist: Callable[[dict[str, Any]], None], told: str, tmp_path: Path
) -> None:
    """The runs above can fail: each of these contracts says something that is not so."""
    contract = openapi_document()
    twist(contract)
    (tmp_path / "openapi.json").write_text(json.dumps(contract))
    with daemon() as url, pytest.raises(AssertionError, match=re.escape(told)):
        run(str(tmp_path / "openapi.json"), url, tmp_path, "--phases", "examples")


def test_every_departure_from_the_defaults_is_explained() -> None:
    """No check is switched off there, and each table of the settings stands below a comment."""
    text = (ROOT / "tests/schemathesis.toml").read_text(encoding="utf-8")
    assert "enabled" not in text
    blocks = text.strip().split("\n\n")
    assert len(blocks) > 3
    assert [block for block in blocks if not re.match("# ", block)] == []
