"""BustcallClient: what a call promises, what it raises, and what it never does."""

from __future__ import annotations

import asyncio
import copy
import gc
import html
import itertools
import json
import logging
import pickle
import ssl
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import anyio
import pytest
import trustme

import pybustcall
from pybustcall import (
    TLS,
    Band,
    BustcallClient,
    BustFailed,
    BustRejected,
    BustResult,
    ConfigurationError,
    DaemonsUnavailable,
    DeadlineExceeded,
    Event,
    FaultKind,
    IncompatibleDaemon,
    InvalidRequest,
    NotAllowed,
    OutboxError,
    Panic,
    Pool,
    ProtocolViolation,
    Retry,
)
from pybustcall.models import LayerReply, cache_key_of
from pybustcall.results import ReportBuilder
from pybustcall.testing import Answer, FakeDaemon
from tests.conftest import PATIENCE, eventually, read_request

DOWN = "http://127.0.0.1:1"
QUICK = Retry(base=0.001, cap=0.001, throttled_base=0.001, throttled_cap=0.001)


@pytest.mark.requirement("IMP-01")
async def test_a_bust_is_acknowledged() -> None:
    """The result says by whom, with which key, how clean, how long."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        result = await client.bust("cdn/main.css", strategy="direct")
    assert result.ok
    assert (result.status, result.stage, result.band) == ("busted", 12, Band.SILENT)
    assert (result.daemon, result.delegate, result.applied) == (fake.url, "fake-daemon", "yes")
    assert result.cache_key == cache_key_of("cdn/main.css")
    assert result.reported_stage == 6
    assert result.elapsed > 0
    assert [attempt.daemon for attempt in result.attempts] == [fake.url]
    assert fake.requests[0].strategy == "direct"


@pytest.mark.requirement("IMP-01")
async def test_the_tolerance_is_sent_as_the_protocol_says() -> None:
    """The call's own, or the client's."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, fault_tolerance=3) as client:
        await client.bust("a")
        await client.bust("a", fault_tolerance=9)
    assert [request.fault_tolerance for request in fake.requests] == [3, 9]


# The worked cases of docs/explanation/fault-model.md


@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize(
    ("hub", "peer"),
    [
        pytest.param([Answer(reset=True), Answer(reset=True)], None, id="refused, then ok"),
        pytest.param([Answer(hang=True)], [], id="hub times out, peer ok"),
        pytest.param([Answer(status=401)], [], id="hub refuses the token, peer ok"),
    ],
)
async def test_a_success_after_faults_has_stage_9_and_raises_below_3(
    hub: list[Answer], peer: list[Answer] | None
) -> None:
    """Acknowledged: SILENT, held at 9; whoever tolerates less than 3 is told by BustFailed, applied = yes."""
    for tolerance in (0, 2, 3, 12):
        async with FakeDaemon(hub) as first, FakeDaemon(peer or []) as second:
            peers = [second.url] if peer is not None else []
            retry = Retry(attempt_timeout=0.3, base=0.001)
            async with BustcallClient(first.url, peers=peers, retry=retry) as client:
                if tolerance >= 3:
                    result = await client.bust("a", fault_tolerance=tolerance)
                    assert (result.stage, result.status) == (9, "busted")
                    continue
                with pytest.raises(BustFailed, match="was acknowledged, but only after faults") as caught:
                    await client.bust("a", fault_tolerance=tolerance)
            assert type(caught.value) is BustFailed
            assert (caught.value.applied, caught.value.stage) == ("yes", 9)
            assert caught.value.result is not None
            assert caught.value.result.ok


@pytest.mark.requirement("RES-10")
async def test_a_daemon_that_stays_overloaded_fails_at_stage_5() -> None:
    """503 three times, alone, no outbox: 5 failed, raises for t < 7."""
    for tolerance in (6, 7):
        async with FakeDaemon([Answer(status=503)] * 3) as fake, BustcallClient(fake.url, retry=QUICK) as client:
            if tolerance == 7:
                result = await client.bust("a", fault_tolerance=7)
                assert (result.ok, result.stage, result.status) == (False, 5, "failed")
                continue
            with pytest.raises(DaemonsUnavailable, match=r"HTTP 503.*\(3 times\)") as caught:
                await client.bust("a", fault_tolerance=6)
            assert (caught.value.stage, caught.value.band) == (5, Band.EXCEPTION)
            assert len(fake.requests) == 3


@pytest.mark.requirement("RES-10")
async def test_a_refused_request_fails_at_stage_4_everywhere() -> None:
    """422 from the hub: 4 failed, no peer is asked, raises for t < 8."""
    async with FakeDaemon([Answer(status=422)] * 2) as hub, FakeDaemon() as peer:
        async with BustcallClient(hub.url, peers=[peer.url]) as client:
            with pytest.raises(BustRejected, match=r"it was not applied.*Mend the request") as caught:
                await client.bust("a", fault_tolerance=7)
            assert (caught.value.stage, caught.value.applied, caught.value.target) == (4, "no", "a")
            assert (await client.bust("a", fault_tolerance=8)).stage == 4
        assert peer.requests == []


@pytest.mark.requirement("RES-10")
async def test_a_certificate_of_another_host_is_panic(authority: trustme.CA, ca_file: Path) -> None:
    """1 failed, nothing else is tried, never plaintext instead; raises for t < 11."""
    other = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("somebody-else.example").configure_cert(other)
    async with FakeDaemon(tls=other) as hub, FakeDaemon() as peer:
        async with BustcallClient(hub.url, peers=[peer.url], tls=TLS(ca=ca_file)) as client:
            with pytest.raises(Panic, match="Nothing more was tried") as caught:
                await client.bust("a", fault_tolerance=10)
            assert (caught.value.stage, caught.value.band, caught.value.applied) == (1, Band.PANIC, "no")
            assert hub.requests == peer.requests == []
            # From then on the hub is in quarantine, and the peer serves.
            assert client.topology().daemons[0].breaker == "quarantined"
            assert (await client.bust("a")).daemon == peer.url
        assert hub.requests == []


