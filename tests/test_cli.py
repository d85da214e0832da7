"""The command line: results, JSON, exit codes, and never a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pybustcall import __main__ as entry
from pybustcall.cli import cli, run
from pybustcall.models import LayerReply
from pybustcall.testing import Answer, FakeDaemon
from tests.conftest import PATIENCE, StartDaemon, wait_until

ROOT = Path(__file__).parent.parent

DOWN = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No BUSTCALL_* variable of the developer reaches a test."""
    for name in [name for name in os.environ if name.startswith("BUSTCALL_")]:
        monkeypatch.delenv(name)


@contextmanager
def running(daemon: FakeDaemon) -> Iterator[FakeDaemon]:
    """Run a fake daemon on a loop of its own, since the command line runs one itself."""
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with daemon:
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(PATIENCE)
    try:
        yield daemon
    finally:
        stop.set()
        thread.join(PATIENCE)


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    """A fake daemon with the base protocol."""
    with running(FakeDaemon()) as daemon:
        yield daemon


EXTENSIONS = ("cache.dependencies", "semver.resolve", "cache.hotswap", "cache.register")


@pytest.fixture
def extended() -> Iterator[FakeDaemon]:
    """A fake daemon that knows dependencies."""
    with running(FakeDaemon(capabilities=EXTENSIONS)) as daemon:
        yield daemon


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def whole(arguments: tuple[str, ...]) -> None:
    """Call our own `run`, which turns errors into exit codes, with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pybustcall", *arguments])
        run()


def call(*arguments: str, stdin: str | bytes | None = None) -> tuple[int, str, str]:
    """Run the command in this process; tell exit code, standard output, standard error."""
    result = CliRunner().invoke(whole, ["--", *arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def command(*arguments: str, stdin: bytes | None = None, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pybustcall", *arguments],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, **(env or {})},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_bust_is_told_in_one_line(fake: FakeDaemon) -> None:
    """What was busted, by whom, how fast; exit code 0."""
    code, out, err = call("bust", "cdn/main.css", "--url", fake.url)
    assert code == 0
    assert out.startswith(f"busted cdn/main.css by {fake.url} in 0.")
    assert err == ""


def test_a_bust_as_json_tells_everything(fake: FakeDaemon) -> None:
    """One object a line for each target."""
    code, out, _ = call("bust", "a", "b", "--url", fake.url, "--json", "--strategy", "direct")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert sorted(line["target"] for line in lines) == ["a", "b"]
    assert lines[0]["ok"]
    assert lines[0]["stage"] == 12
    assert lines[0]["attempts"][0]["daemon"] == fake.url
    assert {request.strategy for request in fake.requests} == {"direct"}


def test_targets_come_from_standard_input(fake: FakeDaemon) -> None:
    """One a line, empty lines passed over, the last without a newline, beside those on the command line."""
    code, _, err = call("bust", "first", "-", "--url", fake.url, stdin="a/1\r\n\nnaïve key\nlast")
    assert code == 0
    assert sorted(request.target for request in fake.requests) == ["a/1", "first", "last", "naïve key"]
    assert "4 of 4 busted" in err


def test_a_pipe_is_read_as_it_comes(start_daemon: StartDaemon) -> None:
    """Two thousand targets through a real pipe, with a bad one among them."""
    lines = (
        b"".join(b"key/%d\n" % number for number in range(2000)) + b"bad\x01key\n\xff\xfe\n" + b"x" * 100_000 + b"\n"
    )
    code, out, err = command("bust", "-", "--url", start_daemon().url, stdin=lines)
    assert code == 1
    assert out.count("busted key/") == 2000
    assert "control character U+0001" in err
    assert "lone surrogate" in err
    assert "which is more than 8192" in err
    assert "2000 of 2003 busted" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["bust", ""], 2, "target is empty; nothing was sent"),
        (["bust", "a\nb"], 2, "control character"),
        (["bust", "a", "--fault-tolerance", "13"], 2, "fault_tolerance must be an integer from 0 to 12"),
        (["bust", "a", "--url", "nonsense"], 2, "url 'nonsense' must begin with http://"),
        (["bust", "a", "--url", DOWN, "--peer", DOWN], 2, "the same daemon as the hub"),
        (["bust", "a", "--timeout", "-1"], 2, "timeout must be above 0"),
        (["bust", "a", "--timeout", "soon"], 2, "'soon' is not a valid float"),
        (["bust", "a", "--token-file", "missing"], 2, "token file missing: cannot be read"),
        (["bust", "a", "--config", "missing.toml"], 2, "missing.toml: cannot be read"),
        (["bust", "a", "--strategy", ""], 2, "strategy is empty"),
        (["bust"], 2, "Missing argument 'TARGET...'"),
        (["burst"], 2, "No such command 'burst'"),
        (["bust", "a", "--url", DOWN], 3, "no connection could be made (Connection refused)"),
        (["status", "--url", DOWN], 3, f"{DOWN}: no connection could be made"),
        (["resolve", "a@b", "--url", DOWN], 2, "spec is not name@range"),
        (["resolve", "a@^1", "--url", DOWN], 3, "no connection could be made"),
        (["announce", "a", "one", "--url", DOWN], 2, "versions[0] is no version"),
        (["announce", "a", "--url", DOWN], 2, "Missing argument 'VERSION...'"),
        (["hot-swap", "a", "--url", DOWN], 2, "a swap is NAME=VERSION, such as pricing-model=2.1.0, not 'a'"),
        (["hot-swap", "a=1.0.0", "a=2.0.0", "--url", DOWN], 2, "swaps names 'a' twice"),
        (["hot-swap", "a=1.0.0", "--url", DOWN], 3, "it was not applied: http://127.0.0.1:1: no connection"),
        (["conformance", "nonsense"], 2, "url 'nonsense' must begin with http://"),
        (["conformance", "http://daemon.example", "--token-file", "missing"], 2, "missing: cannot be read"),
        (["conformance", DOWN, "--timeout", "0"], 2, "0.0 is not in the range"),
        (["daemon", "--root", "missing", "--port", "0"], 4, "missing"),
        (["daemon", "--backend", "files"], 2, "go together"),
        (["daemon", "--backend", "memory", "--root", "."], 2, "go together"),
        (["daemon", "--host", "0.0.0.0", "--port", "0"], 4, "needs a token"),
        (["daemon", "--port", "0", "--register", "missing.json"], 4, "missing.json"),
        (["daemon", "--token-file", "missing"], 4, "token file missing: cannot be read"),
        (["daemon", "--port", "99999"], 2, "99999 is not in the range"),
        (["daemon", "--operator-token-file", "missing"], 4, "token file missing: cannot be read"),
        (["daemon", "--access", "cache.bust"], 2, "--access takes NAME=TIER, such as cache.bust=public"),
        (["daemon", "--access", "cache.bust=open"], 4, "the access of cache.bust must be one of public, protected"),
        (["daemon", "--access", "tea=public"], 4, "there is no capability 'tea' to give access to"),
        (["daemon", "--require-semverx", "new"], 4, "semverx: range 'new'"),
        (["daemon", "--port", "0", "--state", "a", "--registry", "./a"], 4, "cannot both be kept in 'a'; give each"),
        (["daemon", "--require-capability", "two words"], 4, "'two words' is not the name of a capability"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence_and_an_exit_code(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a traceback, and nothing on standard output."""
    monkeypatch.chdir(tmp_path)
    got, out, err = call(*arguments)
    assert (got, out) == (code, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Answer(status=422, body=b"no"), 1),
        (Answer(status=403), 1),
        (Answer(body=b"<html>", headers={"Content-Type": "text/html"}), 1),
        (Answer(body=b"x" * 10_000_000), 1),
        (Answer(body=b'{"status": "success", "cache_key": "sha256:0"}'), 1),
        (Answer(hang=True), 3),
    ],
)
def test_the_exit_code_tells_whether_trying_again_may_help(fake: FakeDaemon, answer: Answer, code: int) -> None:
    """1 where it will not, 3 where it may."""
    fake.plan.append(answer)
    got, _, err = call("bust", "a", "--url", fake.url, "--timeout", "0.3")
    assert got == code
    assert "failed 'a' (stage" in err


