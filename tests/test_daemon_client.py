"""One daemon over HTTP: what is sent, and what every failure of an aiohttp call is called.

Where no socket is needed aioresponses raises the foreign error; everything about timing and broken answers happens on
real sockets.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import client_exceptions
from aiohttp.client_reqrep import ConnectionKey
from aioresponses import aioresponses

from pybustcall.daemon_client import DaemonClient, _seconds
from pybustcall.errors import Applied
from pybustcall.faults import AttemptFailed, Fault, FaultKind
from pybustcall.models import BustReply, BustRequest, JobReply, bust_request, cache_key_of
from pybustcall.policies import Pool
from pybustcall.session import TLS, SessionManager
from pybustcall.testing import Answer, FakeDaemon
from pybustcall.topology import DaemonAddress
from tests.conftest import PATIENCE, read_request

REQUEST = bust_request("cdn/main.css", "direct", 6)
HUB = "http://127.0.0.1:8989"
KEY = ConnectionKey("127.0.0.1", 8989, False, True, None, None, None)

pytestmark = pytest.mark.requirement("IMP-02")


@asynccontextmanager
async def speaking_to(url: str, *, tls: TLS | None = None, limit: int = 1024 * 1024) -> AsyncIterator[DaemonClient]:
    """Make a client of one daemon, and close its connections."""
    sessions = SessionManager(pool=Pool(), tls=tls)
    yield DaemonClient(DaemonAddress.parse(url), sessions, max_reply_bytes=limit)
    await sessions.aclose()


async def bust(client: DaemonClient, *, within: float = PATIENCE) -> BustReply:
    """Make one attempt."""
    until = asyncio.get_running_loop().time() + within
    return await client.bust(REQUEST, until=until, deadline=until)


async def fault_of(work: Awaitable[object]) -> Fault:
    """Tell the fault of an attempt that fails."""
    with pytest.raises(AttemptFailed) as caught:
        await work
    return caught.value.fault


def certificate_error() -> ssl.SSLCertVerificationError:
    """Make the error of a certificate that is not trusted."""
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "unable to get local issuer certificate"
    return error


def response_error(kind: type[aiohttp.ClientResponseError], status: int = 0) -> aiohttp.ClientResponseError:
    """Make an error that aiohttp raises about an answer."""
    info = aiohttp.RequestInfo(url=None, method="POST", headers=None)  # type: ignore[arg-type]
    return kind(info, (), status=status, message="what it said")


FOREIGN: list[tuple[BaseException, FaultKind, Applied]] = [
    (aiohttp.ClientConnectorError(KEY, ConnectionRefusedError(111, "refused")), FaultKind.UNREACHABLE, "no"),
    (aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "unknown")), FaultKind.UNREACHABLE, "no"),
    (aiohttp.ClientProxyConnectionError(KEY, OSError(111, "refused")), FaultKind.UNREACHABLE, "no"),
    (
        client_exceptions.UnixClientConnectorError("/s", KEY, FileNotFoundError(2, "missing")),
        FaultKind.UNREACHABLE,
        "no",
    ),
    (aiohttp.ClientConnectorCertificateError(KEY, certificate_error()), FaultKind.CERTIFICATE, "no"),
    (aiohttp.ClientConnectorSSLError(KEY, certificate_error()), FaultKind.CERTIFICATE, "no"),
    (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLEOFError(8, "EOF occurred")), FaultKind.UNREACHABLE, "no"),
    (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(1, "WRONG_VERSION_NUMBER")), FaultKind.MALFORMED, "no"),
    (aiohttp.ClientSSLError(KEY, OSError(104, "reset")), FaultKind.UNREACHABLE, "no"),
    (aiohttp.ServerFingerprintMismatch(b"a" * 32, b"b" * 32, "h", 1), FaultKind.CERTIFICATE, "no"),
    (response_error(aiohttp.ClientHttpProxyError, 502), FaultKind.UNREACHABLE, "no"),
    (aiohttp.ConnectionTimeoutError(), FaultKind.TIMED_OUT, "no"),
    (aiohttp.SocketTimeoutError(), FaultKind.TIMED_OUT, "maybe"),
    (aiohttp.ServerTimeoutError(), FaultKind.TIMED_OUT, "maybe"),
    (TimeoutError(), FaultKind.TIMED_OUT, "maybe"),
    (aiohttp.ServerDisconnectedError(), FaultKind.DISCONNECTED, "maybe"),
    (aiohttp.ServerConnectionError(), FaultKind.DISCONNECTED, "maybe"),
    (aiohttp.ClientOSError(104, "reset"), FaultKind.DISCONNECTED, "maybe"),
    (aiohttp.ClientConnectionResetError("closing"), FaultKind.DISCONNECTED, "maybe"),
    (aiohttp.ClientConnectionError("closed"), FaultKind.DISCONNECTED, "maybe"),
    (aiohttp.ClientPayloadError("not completed"), FaultKind.DISCONNECTED, "maybe"),
    (ConnectionResetError(104, "reset"), FaultKind.DISCONNECTED, "maybe"),
    (BrokenPipeError(32, "pipe"), FaultKind.DISCONNECTED, "maybe"),
    (OSError(113, "no route"), FaultKind.DISCONNECTED, "maybe"),
    (response_error(aiohttp.ClientResponseError, 400), FaultKind.MALFORMED, "maybe"),
    (response_error(aiohttp.ContentTypeError, 200), FaultKind.MALFORMED, "maybe"),
    (response_error(aiohttp.TooManyRedirects, 302), FaultKind.MALFORMED, "maybe"),
    (response_error(aiohttp.WSServerHandshakeError, 200), FaultKind.MALFORMED, "maybe"),
    (aiohttp.InvalidURL("x"), FaultKind.MALFORMED, "no"),
    (client_exceptions.InvalidUrlClientError("x"), FaultKind.MALFORMED, "no"),
    (aiohttp.NonHttpUrlClientError("x"), FaultKind.MALFORMED, "maybe"),
    (client_exceptions.RedirectClientError(), FaultKind.MALFORMED, "maybe"),
    (client_exceptions.InvalidUrlRedirectClientError("x"), FaultKind.MALFORMED, "no"),
    (client_exceptions.NonHttpUrlRedirectClientError("x"), FaultKind.MALFORMED, "maybe"),
    (client_exceptions.UploadAbortedError(), FaultKind.MALFORMED, "maybe"),
    (aiohttp.ClientError("strange"), FaultKind.MALFORMED, "maybe"),
    (ValueError("strange"), FaultKind.MALFORMED, "maybe"),
]


@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize(
    ("error", "kind", "applied"), FOREIGN, ids=[f"{n}-{type(e).__name__}" for n, (e, _, _) in enumerate(FOREIGN)]
)
async def test_every_foreign_error_becomes_ours(error: BaseException, kind: FaultKind, applied: Applied) -> None:
    """Whatever an aiohttp call raises leaves as AttemptFailed, with the original as its cause."""
    async with aiohttp.ClientSession() as session:
        sessions = SessionManager(pool=Pool(), session=session)
        client = DaemonClient(DaemonAddress.parse(HUB), sessions)
        with aioresponses() as mocked:
            mocked.post(f"{HUB}/api/v1/bust", exception=error)
            with pytest.raises(AttemptFailed) as caught:
                await bust(client)
        fault = caught.value.fault
        assert (fault.kind, fault.applied, fault.daemon) == (kind, applied, HUB)
        if isinstance(error, aiohttp.ClientResponseError):  # it holds the request's headers, the token among them
            assert caught.value.__cause__ is caught.value.__context__ is None
        else:
            assert caught.value.__cause__ is error
        await sessions.aclose()


def test_no_error_of_aiohttps_client_is_forgotten() -> None:
    """Every exception class of aiohttp's client that there is stands in the table above."""
    known = {type(error) for error, _, _ in FOREIGN}

    def below(base: type[BaseException]) -> set[type[BaseException]]:
        found = {base}
        for child in base.__subclasses__():
            found |= below(child)
        return found

    ours = {kind for kind in below(aiohttp.ClientError) if kind.__module__ == "aiohttp.client_exceptions"}
    assert ours - known == set()