@pytest.mark.requirement("RES-10")
async def test_cancellation_always_arrives() -> None:
    """Whatever the tolerance, and it leaves no slot taken."""
    async with FakeDaemon([Answer(hang=True)]) as fake, BustcallClient(fake.url, fault_tolerance=12) as client:
        call = asyncio.create_task(client.bust("a"))
        await eventually(lambda: fake.requests)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert client.statistics().pool.in_use == 0
        assert client.statistics().pool.calls == 0


@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize(
    ("plan", "error", "stage"),
    [
        ([Answer(status=400)], BustRejected, 4),
        ([Answer(status=403)], NotAllowed, 3),
        ([Answer(status=401)], NotAllowed, 3),
        ([Answer(status=404)], ProtocolViolation, 3),
        ([Answer(status=426)], IncompatibleDaemon, 3),
        ([Answer(status=500)] * 2, DaemonsUnavailable, 5),
        ([Answer(status=429)] * 3, DaemonsUnavailable, 5),
        ([Answer(reset=True)] * 3, DaemonsUnavailable, 5),
        ([Answer(body=b"<html>")], ProtocolViolation, 5),
        ([Answer(cut=3)] * 3, DaemonsUnavailable, 5),
    ],
)
async def test_one_kind_of_cause_gives_its_class(plan: list[Answer], error: type[BustFailed], stage: int) -> None:
    """Cut by what the caller does next."""
    async with FakeDaemon(plan) as fake, BustcallClient(fake.url, retry=QUICK) as client:
        with pytest.raises(error) as caught:
            await client.bust("a")
    assert type(caught.value) is error
    assert caught.value.stage == stage
    assert caught.value.causes
    assert fake.plan == type(fake.plan)()


async def test_mixed_causes_are_daemons_unavailable() -> None:
    """The text tells of each daemon, the data too."""
    async with FakeDaemon([Answer(status=404)]) as fake:
        async with BustcallClient(DOWN, peers=[fake.url], retry=None) as client:
            with pytest.raises(DaemonsUnavailable) as caught:
                await client.bust("a")
    assert [cause.kind for cause in caught.value.causes] == [FaultKind.UNREACHABLE, FaultKind.NOT_THIS_SERVICE]
    assert DOWN in str(caught.value)
    assert fake.url in str(caught.value)


async def test_the_deadline_has_its_own_error_which_is_a_timeout() -> None:
    """TimeoutError for whoever catches that; the bust may have been applied."""
    async with FakeDaemon([Answer(hang=True)]) as fake, BustcallClient(fake.url) as client:
        with pytest.raises(TimeoutError, match=r"within its deadline.*may have been applied") as caught:
            await client.bust("a", timeout=0.05)
    assert isinstance(caught.value, DeadlineExceeded)
    assert caught.value.applied == "maybe"
    assert caught.value.result is not None
    assert caught.value.result.elapsed < PATIENCE


async def test_the_foreign_error_is_the_cause() -> None:
    """A developer finds aiohttp's own exception below ours."""
    async with BustcallClient(DOWN, retry=None) as client:
        with pytest.raises(DaemonsUnavailable) as caught:
            await client.bust("a")
    assert caught.value.__cause__ is not None
    assert isinstance(caught.value.__cause__.__cause__, aiohttp.ClientConnectorError)


@pytest.mark.requirement("IMP-01")
async def test_a_dead_hub_is_served_by_a_peer() -> None:
    """Star, then ring, in the order that this client has."""
    async with FakeDaemon() as one, FakeDaemon() as two:
        async with BustcallClient(DOWN, peers=[one.url, two.url]) as client:
            first, second = [one, two] if client.topology().order[1] == one.url else [two, one]
            result = await client.bust("a")
    assert result.daemon == first.url
    assert second.requests == []
    assert result.stage == 9


async def test_a_panic_is_not_hidden_by_faults_before_it(server_tls: ssl.SSLContext) -> None:
    """Hub down, then a peer whose authority nobody knows: halted, and told so, not "unavailable"."""
    async with FakeDaemon(tls=server_tls) as peer, BustcallClient(DOWN, peers=[peer.url], retry=None) as client:
        with pytest.raises(Panic) as caught:
            await client.bust("a")
    assert [cause.kind for cause in caught.value.causes] == [FaultKind.UNREACHABLE, FaultKind.CERTIFICATE]
    assert caught.value.stage == 1


async def test_an_answer_for_another_target_is_not_believed() -> None:
    """The peer is asked instead."""
    wrong = json.dumps({"status": "success", "cache_key": cache_key_of("b")}).encode()
    async with FakeDaemon([Answer(body=wrong)]) as hub, FakeDaemon() as peer:
        async with BustcallClient(hub.url, peers=[peer.url]) as client:
            result = await client.bust("a")
    assert result.daemon == peer.url
    assert result.causes[0].kind is FaultKind.MALFORMED


