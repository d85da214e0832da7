"""The fake daemon: its plan, what it applies, its idempotency keys, its probes and its restarts."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from pybustcall import TLS, BustcallClient
from pybustcall.models import BustReply, Problem, cache_key_of
from pybustcall.testing import Answer, FakeDaemon, check_daemon
from tests.conftest import PATIENCE, eventually

KEYED = ("cache.bust.idempotent",)
CAPABILITIES = "/api/v1/capabilities"
BINDINGS = "/api/v1/bindings/capabilities"


class Caller:
    """Sends plain requests, as any client could."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def bust(self, target: str = "a", *keys: str, **fields: object) -> tuple[int, bytes, str | None]:
        """Return the status, the body, and what Idempotency-Replayed says."""
        body = json.dumps({"target": target, **fields}).encode()
        headers = [("Content-Type", "application/json"), *(("Idempotency-Key", key) for key in keys)]
        async with self._session.post(self._url + "/api/v1/bust", data=body, headers=headers) as response:
            return response.status, await response.read(), response.headers.get("Idempotency-Replayed")

    async def get(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body."""
        async with self._session.get(self._url + path) as response:
            return response.status, await response.read()


@asynccontextmanager
async def calling(fake: FakeDaemon) -> AsyncIterator[Caller]:
    """Call a fake daemon, each time over a connection of its own."""
    limit = aiohttp.ClientTimeout(total=PATIENCE)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
        yield Caller(session, fake.url)


def applied(fake: FakeDaemon) -> list[str]:
    """Tell the targets of what had an effect."""
    return [bust.target for bust in fake.applied]


async def test_a_refusal_is_a_problem_as_daemons_of_ours_word_it() -> None:
    """With Retry-After where it is asked for; nothing is applied."""
    async with FakeDaemon([Answer.problem(429, retry_after=7), Answer.problem(503, "draining")]) as fake:
        async with aiohttp.ClientSession() as session:
            for status, wait, detail in ((429, "7", "as planned"), (503, None, "draining")):
                async with session.post(fake.url + "/api/v1/bust", json={"target": "a"}) as response:
                    assert (response.status, response.headers.get("Retry-After")) == (status, wait)
                    assert response.content_type == "application/problem+json"
                    problem = Problem.model_validate_json(await response.read())
                    assert (problem.status, problem.detail) == (status, detail)
    assert applied(fake) == []


async def test_an_answer_for_another_target_names_that_ones_key() -> None:
    """It is a right reply, to another question."""
    async with FakeDaemon([Answer.for_another("b")]) as fake, calling(fake) as caller:
        reply = BustReply.model_validate_json((await caller.bust("a"))[1])
        assert reply.cache_key == cache_key_of("b")
    assert applied(fake) == []


async def test_a_page_a_huge_body_and_a_redirect_are_what_they_say() -> None:
    """HTML with 200, so many bytes of JSON, and a Location."""
    async with FakeDaemon([Answer.page(), Answer.huge(5000), Answer.redirect("http://127.0.0.1:1/")]) as fake:
        async with aiohttp.ClientSession() as session:
            async with session.post(fake.url + "/api/v1/bust", json={"target": "a"}) as response:
                assert (response.status, response.content_type) == (200, "text/html")
            async with session.post(fake.url + "/api/v1/bust", json={"target": "b"}) as response:
                body = await response.read()
                assert (len(body), list(json.loads(body))) == (5000, ["padding"])
            url = fake.url + "/api/v1/bust"
            async with session.post(url, json={"target": "c"}, allow_redirects=False) as response:
                assert (response.status, response.headers["Location"]) == (307, "http://127.0.0.1:1/")
    assert applied(fake) == ["b"]


async def test_a_content_length_that_promises_more_leaves_the_body_short() -> None:
    """The connection is closed before all that was promised has come."""
    async with FakeDaemon([Answer(miscount=5)]) as fake, calling(fake) as caller:
        with pytest.raises(aiohttp.ClientPayloadError):
            await caller.bust()
    assert applied(fake) == ["a"]


async def test_a_content_length_that_promises_less_cuts_the_body_for_who_believes_it() -> None:
    """All of it is on the wire all the same."""
    async with FakeDaemon([Answer(miscount=-5)]) as fake:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(fake.url.rsplit(":", 1)[1]))
        writer.write(
            b"POST /api/v1/bust HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 15\r\n\r\n{"target": "a"}'
        )
        async with asyncio.timeout(PATIENCE):
            head, _, whole = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert f"content-length: {len(whole) - 5}\r\n" in head.decode().lower()
    assert BustReply.model_validate_json(whole).answers("a")


@pytest.mark.parametrize(
    ("answer", "effect"),
    [
        (Answer(), True),
        (Answer(cut=3), True),
        (Answer(reset=True), True),
        (Answer(reset=True, applies=False), False),
        (Answer(status=500), False),
        (Answer(status=500, applies=True), True),
        (Answer(raw=b"HTTP/1.1 200 OK\r\n\r\n"), False),
        (Answer(raw=b"", applies=True), True),
    ],
)
async def test_an_effect_is_what_the_plan_says_and_not_what_is_heard(answer: Answer, effect: bool) -> None:
    """By default a 200 has one, also if it is lost on its way."""
    async with FakeDaemon([answer]) as fake, calling(fake) as caller:
        with suppress(aiohttp.ClientError):
            await caller.bust()
        assert len(fake.requests) == 1
    assert applied(fake) == (["a"] if effect else [])


async def test_a_bust_that_hangs_has_its_effect_at_once() -> None:
    """Unless the plan says that it has none."""
    plan = [Answer(hang=True, applies=False), Answer(hang=True)]
    async with FakeDaemon(plan) as fake, calling(fake) as caller:
        async with hanging(caller.bust("a")):
            await eventually(lambda: len(fake.requests) == 1)
            async with hanging(caller.bust("b")):
                await eventually(lambda: applied(fake) == ["b"])


async def test_a_late_answer_has_its_effect_when_the_work_is_done() -> None:
    """A daemon that is stopped before then never does it."""
    async with FakeDaemon([Answer(delay=0.05), Answer(delay=3600.0)]) as fake, calling(fake) as caller:
        async with hanging(caller.bust("a")):
            await eventually(lambda: len(fake.requests) == 1)
            assert applied(fake) == []
            await eventually(lambda: applied(fake) == ["a"])
        async with hanging(caller.bust("b")):
            await eventually(lambda: len(fake.requests) == 2)
            await fake.stop()
    assert applied(fake) == ["a"]


async def test_without_the_capability_a_key_means_nothing() -> None:
    """Every repeat has its effect."""
    async with FakeDaemon() as fake, calling(fake) as caller:
        for _ in range(2):
            assert (await caller.bust("a", "key"))[2] is None
    assert applied(fake) == ["a", "a"]


async def test_a_repeat_is_answered_from_memory() -> None:
    """The very same body, with a header that says so, and no other effect; other keys and no key have their own."""
    async with FakeDaemon(capabilities=KEYED) as fake, calling(fake) as caller:
        first = await caller.bust("a", "key")
        again = await caller.bust("a", "key", fault_tolerance=0, binding="other")
        assert first == (200, again[1], None)
        assert again[2] == "true"
        assert (await caller.bust("a", "other-key"))[2] is None
        assert (await caller.bust("a"))[2] is None
    assert applied(fake) == ["a", "a", "a"]
    assert len(fake.requests) == 4


async def test_a_repeat_takes_from_the_plan_too() -> None:
    """It may be lost or refused like any other, and still has no effect."""
    plan = [Answer(reset=True), Answer(delay=0.01, cut=1), Answer(status=503)]
    async with FakeDaemon(plan, capabilities=KEYED) as fake, calling(fake) as caller:
        for _ in range(2):
            with pytest.raises(aiohttp.ClientError):
                await caller.bust("a", "key")
        assert (await caller.bust("a", "key"))[::2] == (503, None)
        assert (await caller.bust("a", "key"))[::2] == (200, "true")
    assert applied(fake) == ["a"]


async def test_the_same_key_for_another_request_is_refused() -> None:
    """Another target or strategy is another request; the problem names the header, the plan keeps its answers."""
    async with FakeDaemon(capabilities=KEYED) as fake, calling(fake) as caller:
        await caller.bust("a", "key")
        fake.plan.append(Answer(status=500))
        for target, strategy in (("b", "dimensional"), ("a", "direct")):
            status, body, _ = await caller.bust(target, "key", strategy=strategy)
            assert (status, Problem.model_validate_json(body).field) == (422, "Idempotency-Key")
        assert len(fake.plan) == 1
    assert applied(fake) == ["a"]


@pytest.mark.parametrize("keys", [("",), ("k" * 256,), ("with space",), ("é",), ("one", "two")])
async def test_a_key_that_is_none_is_refused(keys: tuple[str, ...]) -> None:
    """1 to 255 visible ASCII characters, once."""
    async with FakeDaemon(capabilities=KEYED) as fake, calling(fake) as caller:
        status, body, _ = await caller.bust("a", *keys)
        assert (status, Problem.model_validate_json(body).field) == (400, "Idempotency-Key")
    assert (fake.requests, applied(fake)) == ([], [])


async def test_a_failure_is_not_remembered() -> None:
    """The repeat is the first that succeeds."""
    async with FakeDaemon([Answer.problem(500)], capabilities=KEYED) as fake, calling(fake) as caller:
        assert (await caller.bust("a", "key"))[0] == 500
        assert (await caller.bust("a", "key"))[::2] == (200, None)
        assert (await caller.bust("a", "key"))[::2] == (200, "true")
    assert applied(fake) == ["a"]


async def test_repeats_wait_for_the_first_and_have_no_effect_of_their_own() -> None:
    """Twenty at once, of which the first takes its time: one effect, nineteen replays."""
    async with FakeDaemon([Answer(delay=0.05)], capabilities=KEYED) as fake, calling(fake) as caller:
        answers = await asyncio.gather(*(caller.bust("a", "key") for _ in range(20)))
    assert sorted(str(replayed) for _, _, replayed in answers) == ["None", *["true"] * 19]
    assert len({body for _, body, _ in answers}) == 1
    assert applied(fake) == ["a"]


async def test_if_the_first_fails_one_of_those_who_waited_runs_next() -> None:
    """The others wait for that one."""
    plan = [Answer(delay=0.05, status=500), Answer(delay=0.01)]
    async with FakeDaemon(plan, capabilities=KEYED) as fake, calling(fake) as caller:
        answers = await asyncio.gather(*(caller.bust("a", "key") for _ in range(5)))
    assert sorted((status, str(replayed)) for status, _, replayed in answers) == [
        (200, "None"), *[(200, "true")] * 3, (500, "None")
    ]  # fmt: skip
    assert applied(fake) == ["a"]


async def test_a_stop_ends_the_first_and_those_who_wait_for_it() -> None:
    """None of them has an effect, and none takes from the plan any more; what succeeded before is still known."""
    async with FakeDaemon([Answer(), Answer(delay=3600.0)], capabilities=KEYED) as fake, calling(fake) as caller:
        await caller.bust("a", "known")
        fake.plan.append(Answer(status=500))
        async with hanging(caller.bust("a", "key")), hanging(caller.bust("a", "key")):
            await eventually(lambda: len(fake.requests) == 3)
            await fake.stop()
            await fake.start()
        assert (len(fake.plan), applied(fake)) == (1, ["a"])
        fake.plan.clear()
        assert (await caller.bust("a", "key"))[2] is None
        assert (await caller.bust("a", "known"))[2] == "true"
        fake.forget()
        assert (await caller.bust("a", "known"))[2] is None
    assert applied(fake) == ["a", "a", "a"]


async def test_what_was_forgotten_while_it_ran_may_run_again() -> None:
    """The end of the one does not disturb the other of the same key."""
    async with FakeDaemon([Answer(delay=0.05, status=500)], capabilities=KEYED) as fake, calling(fake) as caller:
        first = asyncio.create_task(caller.bust("a", "key"))
        await eventually(lambda: len(fake.requests) == 1)
        fake.forget()
        assert (await caller.bust("a", "key"))[::2] == (200, None)
        assert (await first)[0] == 500
        assert (await caller.bust("a", "key"))[::2] == (200, "true")
    assert applied(fake) == ["a"]


async def test_with_idempotency_keys_it_passes_the_conformance_suite() -> None:
    """What it says of keys, the suite finds."""
    async with FakeDaemon(capabilities=KEYED) as fake:
        verdicts = await check_daemon(fake.url, strict=True)
    assert [verdict for verdict in verdicts if not verdict.ok] == []


async def test_keys_of_one_token_are_not_those_of_another() -> None:
    """Each has its own memory."""
    async with FakeDaemon(capabilities=KEYED) as fake:
        for token in ("one", "two"):
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
                assert (await Caller(session, fake.url).bust("a", "key"))[2] is None
    assert applied(fake) == ["a", "a"]


@pytest.mark.parametrize("document", [True, False])
async def test_further_capabilities_are_advertised(document: bool) -> None:
    """On the route of ours and on that of older daemons."""
    async with FakeDaemon(capabilities=["x.y", *KEYED], document=document) as fake:
        async with BustcallClient(fake.url) as client:
            assert (await client.capabilities()).names >= {"x.y", "cache.bust.idempotent", "cache.bust"}


async def test_probes_have_a_plan_of_their_own() -> None:
    """Each takes the next answer from it, on either route, and is counted; then all is well."""
    plan = [Answer.problem(503), Answer(cut=1), Answer(body=b"[]"), Answer(delay=0.01)]
    async with FakeDaemon([Answer(status=500)], probe_plan=plan) as fake, calling(fake) as caller:
        assert (await caller.get(CAPABILITIES))[0] == 503
        with pytest.raises(aiohttp.ClientError):
            await caller.get(CAPABILITIES)
        assert await caller.get(BINDINGS) == (200, b"[]")
        assert json.loads((await caller.get(CAPABILITIES))[1])["binding"] == "pybustcall"
        assert (fake.probes, len(fake.probe_plan), len(fake.plan)) == (4, 0, 1)
        fake.probe_plan.append(Answer(status=404))
        assert (await caller.get(CAPABILITIES))[0] == 404


async def test_probes_of_an_older_daemon_are_counted_where_they_are_answered() -> None:
    """It does not know the other route."""
    async with FakeDaemon(document=False) as fake, calling(fake) as caller:
        assert (await caller.get(CAPABILITIES))[0] == 404
        assert (await caller.get(BINDINGS))[0] == 200
        assert fake.probes == 1


async def restart(fake: FakeDaemon) -> None:
    """Stop and start, twice each, with a connection that never brought a request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(fake.url.rsplit(":", 1)[1]))
    async with calling(fake) as caller:
        url = fake.url
        assert (await caller.bust("a"))[0] == 200
        await fake.start()  # it runs already
        await fake.stop()
        await fake.stop()
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await caller.bust("b")
        await fake.start()
        assert fake.url == url
        assert (await caller.bust("c"))[0] == 200
        await fake.stop()
        await fake.start()
        assert (await caller.bust("d"))[0] == 200