async def test_cancellation_is_not_ours_to_catch() -> None:
    """CancelledError passes through untouched."""
    async with FakeDaemon([Answer(hang=True)]) as fake, speaking_to(fake.url) as client:
        attempt = asyncio.create_task(bust(client))
        async with asyncio.timeout(PATIENCE):
            while not fake.requests:
                await asyncio.sleep(0.001)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt


async def test_a_bust_is_sent_as_the_protocol_says() -> None:
    """Body and headers: the request, who asks, and how much time is left."""
    async with FakeDaemon() as fake, speaking_to(fake.url) as client:
        reply = await bust(client, within=5.0)
    assert reply.delegate == "fake-daemon"
    assert fake.requests == [REQUEST]
    headers = fake.headers[0]
    assert headers["Content-Type"] == "application/json"
    assert headers["Bustcall-Binding"] == "pybustcall"
    assert headers["Bustcall-Version"] == "0.experimental.1.experimental.0.experimental"
    assert 4000 < int(headers["Bustcall-Timeout-Ms"]) <= 5000
    assert "Authorization" not in headers


GOOD = b'{"status": "success", "cache_key": "md5:1"}'


@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (Answer(status=201, body=GOOD), FaultKind.MALFORMED, "HTTP 201, which the protocol does not know"),
        (Answer(status=202, body=GOOD), FaultKind.MALFORMED, "HTTP 202"),
        (Answer(status=204, body=b""), FaultKind.MALFORMED, "HTTP 204"),
        (Answer(status=307, headers={"Location": "/x"}), FaultKind.MALFORMED, "a redirect .HTTP 307., which is never"),
        (Answer(status=400, body=b"Request body deserialize error: x"), FaultKind.REJECTED, "deserialize error: x"),
        (Answer(status=401), FaultKind.TOKEN_REFUSED, "wants a token, and this client has none"),
        (Answer(status=403), FaultKind.NOT_ALLOWED, "does not allow this"),
        (Answer(status=404, body=b""), FaultKind.NOT_THIS_SERVICE, r"not a bustcall daemon's route \(HTTP 404\)$"),
        (Answer(status=405, body=b"HTTP method not allowed"), FaultKind.NOT_THIS_SERVICE, "method not allowed"),
        (Answer(status=422, body=b'{"title":"t","status":422,"detail":"bad key"}'), FaultKind.REJECTED, ": bad key$"),
        (Answer(status=426), FaultKind.INCOMPATIBLE, "HTTP 426"),
        (Answer(status=500, body=b"<h1>\x00oops</h1>"), FaultKind.SERVER_ERROR, "HTTP 500: <h1> oops</h1>"),
        (Answer(status=501), FaultKind.NOT_THIS_SERVICE, "not a bustcall daemon's route"),
        (Answer(status=503), FaultKind.THROTTLED, "HTTP 503"),
        (Answer(status=500, body=b"<h1>no</h1>", headers={"Content-Type": "text/html"}),
         FaultKind.SERVER_ERROR, "HTTP 500: an HTML page$"),
        (Answer(body=b"<html>", headers={"Content-Type": "text/html"}), FaultKind.MALFORMED, "text/html, not JSON"),
        (Answer(body=b"{"), FaultKind.MALFORMED, "Invalid JSON"),
        (Answer(body=b"[]"), FaultKind.MALFORMED, "not what the protocol says"),
        (Answer(body=b'{"status": "success"}'), FaultKind.MALFORMED, "cache_key: Field required"),
        (Answer(body=GOOD.replace(b"}", b', "fault_stage": -1}')), FaultKind.MALFORMED, "fault_stage: .*equal to 0"),
        (Answer(body=b'{"status": "success", "cache_key": "sha256:00"}'), FaultKind.MALFORMED, "another target"),
        (Answer(body=b'{"success": false, "cache_key": "md5:1"}'), FaultKind.MALFORMED, "must say status"),
        (Answer(body=b"x" * 10_000_000), FaultKind.MALFORMED, "larger than 1048576 bytes"),
        (Answer(cut=10), FaultKind.DISCONNECTED, "in the middle of its answer"),
        (Answer(reset=True), FaultKind.DISCONNECTED, "without an answer|connection broke"),
        (Answer(raw=b"SSH-2.0-OpenSSH\r\n\r\n"), FaultKind.MALFORMED, "not HTTP"),
    ],
)  # fmt: skip
async def test_every_strange_answer_has_a_name(answer: Answer, kind: FaultKind, says: str) -> None:
    """Over a real socket: what the daemon answers, the kind of fault, and a sentence that tells it."""
    async with FakeDaemon([answer]) as fake, speaking_to(fake.url) as client:
        fault = await fault_of(bust(client))
        fake.drop_connections()
    assert fault.kind is kind
    with pytest.raises(ValueError, match=says):
        raise ValueError(fault.message)