# Arguments


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"target": ""}, "target"),
        ({"target": 7}, "target"),
        ({"target": "a", "strategy": ""}, "strategy"),
        ({"target": "a", "fault_tolerance": 13}, "fault_tolerance"),
        ({"target": "a", "fault_tolerance": True}, "fault_tolerance"),
        ({"target": "a", "timeout": 0}, "timeout"),
        ({"target": "a", "timeout": "5"}, "timeout"),
        ({"target": "a", "timeout": float("nan")}, "timeout"),
    ],
)
async def test_bad_arguments_raise_before_anything_is_sent(call: dict[str, object], field: str) -> None:
    """Whatever the tolerance."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, fault_tolerance=12) as client:
        with pytest.raises(InvalidRequest, match="nothing was sent") as caught:
            await client.bust(**call)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)
    assert fake.connections == 0


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"url": "nonsense"}, "url"),
        ({"peers": [DOWN, DOWN]}, "peers"),
        ({"peers": ["http://127.0.0.1:8989/"]}, "peers"),
        ({"token": "with space"}, "token"),
        ({"token": ""}, "token"),
        ({"token": 7}, "token"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": None}, "timeout"),
        ({"fault_tolerance": 13}, "fault_tolerance"),
        ({"fault_tolerance": True}, "fault_tolerance"),
        ({"retry": 3}, "retry"),
        ({"pool": None}, "pool"),
        ({"tls": "ca.pem"}, "tls"),
        ({"session": "mine"}, "session"),
        ({"max_reply_bytes": 10}, "max_reply_bytes"),
        ({"max_reply_bytes": True}, "max_reply_bytes"),
    ],
)
def test_bad_settings_are_told_when_the_client_is_made(settings: dict[str, object], setting: str) -> None:
    """Which one, and why."""
    with pytest.raises(ConfigurationError) as caught:
        BustcallClient(**settings)  # type: ignore[arg-type]
    assert caught.value.setting == setting


# Secrets


@pytest.mark.parametrize(
    ("url", "proxied"), [("http://10.0.0.1", False), ("http://cache.example", False), ("http://127.0.0.1:8989", True)]
)
def test_a_token_does_not_cross_a_network_in_clear_text(url: str, proxied: bool) -> None:
    """Nor a proxy; unless told so."""
    with pytest.raises(ConfigurationError, match="in clear text"):
        BustcallClient(url, token="s3cret", trust_env=proxied)
    with pytest.raises(ConfigurationError, match="in clear text"):
        BustcallClient("https://safe.example", peers=[url], token="s3cret", trust_env=proxied)
    BustcallClient(url, token="s3cret", trust_env=proxied, allow_insecure_token=True)


@pytest.mark.parametrize("url", ["https://cache.example", "unix:///run/b.sock", "http://localhost", "http://[::1]:1"])
def test_a_token_goes_where_it_is_safe(url: str) -> None:
    """TLS, a Unix socket, loopback."""
    BustcallClient(url, token="s3cret")


async def test_a_token_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Not in a repr, a log or an error, even if the daemon repeats it."""
    caplog.set_level(logging.DEBUG)
    async with FakeDaemon([Answer(status=401, body=b"bad token s3cret")]) as fake:
        async with BustcallClient(fake.url, token="s3cret", fault_tolerance=12) as client:
            result = await client.bust("a")
            shown = [repr(client), repr(result), repr(result.attempts), str(result.causes), caplog.text]
            fake.plan.append(Answer(status=401, body=b"bad token s3cret"))
            with pytest.raises(NotAllowed) as caught:
                await client.bust("a", fault_tolerance=0)
            shown += [str(caught.value), repr(caught.value), repr(caught.value.result)]
    assert fake.headers[0]["Authorization"] == "Bearer s3cret"
    assert "***" in caplog.text
    assert all("s3cret" not in text for text in shown)


async def test_targets_are_redacted_in_logs_reprs_and_errors(caplog: pytest.LogCaptureFixture) -> None:
    """The first segment and a hash; the whole target is data."""
    async with BustcallClient(DOWN, retry=None) as client:
        with pytest.raises(DaemonsUnavailable) as caught:
            await client.bust("user/4711-jane-doe")
        assert caplog.text == ""  # an error that is raised needs no line as well
        await client.bust("user/4711-jane-doe", fault_tolerance=12)
    assert caught.value.target == "user/4711-jane-doe"
    assert caught.value.result is not None
    for text in (caplog.text, str(caught.value), repr(caught.value.result)):
        assert "jane" not in text
        assert "user/…" in text


SECRET = "segment/größe & <customer> 4711/private"
TOKEN = "t0ken-of-some-length"


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=400, body=b"x" * 185 + TOKEN.encode()),
        Answer(status=400, body=SECRET.encode() + b"abc"),
        Answer(status=500, body=json.dumps({"echo": SECRET}).encode(), headers={"Content-Type": "text/plain"}),
        Answer(status=500, body=quote(SECRET).encode()),
        Answer(status=500, body=html.escape(SECRET).encode()),
        Answer(status=422, body=json.dumps({"title": "t", "status": 422, "detail": f"no: {SECRET}"}).encode()),
        Answer(status=500, body=b"z " * 2000 + SECRET.encode()),
        Answer(body=b"{}", headers={"Content-Type": f"text/{TOKEN}"}),
        Answer(raw=f"{TOKEN} {SECRET}\r\n\r\n".encode()),
        Answer(raw=f"HTTP/1.1 200 OK\r\nBad Header {TOKEN}\r\n\r\n".encode()),
        Answer(body=json.dumps({"status": "failed", "cache_key": "k", "target": SECRET}).encode()),
        Answer(body=json.dumps({SECRET: SECRET, "status": SECRET}).encode()),
    ],
)
async def test_what_a_daemon_repeats_shows_nowhere(answer: Answer, caplog: pytest.LogCaptureFixture) -> None:
    """Neither token nor target, in whatever form: not in logs, texts, reprs, nor in the printed chain of causes."""
    caplog.set_level(logging.DEBUG)
    async with FakeDaemon([answer]) as fake, BustcallClient(fake.url, token=TOKEN, retry=None) as client:
        with pytest.raises(BustFailed) as caught:
            await client.bust(SECRET)
        fake.drop_connections()
    shown = caplog.text + repr(caught.value) + repr(caught.value.result) + repr(caught.value.causes)
    link: BaseException | None = caught.value
    while link is not None:
        shown += repr(link) + str(link)
        link = link.__cause__ or link.__context__
    shown += "".join(traceback.format_exception(caught.value))
    for secret in (TOKEN, "4711", "private", "größe", TOKEN[:12]):
        assert secret not in shown


def test_a_session_that_trusts_proxies_is_no_way_round() -> None:
    """The token would go to the proxy in clear text."""

    async def make() -> None:
        async with aiohttp.ClientSession(trust_env=True) as session:
            with pytest.raises(ConfigurationError, match="in clear text"):
                BustcallClient(token=TOKEN, session=session)

    asyncio.run(make())


def test_credentials_in_a_url_that_is_none_are_not_repeated() -> None:
    """Not even with letters that no URL has."""
    with pytest.raises(ConfigurationError) as caught:
        BustcallClient("http://user:pässw0rd@host")
    assert "ssw0rd" not in str(caught.value)


def test_snapshots_and_results_can_be_pickled_and_copied() -> None:
    """For workers in other processes."""
    client = BustcallClient()
    assert pickle.loads(pickle.dumps(client.statistics())) == client.statistics()
    capabilities = pybustcall.DaemonCapabilities(DOWN)
    assert copy.deepcopy(capabilities) == capabilities