each_loop = pytest.mark.parametrize(
    "factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


@each_loop
def test_answers_are_lost_in_the_same_ways_on_every_loop(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Also on uvloop, whose connections are not asyncio's own."""

    async def play() -> None:
        plan = [Answer(reset=True), Answer(raw=b"nonsense\r\n\r\n"), Answer(cut=3), Answer(hang=True)]
        async with FakeDaemon(plan) as fake, calling(fake) as caller:
            for _ in range(3):
                with pytest.raises(aiohttp.ClientError):
                    await caller.bust()
            async with hanging(caller.bust()):
                await eventually(lambda: len(fake.requests) == 4)
                fake.drop_connections()
            assert (await caller.bust())[0] == 200
            assert fake.connections == 5

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(play())


@each_loop
def test_a_stopped_daemon_comes_back_on_the_same_port(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Connections are cut and refused meanwhile; what it counts stays."""

    async def play() -> None:
        async with FakeDaemon() as fake:
            await restart(fake)
        assert applied(fake) == ["a", "c", "d"]

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(play())


async def test_it_can_be_left_while_it_is_stopped() -> None:
    """Its port is given up (a socket left open is a warning, and so an error)."""
    async with FakeDaemon() as fake:
        await fake.stop()
    async with FakeDaemon():
        pass


async def test_it_comes_back_on_its_socket_and_with_its_certificate(
    tmp_path: Path, server_tls: ssl.SSLContext, ca_file: Path
) -> None:
    """A restart changes neither."""
    async with FakeDaemon(socket=tmp_path / "f.sock") as fake:
        for _ in range(2):
            async with BustcallClient(fake.url) as client:
                assert (await client.bust("a")).ok
            await fake.stop()
            await fake.start()
    async with FakeDaemon(tls=server_tls) as fake:
        await fake.stop()
        await fake.start()
        async with BustcallClient(fake.url, tls=TLS(ca=ca_file)) as client:
            assert (await client.bust("a")).ok


@asynccontextmanager
async def hanging(request: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Have a request under way whose end does not matter."""
    task = asyncio.create_task(request)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            assert isinstance(task.exception(), aiohttp.ClientError | None)