async def test_a_reply_of_the_other_dialect_is_read() -> None:
    """success: true, and a cache key of another kind."""
    async with FakeDaemon([Answer(body=b'{"success": true, "cache_key": "md5:1"}')]) as fake:
        async with speaking_to(fake.url) as client:
            assert (await bust(client)).success


async def test_what_a_daemon_says_of_an_error_is_bounded_and_clean() -> None:
    """A page of 3 KB is quoted by its beginning, on one line."""
    page = b"<p>\n" + b"long " * 800
    async with FakeDaemon([Answer(status=500, body=page)]) as fake, speaking_to(fake.url) as client:
        fault = await fault_of(bust(client))
    assert len(fault.message) <= 301
    assert "\n" not in fault.message
    assert fault.message.endswith("…")


async def test_an_endless_error_page_is_cut_off() -> None:
    """Of ten megabytes of error page four kilobytes are read."""
    async with FakeDaemon([Answer(status=502, body=b"e" * 10_000_000)]) as fake, speaking_to(fake.url) as client:
        assert (await fault_of(bust(client))).status == 502
        fake.drop_connections()


async def test_a_target_that_a_daemon_repeats_is_not_passed_on() -> None:
    """Errors hand the target over as data, never in their text."""
    said = b"no such thing: cdn/main.css"
    async with FakeDaemon([Answer(status=500, body=said)]) as fake, speaking_to(fake.url) as client:
        assert "main.css" not in (await fault_of(bust(client))).message