def test_a_client_that_could_not_be_made_is_dropped_in_silence() -> None:
    """A wrong argument is one error, not two."""
    with pytest.raises(TypeError):
        BustcallClient(urll="x")  # type: ignore[call-arg]
    gc.collect()


async def test_targets_can_be_revealed(caplog: pytest.LogCaptureFixture) -> None:
    """reveal_targets=True, for development."""
    async with BustcallClient(DOWN, retry=None, reveal_targets=True, fault_tolerance=12) as client:
        result = await client.bust("user/jane-doe")
        assert "jane-doe" in repr(result)
        assert "jane-doe" in caplog.text
        hidden = await client.with_options(reveal_targets=False).bust("user/jane-doe")
        assert "jane-doe" not in repr(hidden)


async def test_each_band_is_logged_at_its_level(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing for a clean success, INFO for one after faults, ERROR for a failure."""
    caplog.set_level(logging.INFO, "pybustcall")
    async with FakeDaemon([Answer(), Answer(reset=True)]) as fake:
        async with BustcallClient(fake.url, peers=[DOWN], retry=QUICK, fault_tolerance=12) as client:
            await client.bust("a")
            assert caplog.records == []
            await client.aclose()
        async with BustcallClient(fake.url, retry=QUICK, fault_tolerance=12) as client:
            await client.bust("a")
            fake.plan.append(Answer(status=422))
            await client.bust("a")
    levels = [record.levelname for record in caplog.records if record.name == "pybustcall"]
    assert levels == ["INFO", "ERROR"]


def test_errors_survive_pickling() -> None:
    """For workers in other processes."""
    error = DeadlineExceeded("late", daemon=DOWN, stage=5, applied="maybe", target="a")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DeadlineExceeded
    assert (str(again), again.daemon, again.stage, again.applied, again.target) == ("late", DOWN, 5, "maybe", "a")


# Views and switches


async def test_a_view_has_other_options_on_the_same_connections() -> None:
    """Closing a view closes nothing; the client's own options stay."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        async with client.with_options(timeout=1.0, fault_tolerance=3, retry=None) as view:
            await view.bust("a")
        await client.bust("a")
        assert [request.fault_tolerance for request in fake.requests] == [3, 6]
        assert fake.connections == 1
        assert view.daemons == client.daemons
        assert view.with_options().fault_tolerance == 3


@pytest.mark.parametrize("options", [{"timeout": 0}, {"fault_tolerance": 13}, {"retry": 5}])
def test_a_view_checks_its_options(options: dict[str, int]) -> None:
    """As the client does."""
    with pytest.raises(ConfigurationError):
        BustcallClient().with_options(**options)  # type: ignore[arg-type]


async def test_a_disabled_client_does_nothing_and_says_so() -> None:
    """For tests and switches; mistakes still raise."""
    async with BustcallClient.disabled() as client:
        result = await client.bust("a")
        assert (result.status, result.ok, result.stage, result.applied) == ("disabled", True, 12, "no")
        report = await client.bust_many(["a", "b"])
        assert (report.total, report.ok) == (2, True)
        assert (await client.status()).daemon == "disabled"
        assert (await client.capabilities()).daemon == "disabled"
        assert await client.warm_up() == {}
        assert client.statistics().pool.sessions == 0
        assert client.daemons == ()
        assert repr(client) == "BustcallClient(disabled)"
        assert (await client.with_options(timeout=1).bust("a")).status == "disabled"
        with pytest.raises(InvalidRequest):
            await client.bust("")


# Many


async def test_many_are_busted_and_counted() -> None:
    """Every target once, in flat memory, each result shown to on_progress."""
    seen: list[BustResult] = []
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        report = await client.bust_many((f"key/{number}" for number in range(300)), on_progress=seen.append)
    assert (report.total, report.busted, report.failed, report.ok) == (300, 300, 0, True)
    assert report.failures == ()
    assert report.worst_stage == 12
    assert sorted(result.target for result in seen) == sorted(f"key/{number}" for number in range(300))
    assert sorted(request.target for request in fake.requests) == sorted(result.target for result in seen)


async def test_many_may_come_from_an_asynchronous_source() -> None:
    """It is read as the busts go on, not before."""
    read = 0

    async def source() -> AsyncIterator[str]:
        nonlocal read
        for number in range(50):
            read += 1
            assert read - len(fake.requests) <= 5
            yield f"key/{number}"

    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        report = await client.bust_many(source(), concurrency=4)
    assert report.total == read == 50


async def test_one_bad_target_among_many_is_a_failed_result() -> None:
    """It never raises for a single target, and the others are busted."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, fault_tolerance=0) as client:
        report = await client.bust_many(["a", "", "b", 7])  # type: ignore[list-item]
    assert (report.total, report.busted, report.failed, report.worst_stage) == (4, 2, 2, 4)
    assert sorted(failed.target for failed in report.failures) == ["", "<int>"]
    assert "target is empty; nothing was sent" in report.failures[0].causes[0].message
    assert repr(report).startswith("BustReport(2 of 4 busted, 2 failed")


async def test_failed_busts_among_many_are_kept() -> None:
    """Those that are not ok, with their causes."""
    async with FakeDaemon([Answer(status=422)]) as fake, BustcallClient(fake.url) as client:
        report = await client.bust_many(["a", "b"], concurrency=1)
    assert [failed.target for failed in report.failures] == ["a"]
    assert report.failures[0].causes[0].kind is FaultKind.REJECTED


def test_the_failures_kept_are_bounded() -> None:
    """Of 1,500 failures a thousand are kept, and the rest counted."""
    builder = ReportBuilder()
    for number in range(1500):
        builder.add(BustResult(str(number), "failed", 5))
    report = builder.finish(1.0)
    assert (report.failed, len(report.failures), report.unkept) == (1500, 1000, 500)


async def cancelled_inside() -> AsyncIterator[str]:
    """Yield two targets, then await a task that was cancelled."""
    yield "a"
    yield "b"
    task = asyncio.create_task(asyncio.sleep(PATIENCE))
    task.cancel()
    await task
    yield "never"


async def test_a_cancellation_out_of_the_callers_iterable_is_not_taken_for_the_end() -> None:
    """The targets that are left would be lost in silence: it comes out as it is."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        with pytest.raises(asyncio.CancelledError):
            await client.bust_many(cancelled_inside(), concurrency=1)
        assert client.statistics().pool.calls == 0


async def test_a_cancellation_out_of_the_callback_stops_the_work() -> None:
    """And is not taken for the end of one worker."""

    def complain(result: BustResult) -> None:
        raise asyncio.CancelledError

    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        with pytest.raises(asyncio.CancelledError):
            await client.bust_many([f"{number}" for number in range(100)], on_progress=complain, concurrency=2)
        assert len(fake.requests) <= 4


@pytest.mark.parametrize("target", ["fine", "bad\x00"])
async def test_an_endless_iterable_can_be_stopped_though_nothing_is_sent(target: str) -> None:
    """A disabled client, or targets that are all invalid: the loop still runs, and a timeout arrives."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await BustcallClient.disabled().bust_many(itertools.repeat(target))


async def test_no_more_workers_start_than_there_are_targets() -> None:
    """A million at once, for one target, costs nothing."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        report = await client.bust_many(["a"], concurrency=10**12)
    assert report.busted == 1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"targets": "abc"}, "targets"),
        ({"targets": b"abc"}, "targets"),
        ({"targets": 7}, "targets"),
        ({"targets": ["a"], "concurrency": 0}, "concurrency"),
        ({"targets": ["a"], "concurrency": True}, "concurrency"),
        ({"targets": ["a"], "strategy": ""}, "strategy"),
        ({"targets": ["a"], "fault_tolerance": 13}, "fault_tolerance"),
        ({"targets": ["a"], "timeout": -1}, "timeout"),
    ],
)
async def test_bad_arguments_for_many_raise(arguments: dict[str, object], field: str) -> None:
    """One string is not many; nothing is sent."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.bust_many(**arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert fake.requests == []


async def test_what_the_callers_own_code_raises_comes_out_as_it_is() -> None:
    """An iterable or a callback that fails ends the call; nothing keeps running."""

    def broken() -> Iterator[str]:
        yield "a"
        raise ZeroDivisionError

    def complain(result: BustResult) -> None:
        raise LookupError

    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        with pytest.raises(ZeroDivisionError):
            await client.bust_many(broken())
        with pytest.raises(LookupError):
            await client.bust_many(["a", "b", "c"], on_progress=complain)
        assert client.statistics().pool.calls == 0
        assert client.statistics().pool.in_use == 0


async def test_cancelling_many_leaves_nothing_behind() -> None:
    """Under an anyio scope, as FastAPI has them."""
    async with FakeDaemon([Answer(hang=True)] * 8) as fake, BustcallClient(fake.url) as client:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(client.bust_many, [f"{number}" for number in range(100)])
                await eventually(lambda: len(fake.requests) >= 8)
                scope.cancel()
        statistics = client.statistics().pool
        assert (statistics.calls, statistics.in_use, statistics.waiting) == (0, 0, 0)


async def test_more_busts_than_slots_wait_their_turn() -> None:
    """With two slots a hundred busts at once are all served."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, pool=Pool(per_daemon=2, wait=PATIENCE)) as client:
        await asyncio.gather(*(client.bust(f"{number}") for number in range(100)))
        assert fake.connections <= 2