def test_a_reply_cut_in_the_middle_is_tried_again_and_told(fake: FakeDaemon) -> None:
    """Three times cut: it may help to try later."""
    fake.plan.extend([Answer(cut=5)] * 3)
    code, _, err = call("bust", "a", "--url", fake.url)
    assert code == 3
    assert "in the middle of its answer" in err


def test_a_success_below_the_tolerance_is_a_failure(fake: FakeDaemon) -> None:
    """As the API raises then."""
    fake.plan.append(Answer(reset=True))
    code, _, err = call("bust", "a", "--url", fake.url, "--fault-tolerance", "0")
    assert code == 1
    assert "stage 9 is below the tolerance" in err


def test_a_failure_within_the_tolerance_is_told_and_no_failure(fake: FakeDaemon) -> None:
    """As the API does not raise then: exit code 0, and the result says what happened."""
    fake.plan.extend([Answer(status=422)] * 2)
    code, _, err = call("bust", "a", "--url", fake.url, "--fault-tolerance", "12")
    assert (code, err.split()[0]) == (0, "failed")
    code, out, _ = call("bust", "a", "--url", fake.url, "--fault-tolerance", "12", "--json")
    line = json.loads(out)
    assert (code, line["ok"], line["tolerated"]) == (0, False, True)
    assert [request.fault_tolerance for request in fake.requests] == [12, 12]