async def test_a_larger_limit_reads_a_larger_reply() -> None:
    """The size limit is settable."""
    body = GOOD + b" " * 2_000_000
    async with FakeDaemon([Answer(body=body)]) as fake, speaking_to(fake.url, limit=4_000_000) as client:
        assert (await bust(client)).cache_key == "md5:1"


async def test_an_answer_that_comes_too_late_is_a_timeout() -> None:
    """The attempt ends at its time, and may have been applied."""
    async with FakeDaemon([Answer(hang=True)]) as fake, speaking_to(fake.url) as client:
        fault = await fault_of(bust(client, within=0.05))
    assert (fault.kind, fault.applied, fault.message) == (FaultKind.TIMED_OUT, "maybe", "no answer came in time")


async def test_nobody_listening_is_told_as_such() -> None:
    """Refused: not applied."""
    async with speaking_to("http://127.0.0.1:1") as client:
        fault = await fault_of(bust(client))
    assert (fault.kind, fault.applied) == (FaultKind.UNREACHABLE, "no")
    assert fault.message == "no connection could be made (Connection refused)"


async def test_a_missing_socket_file_is_told_as_such(tmp_path: Path) -> None:
    """Nothing listens there."""
    async with speaking_to(f"unix://{tmp_path}/none.sock") as client:
        fault = await fault_of(bust(client))
    assert (fault.kind, fault.applied) == (FaultKind.UNREACHABLE, "no")


async def test_a_name_that_nobody_knows_is_told_as_such() -> None:
    """DNS says no."""
    async with speaking_to("http://nowhere.invalid") as client:
        fault = await fault_of(bust(client))
    assert (fault.kind, fault.applied) == (FaultKind.UNREACHABLE, "no")
    assert "cannot be resolved" in fault.message


async def test_an_untrusted_certificate_is_never_spoken_to(server_tls: ssl.SSLContext) -> None:
    """The system's authorities do not know ours."""
    async with FakeDaemon(tls=server_tls) as fake, speaking_to(fake.url) as client:
        fault = await fault_of(bust(client))
        assert (fault.kind, fault.stage, fault.applied) == (FaultKind.CERTIFICATE, 1, "no")
        assert fake.requests == []