async def test_a_burst_is_served_in_the_order_in_which_it_came() -> None:
    """Calls that lose a wait keep their turn: with one slot and 40 busts of 20 ms none fails, none is overtaken far."""
    ended: list[int] = []

    async def one(client: BustcallClient, number: int) -> None:
        await client.bust(f"{number}")
        ended.append(number)

    async with FakeDaemon([Answer(delay=0.02)] * 40) as fake:
        async with BustcallClient(fake.url, pool=Pool(per_daemon=1, wait=0.05), timeout=PATIENCE) as client:
            await asyncio.gather(*(one(client, number) for number in range(40)))
            assert client.statistics().pool.timed_out > 0
    assert max(abs(place - number) for place, number in enumerate(ended)) <= 3
    assert len(fake.requests) == 40


async def test_the_daemons_time_begins_with_the_slot() -> None:
    """A bust that waited for its slot is not cut off in the middle of the daemon's work and sent again."""
    retry = Retry(attempt_timeout=0.4)
    async with FakeDaemon([Answer(delay=0.3)] * 4) as fake:
        async with BustcallClient(fake.url, retry=retry, pool=Pool(per_daemon=2), timeout=PATIENCE) as client:
            results = await asyncio.gather(*(client.bust(f"{number}") for number in range(4)))
    assert [result.stage for result in results] == [12] * 4
    assert len(fake.requests) == 4


async def test_no_slot_in_time_is_our_own_load_and_waited_out() -> None:
    """The wait for a slot ends, the call tries again while time is left, at the same daemon."""
    async with FakeDaemon([Answer(delay=0.1)]) as hub, FakeDaemon() as peer:
        client = BustcallClient(hub.url, peers=[peer.url], pool=Pool(per_daemon=1, wait=0.01))
        async with client:
            first = asyncio.create_task(client.bust("a"))
            await eventually(lambda: hub.requests)
            second = await client.bust("b")
            await first
    assert second.daemon == hub.url
    assert second.stage == 9
    assert {cause.kind for cause in second.causes} == {FaultKind.NO_SLOT}
    assert peer.requests == []


# Questions


async def test_the_status_comes_from_the_first_daemon_that_answers() -> None:
    """Or from the one that is named."""
    async with FakeDaemon() as peer, BustcallClient(DOWN, peers=[peer.url]) as client:
        assert (await client.status()).daemon == peer.url
        assert (await client.capabilities()).daemon == peer.url
        assert (await client.status(daemon=f"{peer.url}/")).daemon == peer.url
        with pytest.raises(DaemonsUnavailable, match="asking for the status failed") as caught:
            await client.status(daemon=DOWN)
    assert caught.value.result is None
    assert caught.value.applied == "no"