def test_settings_come_from_file_environment_and_options(
    fake: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options win; a file stands in place of the environment."""
    monkeypatch.setenv("BUSTCALL_URL", fake.url)
    assert call("bust", "a")[0] == 0
    config = tmp_path / "settings.toml"
    config.write_text(f'[pybustcall]\nurl = "{DOWN}"\n[pybustcall.retry]\nattempts = 1\n')
    assert call("bust", "a", "--config", str(config))[0] == 3
    assert call("bust", "a", "--config", str(config), "--peer", fake.url)[0] == 0
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    assert call("bust", "a", "--token-file", str(token))[0] == 0
    monkeypatch.setenv("BUSTCALL_PEERS", fake.url)
    assert call("bust", "a", "--url", DOWN)[0] == 3  # peers from elsewhere do not join a hub that was named
    monkeypatch.delenv("BUSTCALL_PEERS")
    assert fake.headers[-1]["Authorization"] == "Bearer s3cret"
    token.write_text("s€cret")
    code, _, err = call("bust", "a", "--token-file", str(token))
    assert code == 2
    assert "more than visible ASCII" in err
    assert "s€cret" not in err


def test_the_environment_can_switch_busts_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command says so."""
    monkeypatch.setenv("BUSTCALL_DISABLED", "1")
    code, out, _ = call("bust", "a")
    assert (code, out.split()[0]) == (0, "disabled")


def test_status_asks_every_daemon(fake: FakeDaemon) -> None:
    """0 only if all answer; each has its line."""
    code, out, _ = call("status", "--url", fake.url)
    assert code == 0
    assert out.startswith(f"{fake.url}: up, pid ")
    code, out, _ = call("status", "--url", fake.url, "--peer", DOWN, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert [line["ok"] for line in lines] == [True, False]
    assert lines[0]["cache_size"] == "0B"
    assert lines[1]["error"] == "DaemonsUnavailable"


def test_capabilities_asks_every_daemon(fake: FakeDaemon) -> None:
    """In words and as JSON."""
    code, out, _ = call("capabilities", "--url", fake.url)
    assert code == 0
    assert "pybustcall 0.1.0a1: cache.bust, daemon.capabilities" in out
    code, out, _ = call("capabilities", "--url", fake.url, "--json")
    assert json.loads(out)["document"]["binding"] == "pybustcall"


@pytest.mark.requirement("IMP-10")
def test_capabilities_tells_what_a_daemon_requires(fake: FakeDaemon) -> None:
    """And whether this client has it."""
    for requires, told, lacks in (
        ({"semverx": ">=0.1.0-0", "capabilities": ["cache.bust"]}, "version >=0.1.0-0, cache.bust (this one fits)", 0),
        ({"capabilities": ["x.y"]}, "requires of clients: x.y (capability x.y is missing)", 1),
        ({"semverx": "new"}, "version new (what it requires of its clients cannot be read: range 'new'", 1),
    ):
        fake.advertises = {"requires": requires}
        code, out, _ = call("capabilities", "--url", fake.url)
        assert code == 0
        assert told in out
        assert len(json.loads(call("capabilities", "--url", fake.url, "--json")[1])["unmet"]) == lacks
    fake.advertises = {}
    assert "requires" not in call("capabilities", "--url", fake.url)[1]
    with running(FakeDaemon(document=False)) as older:
        assert json.loads(call("capabilities", "--url", older.url, "--json")[1])["unmet"] == []


def test_dependencies_are_announced_and_resolved(extended: FakeDaemon) -> None:
    """In words and as JSON."""
    at = ["--url", extended.url]
    code, out, _ = call("announce", "model", "1.0.0", "1.1.0", "--current", "1.0.0", *at)
    line = f"model: current 1.0.0, known 1.0.0, 1.1.0, by {extended.url}\n"
    assert (code, out) == (0, line)
    assert call("dependencies", *at)[:2] == (0, line)
    code, out, _ = call("announce", "model", "2.0.0-rc.1", "--json", *at)
    assert json.loads(out) == {
        "ok": True, "name": "model", "current": "1.0.0", "versions": ["1.0.0", "1.1.0", "2.0.0-rc.1"],
        "daemon": extended.url,
    }  # fmt: skip
    assert json.loads(call("dependencies", "--json", *at)[1])["dependencies"][0]["current"] == "1.0.0"
    code, out, _ = call("resolve", "model@^1.0.0", *at)
    assert (code, out) == (0, f"model@1.1.0 (stable) by {extended.url}\n")
    code, out, _ = call("resolve", "model@>=2.0.0-rc.1", "--json", *at)
    line = json.loads(out)
    assert (line["ok"], line["resolved"], line["version"], line["state"], line["daemon"]) == (
        True, "model@2.0.0-rc.1", "2.0.0-rc.1", "experimental", extended.url
    )  # fmt: skip


def test_a_daemon_without_dependencies_says_so(extended: FakeDaemon) -> None:
    """And not nothing."""
    assert call("dependencies", "--url", extended.url)[:2] == (0, "no dependency was announced\n")


def test_a_dependency_is_forgotten(extended: FakeDaemon) -> None:
    """By the daemon that says so."""
    at = ["--url", extended.url]
    call("announce", "model", "1.0.0", *at)
    assert call("forget", "model", *at)[:2] == (0, f"forgot model by {extended.url}\n")
    assert json.loads(call("forget", "model", "--json", *at)[1]) == {
        "ok": True,
        "name": "model",
        "daemon": extended.url,
    }
    assert extended.dependencies == {}


def test_an_entry_is_registered(extended: FakeDaemon) -> None:
    """With what it was made of, and where."""
    at = ["--url", extended.url]
    code, out, _ = call("register", "page", "--depends-on", "model", "--depends-on", "templates", *at)
    assert (code, out) == (0, f"registered page by {extended.url}\n")
    assert extended.entries["page"] == ("model", "templates")
    assert json.loads(call("register", "page", "--json", *at)[1]) == {
        "ok": True, "key": "page", "depends_on": [], "tags": [], "ttl": None, "namespace": None,
        "daemon": extended.url,
    }  # fmt: skip


@pytest.mark.requirement("IMP-12")
def test_dependencies_are_swapped_together(extended: FakeDaemon) -> None:
    """Each with its version before; and how many entries went."""
    at = ["--url", extended.url]
    for name in ("model", "@scope/templates"):
        call("announce", name, "1.0.0", *at)
    extended.entries["page"] = ("model",)
    code, out, _ = call("hot-swap", "model=1.1.0", "@scope/templates=1.2.0", *at)
    assert code == 0
    first, second, last = out.splitlines()
    assert (first, second) == (
        "swapped model from 1.0.0 to 1.1.0",
        "swapped @scope/templates from 1.0.0 to 1.2.0",
    )
    assert last.startswith(f"committed by {extended.url} in 0.")
    assert last.endswith(" s, 1 busted")
    extended.swap_plan.append(Answer.problem(503))
    code, out, _ = call("hot-swap", "model=1.2.0", *at)
    assert code == 0
    assert "0 busted, after faults: " in out
    line = json.loads(call("hot-swap", "model=1.0.0", "--json", *at)[1])
    assert line["swaps"] == [{"name": "model", "from": "1.2.0", "to": "1.0.0"}]
    assert (line["ok"], line["stage"], line["busted"], line["daemon"]) == (True, 12, 0, extended.url)
    assert [len(done.swaps) for done in extended.swaps] == [2, 1, 1]


@pytest.mark.requirement("IMP-12")
def test_a_swap_that_the_rules_refuse_is_told_with_every_reason(extended: FakeDaemon) -> None:
    """Exit code 1, and nothing has changed; no reason is said twice; an option opts in to a rule."""
    at = ["--url", extended.url]
    call("announce", "model", "1.0.0", *at)
    code, out, err = call("hot-swap", "model=2.0.0-rc.1", *at)
    assert (code, out) == (1, "")
    assert "it was not applied" in err
    for part in ("major", "minor", "patch"):
        assert err.count(f"model: {part}: stable to experimental takes allow_experimental") == 1
    code, out, _ = call("hot-swap", "model=2.0.0-rc.1", "--json", *at)
    line = json.loads(out)
    assert (code, line["ok"], line["error"], line["applied"], len(line["unmet"])) == (1, False, "BustRejected", "no", 3)
    for version, option in (
        ("2.0.0-rc.1", "--allow-experimental"),
        ("2.0.0", "--validated"),
        ("1.0.0-legacy", "--rollback"),
        ("3.0.0", "--migrate"),
    ):
        assert call("hot-swap", f"model={version}", *at)[0] == 1
        assert call("hot-swap", f"model={version}", option, *at)[0] == 0


def test_a_swap_may_say_which_version_must_be_current(extended: FakeDaemon) -> None:
    """Another one is refused, and nothing has changed; what cannot be meant is told before anything is sent."""
    at = ["--url", extended.url]
    call("announce", "@scope/model", "1.0.0", *at)
    code, _, err = call("hot-swap", "@scope/model=1.2.0", "--from", "@scope/model=1.1.0", *at)
    assert code == 1
    assert "1.1.0" in err
    code, out, _ = call("hot-swap", "@scope/model=1.2.0", "--from", "@scope/model=1.0.0", *at)
    assert (code, out.splitlines()[0]) == (0, "swapped @scope/model from 1.0.0 to 1.2.0")
    for options, told in (
        (["--from", "model"], "--from is NAME=VERSION, such as pricing-model=2.1.0, not 'model'"),
        (["--from", "other=1.0.0"], "--from names other, which is not swapped here"),
        (["--from", "a=1.0.0", "--from", "a=1.1.0"], "--from names a dependency twice"),
        (["--from", "a=one"], "'one'"),
    ):
        code, _, err = call("hot-swap", "a=1.2.0", *options, *at)
        assert code == 2
        assert told in err


def test_a_daemon_without_the_capability_is_told(fake: FakeDaemon) -> None:
    """Exit code 1: repeating will not help."""
    for arguments in (["resolve", "a"], ["announce", "a", "1.0.0"], ["hot-swap", "a=1.0.0"]):
        code, out, err = call(*arguments, "--url", fake.url)
        assert (code, out) == (1, "")
        assert "it does not advertise " in err


@pytest.mark.requirement("INT-01")
@pytest.mark.requirement("INT-02")
@pytest.mark.requirement("RES-12")
def test_a_daemon_is_checked_for_conformance(start_brisk: StartDaemon) -> None:
    """One line a check; exit code 0 if none failed; with --strict also what only daemons of ours must do."""
    url = start_brisk().url
    code, out, err = call("conformance", url)
    *lines, last = out.splitlines()
    assert (code, err) == (0, "")
    assert re.fullmatch(r"busts a key and answers with its SHA-256 +pass", lines[0])
    skipped = [line for line in lines if " skipped  " in line]
    assert any(re.fullmatch(r"busts what depends on what is swapped +skipped  \S.*", line) for line in skipped)
    assert last == f"{len(lines) - len(skipped)} passed, 0 failed, {len(skipped)} skipped"
    code, out, _ = call("conformance", url, "--strict", "--json")
    checks = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert len(checks) > len(lines)
    assert checks[0] == {"check": "busts a key and answers with its SHA-256", "verdict": "pass", "detail": ""}


def test_a_daemon_that_fails_a_check_is_told(fake: FakeDaemon) -> None:
    """Exit code 1, and what was found instead, without what would steer the terminal."""
    fake.plan.append(Answer(body=b'{"success": true, "cache_key": "\\u001b[31m"}'))
    code, out, err = call("conformance", fake.url)
    assert (code, err) == (1, "")
    assert "FAIL     cache_key does not begin with sha256:" in out
    assert re.search(r"^swaps dependencies +skipped  it does not advertise ", out, re.MULTILINE)
    assert ", 1 failed, " in out.splitlines()[-1]
    assert "\x1b" not in out


def test_a_daemon_that_is_not_there_cannot_be_checked() -> None:
    """Exit code 3 and one sentence; as JSON, every check."""
    code, out, err = call("conformance", DOWN)
    assert (code, out) == (3, "")
    assert err.startswith(f"Error: nothing answered at {DOWN}: Cannot connect to host ")
    assert len(err.splitlines()) == 1
    code, out, err = call("conformance", DOWN, "--json")
    checks = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (3, "")
    assert len(checks) > 20
    assert checks[-1]["detail"] == "not asked any more"


def test_a_daemon_that_goes_while_it_is_checked_is_told_check_by_check(fake: FakeDaemon) -> None:
    """What it answered before is worth telling, and so is when it went."""
    fake.plan.extend([Answer()] + [Answer(reset=True)] * 100)
    code, out, err = call("conformance", fake.url)
    assert (code, err) == (1, "")
    assert "not asked any more" in out
    assert out.splitlines()[-1].startswith("1 passed, ")


def test_a_daemon_with_a_token_is_checked_with_it(
    start_brisk: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file or the environment, as everywhere."""
    daemon = start_brisk(env={"BUSTCALL_TOKEN": "s3cret"})
    code, out, err = call("conformance", daemon.url)
    assert (code, err) == (1, "each failure is a 401: the daemon wants a token (--token-file or BUSTCALL_TOKEN)\n")
    assert re.search(r"^\d+ passed, \d+ failed, \d+ skipped$", out.splitlines()[-1])
    token = tmp_path / "token"
    token.write_text("an0ther\n")
    code, out, err = call("conformance", daemon.url, "--token-file", str(token), "--json")
    assert (code, err) == (
        1, "each failure is a 401: the daemon wants another token (--token-file or BUSTCALL_TOKEN)\n"
    )  # fmt: skip
    assert all(json.loads(line)["verdict"] for line in out.splitlines())
    token.write_text("s3cret\n")
    code, _, err = call("conformance", daemon.url, "--token-file", str(token))
    assert (code, err) == (0, "")
    monkeypatch.setenv("BUSTCALL_TOKEN", "s3cret")
    assert call("conformance", daemon.url)[0] == 0


@pytest.mark.parametrize("option", ["--registry", "--state"])
def test_a_daemon_does_not_take_a_text_for_its_database(tmp_path: Path, option: str) -> None:
    """It may have been meant for another option, and stays as it is."""
    path = tmp_path / "entries.json"
    path.write_text('{"index.html": ["products/7.html"]}')
    code, out, err = command("daemon", "--port", "0", option, str(path))
    assert (code, out) == (4, "")
    assert "is a text and no database, and is left as it is; choose another path" in err
    assert ("--register" in err) == (option == "--registry")
    assert "Traceback" not in err
    assert [file.read_text() for file in tmp_path.iterdir()] == ['{"index.html": ["products/7.html"]}']


def test_a_service_that_is_no_daemon_is_told(start_daemon: StartDaemon) -> None:
    """A wrong base path answers 404: exit code 1, since repeating will not help."""
    code, _, err = call("status", "--url", start_daemon().url + "/elsewhere")
    assert code == 1
    assert "not a bustcall daemon's route" in err


def test_version_and_help_are_there() -> None:
    """And name every command."""
    code, out, _ = call("--version")
    assert (code, out) == (0, "pybustcall, version 0.1.0a1\n")
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in cli.commands)


def test_a_port_in_use_is_told(start_daemon: StartDaemon) -> None:
    """Exit code 4, and which port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = command("daemon", "--port", str(port))
    assert (code, out) == (4, "")
    assert f"port {port} on 127.0.0.1 is in use" in err
    assert "Traceback" not in err


def test_the_daemon_says_where_it_listens_and_ends_with_sigterm() -> None:
    """Without --root it keeps a registry in memory; exit code 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pybustcall", "daemon", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    assert line.startswith("bustcall daemon listening on http://127.0.0.1:")
    assert line.endswith("(memory backend)\n")
    process.terminate()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert b"Traceback" not in err


def test_the_daemon_serves_in_this_process_too(tmp_path: Path) -> None:
    """With registrations from a file, on a Unix socket, until it is told to stop."""
    register, path = tmp_path / "register.json", tmp_path / "b.sock"
    register.write_text('{"index.html": ["product.html"]}')
    (tmp_path / "index.html").write_text("old")
    answers: list[tuple[int, str, str]] = []

    def ask_and_stop() -> None:
        wait_until(path.exists, "the daemon listens")
        answers.append(command("bust", "product.html", "--url", f"unix://{path}"))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_and_stop)
    thread.start()
    code, out, _ = call("daemon", "--root", str(tmp_path), "--socket", str(path), "--register", str(register), "--json")
    thread.join(PATIENCE)
    assert code == 0
    assert json.loads(out)["backend"] == "files"
    assert answers[0][0] == 0
    assert not (tmp_path / "index.html").exists()


def test_an_interrupted_bust_ends_with_130(fake: FakeDaemon) -> None:
    """Ctrl-C while a target is under way and standard input is still open."""
    fake.plan.append(Answer(hang=True))
    process = subprocess.Popen(
        [sys.executable, "-m", "pybustcall", "bust", "a", "-", "--url", fake.url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_until(lambda: fake.requests, "the bust is under way")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    _, err = process.communicate()
    assert b"Traceback" not in err
    assert b"interrupted" in err


def test_a_reader_that_goes_away_stops_no_bust(start_daemon: StartDaemon) -> None:
    """`pybustcall bust - | head -1`: the busts are what counts, and they go on."""
    daemon = start_daemon()
    line = f"seq 1 3000 | {sys.executable} -m pybustcall bust - --url {daemon.url} | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=PATIENCE, check=True)
    assert done.stdout.startswith(b"busted")
    assert b"3000 of 3000 busted" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("seq 1 50 | {command} bust - --json --url {url} > /dev/full", "not every result could be written"),
        ("{command} status --url {url} > /dev/full", "standard output cannot be written: No space left"),
        ("{command} bust - --url {url} <&-", "standard input is closed"),
        ("{command} bust a --url {url} >&-", ""),
        ("{command} bust - --url {url} < /dev/null", "0 of 0 busted"),
        ("{command} daemon --port 0 > /dev/full", "No space left"),
    ],
)
def test_closed_and_full_streams_get_a_sentence(line: str, says: str, start_daemon: StartDaemon) -> None:
    """Never a traceback."""
    line = line.format(command=f"{sys.executable} -m pybustcall", url=start_daemon().url)
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=PATIENCE, check=False)
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_json_is_json_whatever_the_target(fake: FakeDaemon) -> None:
    """Bytes that are no UTF-8 are escaped."""
    code, out, _ = call("bust", "-", "--json", "--url", fake.url, stdin=b"\xff\n")
    assert code == 1
    assert not json.loads(out.encode())["ok"]
    assert out.isascii()


def test_what_a_daemon_says_does_not_steer_the_terminal(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences are shown as question marks."""
    monkeypatch.setattr("pybustcall.testing.fake_daemon.VERSION", "\x1b[31m1.0")
    _, out, _ = call("capabilities", "--url", fake.url)
    assert "?[31m1.0" in out
    assert "\x1b" not in out


def test_without_the_extra_a_hint_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip install 'pybustcall[cli]'."""
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.delitem(sys.modules, "pybustcall.cli")
    with pytest.raises(SystemExit, match=r"pip install 'pybustcall\[cli\]'"):
        entry.main()


def test_another_missing_module_is_not_mistaken_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation shows what is broken."""
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.delitem(sys.modules, "pybustcall.cli")
    with pytest.raises(ModuleNotFoundError, match="pydantic"):
        entry.main()


def test_without_the_daemons_extra_a_hint_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 4."""
    import pybustcall

    monkeypatch.setitem(sys.modules, "sortedcontainers", None)
    for name in [name for name in sys.modules if name.startswith("pybustcall.daemon.") or name == "pybustcall.daemon"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pybustcall, "daemon", raising=False)
    code, _, err = call("daemon", "--port", "0")
    assert code == 4
    assert "pip install 'pybustcall[daemon]'" in err


def test_many_targets_show_a_progress_bar_on_a_terminal(fake: FakeDaemon) -> None:
    """On standard error, and only if that is a terminal; standard output stays for results."""
    ours, theirs = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "pybustcall", "bust", "a", "b", "c", "--url", fake.url],
        stdout=subprocess.PIPE, stderr=theirs, timeout=PATIENCE, check=True,
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "busting" in shown
    assert "3/3" in shown
    assert "3 of 3 busted" in shown
    assert done.stdout == b""


def test_an_outage_is_kept_listed_and_replayed(fake: FakeDaemon, tmp_path: Path) -> None:
    """A bust that nobody takes: exit code 0, since it is on disk; the outbox's commands see to it."""
    box = ["--outbox", str(tmp_path / "outbox.db")]
    code, out, err = call("bust", "p/1", "p/2", "--url", DOWN, *box)
    assert (code, out) == (0, "")
    assert err.count("deferred 'p/") == 2
    assert "0 of 2 busted, 2 kept for later" in err
    code, out, err = call("outbox", "list", *box)
    assert code == 0
    assert out.count(" pending 'p/") == 2
    assert "2 pending, 0 being delivered, 0 set aside" in err
    code, out, _ = call("outbox", "list", "--json", "--limit", "1", *box)
    line = json.loads(out)
    assert (line["state"], line["destination"], line["target"][:2]) == ("pending", "any", "p/")
    code, out, err = call("outbox", "replay", "--url", DOWN, *box)
    assert code == 3
    assert "0 delivered" in out
    assert "left: http://127.0.0.1:1: no connection could be made" in err
    code, out, _ = call("outbox", "replay", "--url", fake.url, *box)
    assert (code, out) == (0, "2 delivered, 0 refused and set aside, 0 left\n")
    assert sorted(request.target for request in fake.requests) == ["p/1", "p/2"]
    code, out, err = call("outbox", "list", *box)
    assert (out, err) == ("", "0 pending, 0 being delivered, 0 set aside\n")


def test_what_was_set_aside_is_retried_or_purged(fake: FakeDaemon, tmp_path: Path) -> None:
    """By number, or all of it; what still waits goes only with --all."""
    box = ["--outbox", str(tmp_path / "outbox.db"), "--url", fake.url]
    call("bust", "a", "--outbox", str(tmp_path / "outbox.db"), "--url", DOWN)
    fake.plan.append(Answer.problem(422, detail="no such thing"))
    code, out, _ = call("outbox", "replay", *box)
    assert (code, out) == (0, "0 delivered, 1 refused and set aside, 0 left\n")
    _, out, _ = call("outbox", "list", *box)
    assert "aside 'a' for any" in out
    assert "no such thing" in out
    code, out, err = call("outbox", "retry", "999", *box)
    assert (code, out) == (1, "0 will be delivered again\n")
    assert "outbox list" in err
    assert json.loads(call("outbox", "retry", "1", "--json", *box)[1]) == {"retried": 1}
    code, out, err = call("outbox", "purge", "1", *box)
    assert (code, out) == (1, "0 deleted\n")
    assert "--all" in err
    assert call("outbox", "purge", *box)[1].endswith(" deleted\n")
    call("bust", "b", "--outbox", str(tmp_path / "outbox.db"), "--url", DOWN)
    assert call("outbox", "purge", "--all", "--outbox", str(tmp_path / "outbox.db"), "--url", DOWN)[1] == "2 deleted\n"


def test_without_an_outbox_its_commands_say_how_to_name_one() -> None:
    """Exit code 2, and no traceback; a file that cannot be used is exit code 1."""
    code, _, err = call("outbox", "list")
    assert code == 2
    assert "--outbox FILE" in err
    code, _, err = call("outbox", "list", "--outbox", "/nowhere/outbox.db")
    assert code == 2
    assert "there is no outbox at /nowhere/outbox.db" in err
    code, _, err = call("bust", "a", "--url", DOWN, "--outbox", "/nowhere/outbox.db")
    assert code == 1
    assert "/nowhere" in err
    assert call("status", "--url", DOWN, "--outbox", "x.db")[0] == 2  # it has no use for one


def test_rows_for_a_daemon_that_is_not_named_are_told(fake: FakeDaemon, tmp_path: Path) -> None:
    """The usual reason why nothing is delivered: the operator's shell lacks the service's settings."""
    box = ["--outbox", str(tmp_path / "outbox.db")]
    call("bust", "a", "--url", fake.url, "--peer", DOWN, "--delivery", "all", *box)
    code, out, err = call("outbox", "replay", "--url", fake.url, "--json", *box)
    assert code == 3
    assert json.loads(out) == {"delivered": 0, "refused": 0, "left": 1}
    assert f"for {DOWN}, which is none of the daemons here" in err


def test_a_partial_delivery_is_told(fake: FakeDaemon, tmp_path: Path) -> None:
    """Who has it and who is owed it, as JSON."""
    code, out, _ = call(
        "bust",
        "a",
        "--url",
        fake.url,
        "--peer",
        DOWN,
        "--delivery",
        "all",
        "--json",
        "--outbox",
        str(tmp_path / "o.db"),
    )
    line = json.loads(out)
    assert code == 0
    assert (line["status"], line["ok"], line["tolerated"]) == ("partial", False, True)
    assert [delivery["status"] for delivery in line["deliveries"]] == ["acknowledged", "owed"]


# Kinds, dry runs, jobs


BUSTS = ("cache.register", *(
    f"cache.bust.{name}"
    for name in ("all", "dry_run", "jobs", "namespace", "prefix", "settle", "soft", "tag", "verify")
))  # fmt: skip


@pytest.fixture
def whole_fake() -> Iterator[FakeDaemon]:
    """A fake daemon with everything about busts, and some entries."""
    with running(FakeDaemon(capabilities=BUSTS)) as daemon:
        daemon.entries.update({"a/1": (), "a/2": (), "b": ()})
        yield daemon


def test_every_option_of_a_bust_reaches_the_daemon(whole_fake: FakeDaemon) -> None:
    """As the API has it."""
    options = ["--kind", "prefix", "--soft", "--namespace", "n", "--verify", "--settle", "2", "--reason", "price"]
    code, out, _ = call("bust", "a", *options, "--strategy", "direct", "--json", "--url", whole_fake.url)
    (asked,) = whole_fake.requests
    assert (asked.kind, asked.soft, asked.namespace, asked.verify) == ("prefix", True, "n", True)
    assert (asked.settle, asked.reason, asked.strategy) == (2.0, "price", "direct")
    told = json.loads(out)
    assert (code, told["kind"], told["soft"], told["namespace"], told["verified"]) == (0, "prefix", True, "n", True)
    assert (told["dry_run"], told["matched"], told["layers"], told["job"]) == (False, None, [], None)


def test_a_dry_run_says_what_would_go(whole_fake: FakeDaemon) -> None:
    """And nothing goes."""
    at = ["--url", whole_fake.url]
    code, out, _ = call("bust", "a", "--kind", "prefix", "--dry-run", *at)
    assert (code, len(whole_fake.entries)) == (0, 3)
    assert re.fullmatch(r"dry run a by http://\S+ in \d+\.\d{3} s, would remove 2\n", out)
    assert "would mark 2" in call("bust", "a", "--kind", "prefix", "--dry-run", "--soft", *at)[1]
    assert call("bust", "a", "b", "--dry-run", *at)[2].startswith("2 of 2 told in ")


def test_everything_is_busted_without_a_target_but_not_by_accident(whole_fake: FakeDaemon) -> None:
    """It takes --confirm."""
    at = ["--url", whole_fake.url]
    for arguments, told in (
        (["--kind", "all"], "takes --confirm; nothing was sent"),
        (["*", "--kind", "all", "--dry-run"], "takes --confirm; nothing was sent"),
        (["a", "--kind", "all", "--confirm"], 'takes no TARGET but "*"'),
        (["--confirm"], "Missing argument 'TARGET...'"),
    ):
        code, _, err = call("bust", *arguments, *at)
        assert code == 2
        assert told in err
    assert len(whole_fake.entries) == 3
    code, out, _ = call("bust", "--kind", "all", "--confirm", *at)
    assert code == 0
    assert out.startswith("busted * by ")
    assert "3 removed" in out
    assert whole_fake.entries == {}
    assert call("bust", "*", "--kind", "all", "--confirm", *at)[0] == 0


def test_what_was_marked_stale_is_said_so(whole_fake: FakeDaemon) -> None:
    """It is not removed."""
    assert "2 marked stale" in call("bust", "a", "--kind", "prefix", "--soft", "--url", whole_fake.url)[1]


def test_what_the_daemon_cannot_do_is_refused_or_done_wider(fake: FakeDaemon) -> None:
    """With 1, and what is lacking; or as the next wider, which is said."""
    code, _, err = call("bust", "a", "--soft", "--url", fake.url)
    assert code == 1
    assert "it does not advertise cache.bust.soft: a soft bust of a key needs that. Name another daemon, or " in err
    assert "pybustcall daemon --check names those that cannot. With --allow-wider the next wider bust " in err
    code, out, _ = call("bust", "a", "--soft", "--allow-wider", "--url", fake.url)
    assert code == 0
    assert "cannot do a soft bust of a key, and was sent a bust of a key" in out
    for options in (["--namespace", "n"], ["--kind", "tag", "--allow-wider"], ["--kind", "tag", "--dry-run"]):
        code, _, err = call("bust", "a", *options, "--url", fake.url)
        assert (code, err.endswith("names those that cannot.\n")) == (1, True)


def test_an_accepted_bust_is_told_with_its_job(whole_fake: FakeDaemon) -> None:
    """Within the tolerance it exits with 0; below, with 1, since trying again does not help."""
    at = ["--url", whole_fake.url]
    ill = LayerReply(name="cdn", ok=False, error="it is down")
    whole_fake.plan.extend([Answer.accepted("j1"), Answer.accepted("j2", layers=[ill]), Answer.accepted("j3")])
    code, _, err = call("bust", "a", *at)
    assert code == 0
    assert err == f"accepted 'a' (stage 8, applied: maybe): {whole_fake.url} goes on with it as the job j1\n"
    code, out, _ = call("bust", "a", "--json", *at)
    told = json.loads(out)
    assert (code, told["status"], told["job"], told["tolerated"], told["ok"]) == (0, "partial", "j2", True, False)
    assert told["layers"] == [
        {
            "daemon": whole_fake.url,
            "name": "cdn",
            "ok": False,
            "removed": 0,
            "error": "it is down",
            "settle": None,
            "waits": False,
        }
    ]
    assert call("bust", "a", "--fault-tolerance", "3", *at)[0] == 1
    whole_fake.plan.append(Answer.accepted())
    assert "1 of 2 busted, 1 kept for later" in call("bust", "a", "b", *at)[2]


def test_the_page_lists_every_option_of_the_daemon() -> None:
    """Each in the first column of the table, and none that there is not."""
    page = (ROOT / "docs/reference/command-line.md").read_text(encoding="utf-8")
    section = page.partition("\n## The daemon's options\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]*) \|", section, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(--[a-z-]+)", row)}
    assert told == {name for param in cli.commands["daemon"].params for name in param.opts}


def test_jobs_are_listed_shown_and_cancelled(whole_fake: FakeDaemon) -> None:
    """In lines and as JSON."""
    at = ["--url", whole_fake.url]
    assert call("jobs", "list", *at)[:2] == (0, "no jobs\n")
    ill = LayerReply(name="cdn", ok=False, error="it is down")
    well = LayerReply(name="redis", ok=True, removed=2)
    again = LayerReply(name="pages", ok=True, waits=True)
    whole_fake.plan.extend([Answer.accepted("j1", layers=[well, ill, again]), Answer.accepted("j2")])
    call("bust", "sale", "--kind", "tag", "--soft", "--reason", "price", *at)
    call("bust", "b", *at)
    code, out, _ = call("jobs", "list", *at)
    assert code == 0
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "j2 running key 'b' (default)",
        "j1 waiting soft tag 'sale' (default)",
    ]
    newest, reasoned = out.splitlines()
    assert re.search(r", 0 removed, asked for by anonymous at 20\d\d-\d\d-\d\dT\d\d:\d\d:[\d.]+Z$", newest)
    assert re.search(r", asked for by anonymous at 20\S+Z, reason: price$", reasoned)
    listed = [json.loads(line) for line in call("jobs", "list", "--state", "waiting", "--json", *at)[1].splitlines()]
    assert [(job["job"], job["kind"], job["daemon"]) for job in listed] == [("j1", "tag", whole_fake.url)]
    assert call("jobs", "list", "--limit", "1", "--before", "j2", *at)[1].startswith("j1 ")
    code, out, _ = call("jobs", "show", "j1", *at, "--daemon", whole_fake.url)
    assert (code, out.splitlines()[2:]) == (
        0,
        [
            "layer redis: applied, 2 removed",
            "layer cdn: not applied: it is down, 0 removed",
            "layer pages: applied, and again once the layers inside of it are, 0 removed",
        ],
    )
    assert "reason: price, at 20" in out
    assert out.count(", at 20") == 1
    code, out, _ = call("jobs", "cancel", "j1", "--json", *at)
    told = json.loads(out)
    assert (code, told["ok"], told["state"], told["ended"][:2]) == (0, True, "cancelled", "20")
    assert call("jobs", "cancel", "j1", *at)[0] == 1  # by now it was over before
    whole_fake.finish("j2")
    assert call("jobs", "cancel", "j2", *at)[0] == 1
    assert ", ended 20" in call("jobs", "show", "j2", *at)[1]


def test_a_job_is_waited_for(whole_fake: FakeDaemon) -> None:
    """0 if it is done, 1 if it came to nothing, 3 if it still goes on."""
    at = ["--url", whole_fake.url]
    whole_fake.plan.extend(Answer.accepted(f"j{number}") for number in range(3))
    for key in ("a", "b", "c"):
        call("bust", key, *at)
    whole_fake.finish("j0")
    whole_fake.finish("j1", "failed")
    assert call("jobs", "wait", "j0", *at)[0] == 0
    assert call("jobs", "wait", "j1", *at)[0] == 1
    code, _, err = call("jobs", "wait", "j2", "--for", "0.1", *at)
    assert code == 3
    assert "was not over within 0.1 s: it is running" in err
    assert "allow more time with --for" in err


def test_a_job_that_is_not_there_or_cannot_be(whole_fake: FakeDaemon) -> None:
    """1 from the daemon, 2 before anything is sent."""
    code, _, err = call("jobs", "show", "j1", "--url", whole_fake.url)
    assert code == 1
    assert "there is no such job" in err
    assert "name another daemon with --url: " in err
    assert call("jobs", "show", "a/b", "--url", whole_fake.url)[0] == 2
    assert call("jobs", "list", "--daemon", "http://127.0.0.1:2", "--url", whole_fake.url)[0] == 2


def test_an_entry_is_registered_with_tags(whole_fake: FakeDaemon) -> None:
    """In its namespace."""
    options = ["--tag", "sale", "--tag", "new", "--ttl", "60", "--namespace", "n", "--json"]
    told = json.loads(call("register", "page", *options, "--url", whole_fake.url)[1])
    assert (told["tags"], told["ttl"], told["namespace"]) == (["sale", "new"], 60.0, "n")
    assert whole_fake.space("n").tags == {"page": ("sale", "new")}