async def test_plain_http_on_a_tls_port_is_no_tls() -> None:
    """A wrong scheme is told, and not tried again."""
    async with FakeDaemon() as fake, speaking_to(fake.url.replace("http:", "https:")) as client:
        fault = await fault_of(bust(client))
    assert fault.kind is FaultKind.MALFORMED
    assert "does not speak TLS as expected" in fault.message


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Serve connections with a handler of our own."""

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_connection_cut_in_the_tls_handshake_is_retriable() -> None:
    """The daemon is restarting, perhaps."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with serving(handler) as url, speaking_to(url.replace("http:", "https:")) as client:
        fault = await fault_of(bust(client))
    assert (fault.kind, fault.applied) == (FaultKind.UNREACHABLE, "no")


async def test_a_stale_connection_is_replaced_without_counting() -> None:
    """The server closes a kept connection under our request: the request goes out again on a fresh one."""
    accepted = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD))
        await writer.drain()
        await read_request(reader)

    async with serving(handler) as url, speaking_to(url) as client:
        for _ in range(3):
            assert (await bust(client)).cache_key == "md5:1"
    assert accepted == 3


async def test_an_answer_cut_on_a_used_connection_is_a_fault() -> None:
    """Once a byte of the answer came it is no stale connection any more."""
    async with FakeDaemon([Answer(), Answer(cut=5)]) as fake, speaking_to(fake.url) as client:
        await bust(client)
        fault = await fault_of(bust(client))
    assert (fault.kind, fault.applied) == (FaultKind.DISCONNECTED, "maybe")
    assert len(fake.requests) == 2


async def test_an_answer_cut_in_its_head_on_a_used_connection_is_a_fault() -> None:
    """Some bytes of the head are bytes of an answer, too: the request is not sent again uncounted."""
    head = b"HTTP/1.1 200 OK\r\nContent-"
    async with FakeDaemon([Answer(), Answer(raw=head)]) as fake, speaking_to(fake.url) as client:
        await bust(client)
        fault = await fault_of(bust(client))
    assert (fault.kind, fault.applied) == (FaultKind.DISCONNECTED, "maybe")
    assert len(fake.requests) == 2


async def test_a_session_that_raises_for_status_changes_nothing() -> None:
    """The status is read as it is."""
    async with FakeDaemon([Answer(status=503)]) as fake, aiohttp.ClientSession(raise_for_status=True) as session:
        sessions = SessionManager(pool=Pool(), session=session)
        fault = await fault_of(bust(DaemonClient(DaemonAddress.parse(fake.url), sessions)))
        await sessions.aclose()
    assert fault.kind is FaultKind.THROTTLED