@pytest.mark.parametrize("daemon", ["http://127.0.0.1:2", "nonsense"])
async def test_a_daemon_that_is_not_the_clients_is_a_mistake(daemon: str) -> None:
    """The known ones are named."""
    async with BustcallClient(DOWN) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.status(daemon=daemon)
    assert caught.value.field == "daemon"


@pytest.mark.parametrize("connections", [0, True, "2"])
async def test_warming_up_takes_a_number(connections: object) -> None:
    """At least one connection."""
    async with BustcallClient(DOWN) as client:
        with pytest.raises(InvalidRequest):
            await client.warm_up(connections)  # type: ignore[arg-type]


def test_everything_exported_is_there() -> None:
    """__all__ is true, sorted out, and complete for what is public."""
    public = {
        name
        for name, value in vars(pybustcall).items()
        if not name.startswith("_") and not isinstance(value, type(pybustcall)) and name != "annotations"
    }
    assert public | {"__version__"} == set(pybustcall.__all__)


async def test_an_odd_header_is_told_in_printable_words() -> None:
    """Bytes that are no text in a Content-Type: a protocol violation, whose text anybody can store."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with BustcallClient(url) as client:
            result = await client.bust("a", fault_tolerance=12)
    assert result.causes[0].kind is FaultKind.MALFORMED
    assert str(result.causes[0]).isprintable()


async def test_a_view_keeps_its_client_alive() -> None:
    """Also one whose client nobody else holds: hooks are told, and nothing is closed under it."""
    async with FakeDaemon() as fake:
        view = BustcallClient(fake.url, probes=None).with_options(timeout=2.0).with_options(fault_tolerance=3)
        gc.collect()
        seen: list[Event] = []
        view.on_event(seen.append)
        assert (await view.bust("a")).ok
        await eventually(lambda: seen)
        assert view._whole is not None
        await view._whole.aclose()


async def test_an_outage_is_told_in_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """The first call in full, the others as a count, at the end."""
    async with BustcallClient(DOWN, retry=None, fault_tolerance=12) as client:
        await client.bust_many([f"{number}" for number in range(50)])
    lines = [record for record in caplog.records if "bust" in record.message and "breaker" not in record.message]
    assert len(lines) == 2
    assert "49 more busts: failed" in lines[-1].message


async def test_a_client_with_an_outbox_that_cannot_be_used_is_not_entered(tmp_path: Path) -> None:
    """It is known at the start of the service, and not in the first outage."""
    with pytest.raises(OutboxError, match="missing"):
        async with BustcallClient(DOWN, outbox=tmp_path / "missing" / "outbox.db"):
            pytest.fail("entered")


async def test_a_tolerance_of_twelve_never_raises_for_an_outbox_either(tmp_path: Path) -> None:
    """The result has the note why."""
    client = BustcallClient(DOWN, outbox=tmp_path / "missing" / "outbox.db", retry=None)
    result = await client.bust("a", fault_tolerance=12)
    assert (result.status, result.stage) == ("failed", 5)
    assert "missing" in result.note
    with pytest.raises(OutboxError):
        await client.bust("a", fault_tolerance=6)
    await client.aclose()


# Kinds, soft, namespaces, dry runs: what is beyond the base


EXTENSIONS = tuple(f"cache.bust.{name}" for name in (
    "all", "dry_run", "idempotent", "jobs", "namespace", "prefix", "settle", "soft", "tag", "verify"
))  # fmt: skip


async def test_a_bust_says_all_that_it_was_asked() -> None:
    """As it is given, to a daemon that advertises it; the result tells it again."""
    async with FakeDaemon(capabilities=EXTENSIONS) as fake, BustcallClient(fake.url) as client:
        result = await client.bust(
            "shop/7", kind="prefix", soft=True, namespace="shop", verify=True, settle=2, reason="price"
        )
        (asked,) = fake.requests
        assert (asked.kind, asked.soft, asked.namespace, asked.verify) == ("prefix", True, "shop", True)
        assert (asked.settle, asked.reason, asked.dry_run) == (2.0, "price", False)
        assert (result.status, result.kind, result.soft, result.namespace) == ("busted", "prefix", True, "shop")
        assert (result.verified, result.note) == (True, "")
        await client.bust("*", kind="all", confirm=True)
        assert [(bust.kind, bust.target) for bust in fake.applied] == [("prefix", "shop/7"), ("all", "*")]


async def test_a_dry_run_tells_how_many_and_removes_none() -> None:
    """It is ok, and counted beside what was busted."""
    async with (
        FakeDaemon(capabilities=(*EXTENSIONS, "cache.register")) as fake,
        BustcallClient(fake.url) as client,
    ):
        for key in ("a/1", "a/2", "b"):
            await client.register(key, tags=["sale"])
        result = await client.bust("a", kind="prefix", dry_run=True)
        assert (result.status, result.ok, result.matched, result.applied) == ("dry_run", True, 2, "no")
        report = await client.bust_many(["a", "sale"], kind="tag", dry_run=True)
        assert (report.busted, report.dry_run, report.ok, report.failures) == (0, 2, True, ())
        assert "0 of 2 busted, 2 told by a dry run, 0 failed" in repr(report)
        assert fake.applied == []
        assert (await client.bust("sale", kind="tag")).removed == 3


@pytest.mark.parametrize(
    ("field", "how"),
    [
        ("kind", {"kind": "planet"}),
        ("confirm", {"kind": "all"}),
        ("soft", {"soft": 1}),
        ("dry_run", {"dry_run": "no"}),
        ("verify", {"verify": None}),
        ("confirm", {"confirm": "yes"}),
        ("allow_wider", {"allow_wider": 1}),
        ("settle", {"settle": -1}),
        ("settle", {"settle": True}),
        ("settle", {"settle": float("nan")}),
        ("settle", {"settle": 3601}),
        ("namespace", {"namespace": ""}),
        ("namespace", {"namespace": "a/b"}),
        ("reason", {"reason": ""}),
        ("reason", {"reason": "x" * 257}),
        ("strategy", {"strategy": ""}),
    ],
)
async def test_arguments_that_cannot_be_sent_are_refused_before_anything_is(field: str, how: dict[str, Any]) -> None:
    """By `bust` and by `bust_many`, which takes no target then."""
    taken: list[str] = []

    def targets() -> Iterator[str]:
        taken.append("*")
        yield "*"

    async with FakeDaemon(capabilities=EXTENSIONS) as fake, BustcallClient(fake.url) as client:
        for call in (client.bust("*", **how), client.bust_many(targets(), **how)):
            with pytest.raises(InvalidRequest, match="nothing was sent") as caught:
                await call
            assert caught.value.field == field
        assert (fake.requests, taken) == ([], [])


async def test_everything_is_a_target_of_its_own() -> None:
    """Beside which no other makes sense; of many, one that is not it fails alone."""
    async with FakeDaemon(capabilities=EXTENSIONS) as fake, BustcallClient(fake.url) as client:
        with pytest.raises(InvalidRequest, match='wants the target "\\*"'):
            await client.bust("a", kind="all", confirm=True)
        report = await client.bust_many(["*", "a"], kind="all", confirm=True)
        assert (report.busted, report.failed) == (1, 1)
        assert [bust.kind for bust in fake.requests] == ["all"]


@pytest.mark.requirement("IMP-07")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"kind": "tag"}, "it does not advertise cache.bust.tag: a bust by tag needs that"),
        ({"kind": "prefix", "soft": True}, "cache.bust.soft: a soft bust by prefix needs that"),
        ({"namespace": "n"}, "it does not advertise cache.bust.namespace: a bust of a key in a namespace needs that"),
        ({"namespace": "n", "allow_wider": True}, "it does not advertise cache.bust.namespace"),
        ({"dry_run": True}, "it does not advertise cache.bust.dry_run: a dry run of a key needs that"),
        ({"kind": "tag", "dry_run": True, "allow_wider": True}, "it does not advertise cache.bust.dry_run"),
        ({"verify": True, "allow_wider": True}, "it does not advertise cache.bust.verify"),
        ({"settle": 1.0, "allow_wider": True}, "it does not advertise cache.bust.settle"),
        ({"kind": "tag", "allow_wider": True}, "it does not advertise cache.bust.tag"),
    ],
)
async def test_what_a_daemon_does_not_advertise_is_never_sent_to_it(
    how: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """An error that names it, and what for; nothing is stored, and the daemon is asked for the next bust."""
    async with (
        FakeDaemon() as fake,
        BustcallClient(fake.url, retry=QUICK, probes=None, outbox=tmp_path / "outbox.db") as client,
    ):
        with pytest.raises(IncompatibleDaemon) as caught:
            await client.bust("a", fault_tolerance=6, **how)
        assert told in str(caught.value)
        assert "it was not applied" in str(caught.value)
        (cause,) = caught.value.causes
        assert (cause.kind, cause.applied) == (FaultKind.UNSUPPORTED, "no")
        assert fake.requests == []
        assert (await client.outbox.counts()).pending == 0
        assert (await client.bust("a")).stage == 12
        assert client.topology().daemons[0].misfit == ""


@pytest.mark.parametrize(
    ("has", "how", "sent"),
    [
        (["cache.bust.all"], {"kind": "tag"}, ("all", "*", False)),
        (["cache.bust.all"], {"kind": "prefix", "soft": True}, ("all", "*", False)),
        (["cache.bust.tag"], {"kind": "tag", "soft": True}, ("tag", "sale", False)),
        (["cache.bust.tag", "cache.bust.soft"], {"kind": "tag", "soft": True}, ("tag", "sale", True)),
    ],
)
async def test_the_next_wider_is_done_where_that_is_allowed(
    has: list[str], how: dict[str, Any], sent: tuple[str, str, bool]
) -> None:
    """And said; where what was asked can be done, that is."""
    async with FakeDaemon(capabilities=has) as fake, BustcallClient(fake.url) as client:
        result = await client.bust("sale", allow_wider=True, **how)
        (asked,) = fake.requests
        assert (asked.kind, asked.target, asked.soft) == sent
        assert (result.status, result.kind, result.soft, result.target) == ("busted", sent[0], sent[2], "sale")
        assert result.note.startswith("wider than asked: ") is (sent != ("tag", "sale", True))
        assert (result.cache_key == cache_key_of("*")) is (sent[0] == "all")


async def test_each_daemon_is_sent_the_least_wide_that_it_can_do() -> None:
    """The hub has tags, the peer only everything."""
    async with (
        FakeDaemon(capabilities=["cache.bust.tag"]) as hub,
        FakeDaemon(capabilities=["cache.bust.all"]) as peer,
        BustcallClient(hub.url, peers=[peer.url], delivery="all") as client,
    ):
        result = await client.bust("sale", kind="tag", allow_wider=True)
        assert ([bust.kind for bust in hub.requests], [bust.kind for bust in peer.requests]) == (["tag"], ["all"])
        assert result.note == f"wider than asked: {peer.url} cannot do a bust by tag, and was sent a bust of everything"


async def test_a_daemon_that_cannot_do_it_leaves_it_to_its_peer() -> None:
    """Busted, after a fault; the next plain bust goes to the hub again."""
    async with (
        FakeDaemon() as hub,
        FakeDaemon(capabilities=EXTENSIONS) as peer,
        BustcallClient(hub.url, peers=[peer.url]) as client,
    ):
        result = await client.bust("sale", kind="tag")
        assert (result.status, result.stage, result.daemon) == ("busted", 9, peer.url)
        assert (await client.bust("a")).daemon == hub.url
        assert hub.connections


async def test_a_daemon_that_was_replaced_by_an_older_one_is_found_out() -> None:
    """Its document is still believed, but its answer does not repeat what was asked."""
    async with (
        FakeDaemon(advertises={"capabilities": ["cache.bust", "cache.bust.tag"]}) as fake,
        BustcallClient(fake.url) as client,
    ):
        with pytest.raises(ProtocolViolation, match="does not repeat kind, which was asked") as caught:
            await client.bust("sale", kind="tag")
        assert caught.value.applied == "maybe"


async def test_accepted_busts_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """They are within the tolerance, and not applied everywhere yet: a warning."""
    plan = [Answer.accepted("j1"), Answer.accepted("j2", layers=[LayerReply(name="cdn", ok=False, error="down")])]
    async with FakeDaemon(plan, capabilities=EXTENSIONS) as fake, BustcallClient(fake.url) as client:
        with caplog.at_level(logging.INFO, "pybustcall"):
            report = await client.bust_many(["a", "b", "c"], concurrency=1)
        assert (report.busted, report.accepted, report.partial, report.ok) == (1, 1, 1, False)
        assert [result.job for result in report.failures] == ["j1", "j2"]
        assert client.statistics().accepted == 2
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("accepted, stage 8 (warning)" in line and "as the job j1" in line for line in told)
    assert any("partial" in line and "its layer cdn failed: down" in line for line in told)


async def test_an_accepted_bust_below_its_tolerance_raises() -> None:
    """It asked for more than a promise."""
    async with (
        FakeDaemon([Answer.accepted("j1")], capabilities=EXTENSIONS) as fake,
        BustcallClient(fake.url) as client,
    ):
        with pytest.raises(BustFailed, match="not applied everywhere yet") as caught:
            await client.bust("a", fault_tolerance=3)
        assert type(caught.value) is BustFailed
        assert caught.value.result is not None
        assert (caught.value.result.job, caught.value.applied) == ("j1", "maybe")


async def test_a_bust_by_tag_survives_an_outage(tmp_path: Path) -> None:
    """Stored whole, and delivered as it was meant."""
    async with (
        FakeDaemon(capabilities=EXTENSIONS) as fake,
        BustcallClient(fake.url, outbox=tmp_path / "outbox.db", probes=None, retry=QUICK) as client,
    ):
        await client.bust("warm")
        await fake.stop()
        how: dict[str, Any] = {"kind": "tag", "namespace": "shop", "soft": True, "settle": 1.0, "reason": "price"}
        assert (await client.bust("sale", **how)).status == "deferred"
        assert (await client.bust("*", kind="all", confirm=True)).status == "deferred"
        await fake.start()
        client.reset()
        await eventually(lambda: len(fake.applied) == 3)
        by_tag = next(bust for bust in fake.applied if bust.kind == "tag")
        assert {name: getattr(by_tag, name) for name in how} == how


async def test_a_dry_run_in_an_outage_fails_and_is_not_stored(tmp_path: Path) -> None:
    """Whatever the tolerance."""
    async with BustcallClient(DOWN, outbox=tmp_path / "outbox.db", probes=None, retry=QUICK) as client:
        result = await client.bust("a", dry_run=True, fault_tolerance=12)
        assert (result.status, result.rows) == ("failed", ())
        with pytest.raises(DaemonsUnavailable):
            await client.bust("a", dry_run=True, write_ahead=True)
        assert (await client.outbox.counts()).pending == 0


async def test_an_entry_is_registered_with_tags_in_a_namespace() -> None:
    """Where the daemon knows such; what is not given is not said."""
    async with (
        FakeDaemon(capabilities=(*EXTENSIONS, "cache.register")) as fake,
        BustcallClient(fake.url) as client,
    ):
        await client.register("page", ["model"], tags=["sale", "new"], ttl=60, namespace="shop")
        space = fake.space("shop")
        assert (space.entries, space.tags) == ({"page": ("model",)}, {"page": ("sale", "new")})
        await client.bust("sale", kind="tag")
        assert space.entries
        await client.bust("sale", kind="tag", namespace="shop")
        assert not space.entries


@pytest.mark.parametrize(
    ("how", "lack"), [({"tags": ["sale"]}, "cache.bust.tag"), ({"namespace": "shop"}, "cache.bust.namespace")]
)
async def test_tags_are_not_told_to_a_daemon_that_would_ignore_them(how: dict[str, Any], lack: str) -> None:
    """A bust of the tag would never reach the entry."""
    async with FakeDaemon(capabilities=["cache.register"]) as fake, BustcallClient(fake.url) as client:
        with pytest.raises(IncompatibleDaemon, match=lack):
            await client.register("page", **how)
        await client.register("page", ttl=5)
        assert list(fake.entries) == ["page"]


@pytest.mark.parametrize(
    ("field", "how"),
    [
        ("tags", {"tags": "sale"}),
        ("tags[0]", {"tags": [""]}),
        ("tags", {"tags": 7}),
        ("ttl", {"ttl": 0}),
        ("ttl", {"ttl": True}),
        ("ttl", {"ttl": float("inf")}),
        ("namespace", {"namespace": "a b"}),
    ],
)
async def test_a_registration_that_cannot_be_sent_is_refused(field: str, how: dict[str, Any]) -> None:
    """The argument is named."""
    async with BustcallClient(DOWN) as client:
        with pytest.raises(InvalidRequest, match="nothing was sent") as caught:
            await client.register("page", **how)
        assert caught.value.field == field


async def test_a_disabled_client_tells_what_it_did_not_do() -> None:
    """In the words of what was asked."""
    result = await BustcallClient.disabled().bust("a", kind="tag", namespace="n", soft=True, dry_run=True)
    assert (result.status, result.kind, result.namespace, result.soft) == ("disabled", "tag", "n", True)


async def test_a_row_that_the_daemons_left_cannot_do_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    """It is listed and counted; nothing waits behind it, and no daemon is paused for it."""
    path = tmp_path / "outbox.db"
    async with (
        FakeDaemon(capabilities=EXTENSIONS) as able,
        BustcallClient(able.url, outbox=path, probes=None, retry=QUICK) as client,
    ):
        await client.bust("warm")
        await able.stop()
        assert (await client.bust("sale", kind="tag")).status == "deferred"
        assert (await client.bust("a")).status == "deferred"
    async with FakeDaemon() as plain, BustcallClient(plain.url, outbox=path, probes=None) as client:
        await client.outbox.replay()
        await eventually(lambda: [bust.target for bust in plain.applied] == ["a"])
        await eventually(lambda: client.statistics().refused == 1)
        (row,) = await client.outbox.rows()
        assert (row.state, row.bust.kind, row.bust.target) == ("aside", "tag", "sale")
        assert "it does not advertise cache.bust.tag" in row.reason