async def test_a_stale_connection_and_then_a_refusal_may_have_been_applied() -> None:
    """The first send is not forgotten when the second cannot even connect."""
    served = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD))
        await writer.drain()
        await read_request(reader)
        server.close()
        served.set()

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with speaking_to(url) as client:
        await bust(client)
        fault = await fault_of(bust(client))
    assert served.is_set()
    assert (fault.kind, fault.applied) == (FaultKind.UNREACHABLE, "maybe")
    assert "before that, a used connection broke when the request was sent on it" in fault.message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        (" 120 ", 120.0),
        ("9" * 400, 999999999.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
        ("٣", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms(header: str | None, seconds: float | None) -> None:
    """Seconds or an HTTP date; anything else is no word at all."""
    assert _seconds(header) == seconds


async def test_retry_after_comes_with_the_fault() -> None:
    """The plan needs to know it."""
    async with FakeDaemon([Answer(status=429, headers={"Retry-After": "7"})]) as fake:
        async with speaking_to(fake.url) as client:
            assert (await fault_of(bust(client))).retry_after == 7.0


def soon() -> dict[str, Any]:
    """Times for an attempt that should succeed."""
    now = asyncio.get_running_loop().time()
    return {"until": now + PATIENCE, "deadline": now + PATIENCE}


async def test_the_status_of_a_daemon_is_read() -> None:
    """And says whose it is."""
    async with FakeDaemon() as fake, speaking_to(fake.url) as client:
        status = await client.status(**soon())
    assert status.daemon == fake.url
    assert status.daemon_pid > 0


async def test_capabilities_come_from_the_first_route() -> None:
    """A document, with names."""
    async with FakeDaemon() as fake, speaking_to(fake.url) as client:
        capabilities = await client.capabilities(**soon())
    assert not capabilities.base_only
    assert "cache.bust" in capabilities.names


async def test_capabilities_come_from_the_older_route_where_the_first_is_missing() -> None:
    """As the existing Rust daemon serves them: a map of bindings."""
    async with FakeDaemon(document=False) as fake, speaking_to(fake.url) as client:
        capabilities = await client.capabilities(**soon())
    assert capabilities.base_only
    assert capabilities.names == {"cache.bust"}
    assert capabilities.bindings["pybustcall"].semverx == "v0.1.0"


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bodies: dict[bytes, bytes]) -> None:
    """Answer each route with its body, any other with 404."""
    while True:
        route = (await read_request(reader)).split(b" ")[1]
        body = bodies.get(route, b"")
        status = b"200 OK" if route in bodies else b"404 Not Found"
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        writer.write(head + body)
        await writer.drain()


async def test_a_daemon_with_neither_route_is_base_only() -> None:
    """404 twice: of unknown version."""
    async with serving(lambda r, w: answering(r, w, {})) as url, speaking_to(url) as client:
        capabilities = await client.capabilities(**soon())
    assert capabilities.base_only
    assert capabilities.names == frozenset()


@pytest.mark.parametrize("body", [b"[]", b'{"rust": 7}', b"{"])
async def test_a_map_of_bindings_that_is_none_is_malformed(body: bytes) -> None:
    """The older route is checked like the first."""
    bodies = {b"/api/v1/bindings/capabilities": body}
    async with serving(lambda r, w: answering(r, w, bodies)) as url, speaking_to(url) as client:
        fault = await fault_of(client.capabilities(**soon()))
    assert fault.kind is FaultKind.MALFORMED


async def test_a_history_of_fifty_megabytes_is_not_read() -> None:
    """The existing daemon's history is unbounded; our reading is not."""
    line: Any = {"timestamp": "2026-01-02T03:04:05Z", "binding": "x", "fault_stage": 3, "message": "m" * 1000}
    status = {"daemon_pid": 1, "bindings": {}, "cache_size": "0B", "fault_history": [line] * 50_000}
    bodies = {b"/api/v1/status": json.dumps(status).encode()}
    async with serving(lambda r, w: answering(r, w, bodies)) as url, speaking_to(url) as client:
        fault = await fault_of(client.status(**soon()))
    assert "larger than 1048576 bytes" in fault.message


def test_the_client_of_a_daemon_shows_its_url_alone() -> None:
    """No token in a repr."""
    client = DaemonClient(DaemonAddress.parse(HUB), SessionManager(pool=Pool()), token="s3cret")
    assert repr(client) == f"DaemonClient({HUB})"


@pytest.mark.requirement("IMP-12")
@pytest.mark.parametrize("status", [401, 404, 405, 409, 421, 422, 426, 428])
async def test_a_refusal_of_what_was_sent_again_does_not_say_that_nothing_was_done(status: int) -> None:
    """The request that was lost on a used connection may have been done, whoever answers the repeat."""
    async with FakeDaemon([Answer(), Answer(reset=True, applies=True), Answer.problem(status)]) as fake:
        async with speaking_to(fake.url) as client:
            await bust(client)
            fault = await fault_of(bust(client))
            assert (fault.status, fault.applied) == (status, "maybe")
            fake.plan.append(Answer.problem(status))
            assert (await fault_of(bust(client))).applied == "no"


@pytest.mark.requirement("INT-12")
async def test_reasons_hide_what_must_not_be_told_and_are_read_whole() -> None:
    """Token and target, control characters; twelve thousand bytes of reasons are no too many."""
    reasons = [
        f"you sent Bearer s3cret-t0ken and {REQUEST.target}\x1b[31m",
        *(f"reason {n} " + "x" * 100 for n in range(99)),
    ]
    problem = {"title": "Conflict", "status": 409, "detail": "refused", "unmet": reasons}
    headers = {"Content-Type": "application/problem+json"}
    answer = Answer(status=409, body=json.dumps(problem).encode(), headers=headers)
    async with FakeDaemon([answer]) as fake:
        sessions = SessionManager(pool=Pool())
        client = DaemonClient(DaemonAddress.parse(fake.url), sessions, token="s3cret-t0ken")
        fault = await fault_of(bust(client))
        await sessions.aclose()
    assert len(fault.unmet) == 100
    assert "s3cret" not in repr(fault)
    assert REQUEST.target not in repr(fault)
    assert "\x1b" not in fault.unmet[0]
    assert fault.message.count("reason 0 ") == 1


@pytest.mark.parametrize("status", [404, 405, 410, 501])
async def test_a_daemon_without_the_routes_is_base_only(status: int) -> None:
    """However it says so."""
    plan = [Answer.problem(status)] * 2
    async with FakeDaemon(probe_plan=plan) as fake, speaking_to(fake.url) as client:
        until = asyncio.get_running_loop().time() + PATIENCE
        found = await client.capabilities(until=until, deadline=until)
        assert found.base_only
        assert found.supports("cache.bust")


# What is beyond the base: the echo of what was asked, 202, layers


def body_of(target: str = "cdn/main.css", **more: Any) -> bytes:
    """Make the body of an answer."""
    return json.dumps({"status": "success", "cache_key": cache_key_of(target), **more}).encode()


async def answer_to(request: BustRequest, status: int, body: bytes) -> BustReply:
    """Bust at a daemon that answers so."""
    async with FakeDaemon([Answer(status=status, body=body)]) as fake, speaking_to(fake.url) as client:
        until = asyncio.get_running_loop().time() + PATIENCE
        return await client.bust(request, until=until, deadline=until)


@pytest.mark.parametrize(
    ("asked", "echo"),
    [
        ({"kind": "tag"}, {}),
        ({"kind": "tag"}, {"kind": "prefix"}),
        ({"soft": True}, {}),
        ({"soft": True}, {"soft": False}),
        ({"namespace": "n"}, {}),
        ({"namespace": "n"}, {"namespace": "other"}),
        ({"dry_run": True}, {"matched": 3}),
        ({}, {"kind": "all"}),
        ({}, {"dry_run": True}),
    ],
)
async def test_an_answer_without_the_echo_of_what_was_asked_is_malformed(
    asked: dict[str, Any], echo: dict[str, Any]
) -> None:
    """A daemon that does not know a field ignores it: it may have busted something else."""
    request = bust_request("cdn/main.css", "direct", 6, **asked)
    fault = await fault_of(answer_to(request, 200, body_of(**echo)))
    field = next(iter(asked or echo))
    assert (fault.kind, fault.applied) == (FaultKind.MALFORMED, "maybe")
    assert f"its answer does not repeat {field}, which was asked" in fault.message


async def test_what_is_asked_by_default_needs_no_echo() -> None:
    """A daemon of the base gives none; one that gives the defaults is well understood."""
    assert (await answer_to(REQUEST, 200, body_of())).removed is None
    assert (await answer_to(REQUEST, 200, body_of(kind="key", soft=False, dry_run=False))).kind == "key"


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (202, body_of(), "says that the bust is done, with HTTP 202"),
        (202, json.dumps({"cache_key": "x", "success": True}).encode(), "says that the bust is done, with HTTP 202"),
        (200, body_of(status="accepted", job="j1"), "says that the bust is accepted, with HTTP 200"),
        (202, body_of(status="accepted"), "must name its job"),
        (202, body_of("other", status="accepted", job="j1"), "is for another target"),
        (202, b"<html>", "not what the protocol says"),
        (201, body_of(status="accepted", job="j1"), "it answered HTTP 201"),
        (204, b"", "it answered HTTP 204"),
    ],
)
async def test_202_is_believed_only_with_a_job(status: int, body: bytes, told: str) -> None:
    """And any other success than 200 never."""
    fault = await fault_of(answer_to(REQUEST, status, body))
    assert (fault.kind, fault.applied) == (FaultKind.MALFORMED, "maybe")
    assert told in fault.message


async def test_an_accepted_bust_is_read_with_its_job_and_layers() -> None:
    """As the daemon tells it."""
    layers = [{"name": "redis", "ok": True, "removed": 2}, {"name": "cdn", "ok": False, "error": "it is down"}]
    reply = await answer_to(REQUEST, 202, body_of(status="accepted", job="j1", layers=layers))
    assert (reply.accepted, reply.job) == (True, "j1")
    assert [(layer.name, layer.ok, layer.removed, layer.error) for layer in reply.layers] == [
        ("redis", True, 2, None),
        ("cdn", False, 0, "it is down"),
    ]


@pytest.mark.parametrize(
    ("asked", "status", "said", "told"),
    [
        ({"dry_run": True}, 202, {"status": "accepted", "job": "j", "dry_run": True}, "it accepted a dry run"),
        ({}, 200, {"layers": [{"name": "cdn", "ok": False}]}, "is done, and that it failed in the layer cdn"),
        ({"verify": True}, 200, {}, "does not say that it verified the bust"),
        ({"verify": True}, 200, {"verified": False}, "does not say that it verified the bust"),
    ],
)
async def test_an_answer_that_contradicts_itself_is_malformed(
    asked: dict[str, Any], status: int, said: dict[str, Any], told: str
) -> None:
    """It is not what was asked, or cannot be."""
    fault = await fault_of(answer_to(bust_request("cdn/main.css", "direct", 6, **asked), status, body_of(**said)))
    assert fault.kind is FaultKind.MALFORMED
    assert told in fault.message


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"verify": True}, 200, {"verified": True}),
        ({"verify": True}, 202, {"status": "accepted", "job": "j"}),
        ({"verify": True, "dry_run": True}, 200, {"dry_run": True, "matched": 1}),
    ],
)
async def test_what_was_verified_or_cannot_be_yet_is_well(
    asked: dict[str, Any], status: int, said: dict[str, Any]
) -> None:
    """An accepted bust is verified when it is done; of a dry run there is nothing to verify."""
    reply = await answer_to(bust_request("cdn/main.css", "direct", 6, **asked), status, body_of(**said))
    assert reply.verified == said.get("verified")


async def test_what_a_layer_says_tells_neither_the_target_nor_the_token() -> None:
    """Daemons repeat what they were asked; logs and errors do not."""
    layers = [{"name": "re\x1bdis", "ok": False, "error": "no route to cdn/main.css for secret-token"}]
    answer = Answer(status=202, body=body_of(status="accepted", job="j\n1", layers=layers))
    async with FakeDaemon([answer]) as fake:
        sessions = SessionManager(pool=Pool(), tls=None)
        client = DaemonClient(DaemonAddress.parse(fake.url), sessions, token="secret-token")
        reply = await bust(client)
        await sessions.aclose()
    (layer,) = reply.layers
    assert (layer.name, reply.job) == ("re?dis", "j?1")
    assert layer.error is not None
    assert "main.css" not in layer.error
    assert "secret" not in layer.error


async def test_a_base_request_is_sent_as_a_base_daemon_knows_it() -> None:
    """Four fields and no more; the others only where they say something."""
    async with FakeDaemon() as fake, speaking_to(fake.url) as client:
        await bust(client)
        assert fake.requests[0].model_fields_set == {"target", "strategy", "binding", "fault_tolerance"}


@pytest.mark.parametrize(
    ("problem", "kind"),
    [("urn:bustcall:problem:no-such-job", FaultKind.REJECTED), ("about:blank", FaultKind.NOT_THIS_SERVICE)],
)
async def test_a_job_that_is_not_there_is_not_a_service_that_is_not_there(problem: str, kind: FaultKind) -> None:
    """By the type of the problem."""
    body = json.dumps({"type": problem, "title": "gone", "status": 404, "detail": "no such job"}).encode()
    headers = {"Content-Type": "application/problem+json"}
    answer = Answer(status=404, body=body, headers=headers)
    async with FakeDaemon([answer]) as fake, speaking_to(fake.url) as client:
        fault = await fault_of(bust(client))
    assert (fault.kind, fault.applied) == (kind, "no")


async def test_an_extension_may_be_used_with_delete() -> None:
    """Which carries no body."""
    capabilities = ["cache.bust.jobs"]
    async with FakeDaemon([Answer.accepted("j1")], capabilities=capabilities) as fake, speaking_to(fake.url) as client:
        await bust(client)
        until = asyncio.get_running_loop().time() + PATIENCE
        found = await client.use("/api/v1/jobs/j1", None, JobReply, until=until, deadline=until, method="DELETE")
        assert found.state == fake.jobs["j1"].state == "cancelled"
