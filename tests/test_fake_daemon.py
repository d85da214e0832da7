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
from pybustcall.capabilities import SEMVERX, advertised_digest, advertisement, advertisement_bytes
from pybustcall.models import BustReply, DependencyReply, HotSwapReply, LayerReply, Problem, cache_key_of
from pybustcall.testing import Answer, FakeDaemon, check_daemon
from tests.conftest import PATIENCE, eventually

KEYED = ("cache.bust.idempotent",)
EXTENDED = (*KEYED, "cache.register", "cache.dependencies", "semver.resolve", "cache.hotswap", "daemon.negotiate")
BUSTS = (
    "cache.register",
    *(f"cache.bust.{name}" for name in ("all", "dry_run", "jobs", "namespace", "prefix", "soft", "tag", "verify")),
)
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

    async def post(self, path: str, document: object, **headers: str) -> tuple[int, Any]:
        """Return the status, and the body as JSON."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(self._url + "/api/v1/" + path, json=document, headers=sent) as response:
            return response.status, await response.json(content_type=None)

    async def get(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        """Return the status and the body; of another method without a body, too."""
        async with self._session.request(method, self._url + path) as response:
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


async def test_with_every_capability_it_passes_the_conformance_suite() -> None:
    """What it says that it has, it has; and nothing is skipped."""
    names = {*EXTENDED, *BUSTS, "cache.bust.settle", "events.stream"}
    async with FakeDaemon(capabilities=names, layers=["redis", "pages"], heartbeat=0.2) as fake:
        verdicts = await check_daemon(fake.url, strict=True)
    assert {verdict.outcome for verdict in verdicts} == {"passed"}


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


# Dependencies, entries and hot swaps


def knowing(fake: FakeDaemon, **current: str) -> None:
    """Have a daemon know dependencies in these versions, which are current, and in 1.1.0."""
    for name, version in current.items():
        fake.dependencies[name] = DependencyReply(name=name, current=version, versions=(version, "1.1.0"))


@pytest.mark.parametrize("path", ["entries", "dependencies", "dependencies/forget", "resolve", "hotswap"])
async def test_what_it_does_not_advertise_it_does_not_have(path: str) -> None:
    """The route is missing."""
    async with FakeDaemon() as fake, calling(fake) as caller:
        assert (await caller.post(path, {}))[0] == 404


async def test_a_hot_swap_that_had_an_effect_is_recorded() -> None:
    """And shows in what the daemon knows; what depends is busted, also by way of others."""
    async with FakeDaemon(capabilities=EXTENDED) as fake, calling(fake) as caller:
        knowing(fake, model="1.0.0", templates="1.0.0")
        fake.entries.update({"page": ("model",), "site": ("page",), "other": ("templates",)})
        status, said = await caller.post("hotswap", {"swaps": [{"name": "model", "to": "1.2.0"}]})
        assert (status, HotSwapReply.model_validate(said).busted) == (200, 2)
        assert fake.dependencies["model"].versions == ("1.0.0", "1.1.0", "1.2.0")
        assert (await caller.post("resolve", {"spec": "model"}))[1]["version"] == "1.2.0"
        assert list(fake.entries) == ["other"]
        assert [[(swap.name, swap.to) for swap in done.swaps] for done in fake.swaps] == [[("model", "1.2.0")]]
        assert (fake.requests, applied(fake)) == ([], [])


async def test_every_reason_against_a_hot_swap_is_told() -> None:
    """And nothing has changed; the plan keeps its answers."""
    async with FakeDaemon(capabilities=EXTENDED, swap_plan=[Answer(status=500)]) as fake, calling(fake) as caller:
        knowing(fake, model="1.0.0", templates="1.0.0")
        before = dict(fake.dependencies)
        swaps = [
            {"name": "model", "to": "2.0.0"},
            {"name": "model", "to": "1.1.0"},
            {"name": "templates", "from": "1.1.0", "to": "1.1.0"},
            {"name": "nobody", "to": "1.0.0"},
        ]
        status, said = await caller.post("hotswap", {"swaps": swaps})
        problem = Problem.model_validate(said)
        assert (status, problem.type) == (409, "urn:bustcall:problem:swap-refused")
        assert problem.unmet is not None
        for reason in (
            "model: is named twice",
            "model: major: stable to stable takes a candidate of major 1",
            "templates: the current version is 1.0.0, not 1.1.0",
            "nobody: was not announced",
        ):
            assert reason in problem.unmet
        assert (fake.dependencies, fake.swaps, len(fake.swap_plan)) == (before, [], 1)


async def test_hot_swaps_have_a_plan_of_their_own() -> None:
    """What is answered and what is done are two things: a swap whose answer is lost is done, once for its key."""
    plan = [Answer(reset=True), Answer.problem(503), Answer(), Answer.problem(500)]
    async with FakeDaemon(capabilities=EXTENDED, swap_plan=plan) as fake, calling(fake) as caller:
        knowing(fake, model="1.0.0")
        swap = {"swaps": [{"name": "model", "from": "1.0.0", "to": "1.1.0"}]}
        with pytest.raises(aiohttp.ClientError):
            await caller.post("hotswap", swap, Idempotency_Key="k")
        assert (fake.dependencies["model"].current, len(fake.swaps)) == ("1.1.0", 1)
        assert (await caller.post("hotswap", swap, Idempotency_Key="k"))[0] == 503
        assert (await caller.post("hotswap", swap, Idempotency_Key="k"))[0] == 200
        back = {"swaps": [{"name": "model", "to": "1.0.0"}]}
        assert (await caller.post("hotswap", back, Idempotency_Key="other"))[0] == 500
        assert (fake.dependencies["model"].current, len(fake.swaps)) == ("1.1.0", 1)
        assert (await caller.post("hotswap", back, Idempotency_Key="k"))[0] == 422
        assert (await caller.post("hotswap", back, Idempotency_Key="two words"))[0] == 400


async def test_a_hot_swap_that_takes_its_time_is_judged_when_it_is_done() -> None:
    """Another may have come first."""
    async with FakeDaemon(capabilities=EXTENDED, swap_plan=[Answer(delay=0.05)]) as fake, calling(fake) as caller:
        knowing(fake, model="1.0.0")
        swap = {"swaps": [{"name": "model", "from": "1.0.0", "to": "1.1.0"}]}
        late = asyncio.create_task(caller.post("hotswap", swap))
        await eventually(lambda: not fake.swap_plan)
        assert (await caller.post("hotswap", swap))[0] == 200
        assert (await late)[0] == 409
        assert len(fake.swaps) == 1


async def test_a_bust_drops_entries_as_its_strategy_says() -> None:
    """The entry alone, or what depends on it too; the reply tells how many."""
    async with FakeDaemon(capabilities=EXTENDED) as fake, calling(fake) as caller:
        for key, depends_on in (("a", ["x"]), ("b", ["a"]), ("c", [])):
            assert (await caller.post("entries", {"key": key, "depends_on": depends_on}))[0] == 200
        assert BustReply.model_validate_json((await caller.bust("a", strategy="direct"))[1]).removed == 1
        fake.plan.append(Answer(applies=False))
        assert BustReply.model_validate_json((await caller.bust("a"))[1]).removed == 0
        assert BustReply.model_validate_json((await caller.bust("a"))[1]).removed == 1
        assert list(fake.entries) == ["c"]
    async with FakeDaemon() as fake, calling(fake) as caller:
        assert BustReply.model_validate_json((await caller.bust("a"))[1]).removed is None


async def test_a_dependency_is_forgotten_unless_something_depends_on_it() -> None:
    """What it does not know is forgotten already; what is no name is refused."""
    async with FakeDaemon(capabilities=EXTENDED) as fake, calling(fake) as caller:
        knowing(fake, model="1.0.0", templates="1.0.0")
        fake.entries["page"] = ("templates",)
        for name, status, left in (
            ("templates", 409, ["model", "templates"]),
            ("two words", 422, ["model", "templates"]),
            (7, 422, ["model", "templates"]),
            ("model", 200, ["templates"]),
            ("model", 200, ["templates"]),
        ):
            told, said = await caller.post("dependencies/forget", {"name": name})
            assert (told, list(fake.dependencies)) == (status, left)
            if status == 200:
                assert said == {"status": "success", "name": "model"}
            else:
                assert said["field"] == "name"
        fake.entries.clear()
        assert (await caller.post("dependencies/forget", {"name": "templates"}))[0] == 200
        assert fake.dependencies == {}


# What it requires of its clients


OURS = {"Bustcall_Version": SEMVERX, "Bustcall_Capabilities": advertised_digest()}


async def test_a_client_of_another_version_is_refused() -> None:
    """426, naming what is unmet; it may ask for status and capabilities. Requirements may change at any time."""
    async with FakeDaemon(advertises={"requires": {"semverx": ">=99"}}) as fake, calling(fake) as caller:
        for headers, says in ((OURS, "does not match >=99"), ({}, "its version is not known")):
            status, said = await caller.post("bust", {"target": "a"}, **headers)
            problem = Problem.model_validate(said)
            assert (status, problem.type) == (426, "urn:bustcall:problem:incompatible")
            assert problem.unmet is not None
            assert says in problem.unmet[0]
        assert (await caller.get("/api/v1/status"))[0] == (await caller.get(CAPABILITIES))[0] == 200
        assert (await caller.get("/api/v1/nothing-here"))[0] == 404
        assert (fake.requests, applied(fake)) == ([], [])
        fake.advertises = {}
        assert (await caller.bust())[0] == 200


async def test_a_client_that_is_not_known_is_asked_to_advertise() -> None:
    """428, until its document was sent, which is recorded."""
    requires = {"semverx": ">=0.1.0-0", "capabilities": ["cache.bust"]}
    async with FakeDaemon(advertises={"requires": requires}) as fake, calling(fake) as caller:
        status, said = await caller.post("bust", {"target": "a"}, **OURS)
        assert (status, said["type"]) == (428, "urn:bustcall:problem:advertise")
        assert (await caller.post("bust", {"target": "a"}))[0] == 426  # of unknown version it cannot fit
        async with aiohttp.ClientSession() as session:
            headers = {"Content-Type": "application/json"}
            async with session.post(fake.url + CAPABILITIES, data=advertisement_bytes(), headers=headers) as response:
                assert (response.status, await response.read()) == await caller.get(CAPABILITIES)
        assert (await caller.post("bust", {"target": "a"}, **OURS))[0] == 200
        assert fake.advertised == [advertisement()]
        fake.advertises = {"requires": {"capabilities": ["cache.telepathy"]}}
        status, said = await caller.post("bust", {"target": "a"}, **OURS)
        assert (status, said["unmet"]) == (426, ["capability cache.telepathy is missing"])
        assert (await caller.post("capabilities", {"binding": "a"}))[0] == 426


async def test_the_client_negotiates_with_it() -> None:
    """As with a daemon of ours: it advertises itself when it is asked to, and busts."""
    requires = {"capabilities": ["cache.bust"]}
    async with FakeDaemon(advertises={"requires": requires}) as fake, BustcallClient(fake.url) as client:
        assert (await client.bust("a")).stage == 12
        assert fake.advertised == [advertisement()]


@pytest.mark.parametrize("requires", [{"semverx": "new"}, {"semverx": 7}, "nothing"])
async def test_requirements_that_cannot_be_read_are_asked_of_nobody(requires: object) -> None:
    """They are for clients to trip over."""
    async with FakeDaemon(advertises={"requires": requires}) as fake, calling(fake) as caller:
        assert (await caller.bust())[0] == 200


# Kinds, namespaces, dry runs and jobs


@asynccontextmanager
async def stocked(*plan: Answer) -> AsyncIterator[tuple[FakeDaemon, Caller]]:
    """Run a fake daemon that holds some entries, with tags and dependencies, in two namespaces."""
    async with FakeDaemon(plan, capabilities=(*BUSTS, *KEYED)) as fake, calling(fake) as caller:
        fake.entries.update({"a": (), "a/b": (), "ab": (), "site": ("a/b",)})
        fake.space().tags.update({"a": ("red",), "ab": ("red", "blue")})
        fake.space("n").entries.update({"a/b": ()})
        yield fake, caller


@pytest.mark.parametrize(
    ("asked", "removed", "left"),
    [
        ({"target": "a/b", "strategy": "direct"}, 1, ["a", "ab", "site"]),
        ({"target": "a/b"}, 2, ["a", "ab"]),
        ({"target": "a", "kind": "prefix"}, 3, ["ab"]),
        ({"target": "a", "kind": "prefix", "strategy": "direct"}, 2, ["ab", "site"]),
        ({"target": "red", "kind": "tag"}, 2, ["a/b", "site"]),
        ({"target": "*", "kind": "all", "confirm": True}, 4, []),
        ({"target": "*", "kind": "all", "confirm": True, "namespace": "n"}, 1, ["a", "a/b", "ab", "site"]),
        ({"target": "a", "kind": "prefix", "soft": True}, 3, ["a", "a/b", "ab", "site"]),
    ],
)
async def test_each_kind_reaches_what_it_names(asked: dict[str, Any], removed: int, left: list[str]) -> None:
    """In its namespace; soft leaves it there."""
    async with stocked() as (fake, caller):
        status, body, _ = await caller.bust(**asked)
        reply = BustReply.model_validate_json(body)
        assert (status, reply.removed, list(fake.entries)) == (200, removed, left)
        assert reply.unechoed(fake.requests[0]) == ""
        assert fake.space().stale == ({"a", "a/b", "site"} if asked.get("soft") else set())


async def test_a_dry_run_has_no_effect_and_counts() -> None:
    """It is told what a real one would reach."""
    async with stocked() as (fake, caller):
        _, body, _ = await caller.bust("a", kind="prefix", dry_run=True, verify=True)
        reply = BustReply.model_validate_json(body)
        assert (reply.matched, reply.removed, reply.dry_run, reply.verified) == (3, 0, True, None)
        assert (fake.applied, len(fake.entries)) == ([], 4)


async def test_a_daemon_that_does_not_know_a_field_ignores_it() -> None:
    """As older ones do: the tag is taken for a key, and nothing is repeated."""
    async with FakeDaemon(capabilities=["cache.register"]) as fake, calling(fake) as caller:
        fake.entries.update({"red": (), "page": ()})
        await caller.post("entries", {"key": "page", "tags": ["red"], "namespace": "n"})
        status, body, _ = await caller.bust("red", kind="tag", soft=True, namespace="n", dry_run=True, verify=True)
        assert (status, list(fake.entries)) == (200, ["page"])
        assert BustReply.model_validate_json(body).unechoed(fake.requests[0]) == "kind"


async def test_a_daemon_that_has_some_kind_refuses_the_others() -> None:
    """It knows what the field is for."""
    async with FakeDaemon(capabilities=["cache.bust.tag"]) as fake, calling(fake) as caller:
        status, body, _ = await caller.bust("a", kind="prefix")
        assert (status, Problem.model_validate_json(body).field) == (422, "kind")
        assert (await caller.bust("a", kind="tag"))[0] == 200
    assert [bust.kind for bust in fake.requests] == ["tag"]


@pytest.mark.parametrize("stops", [False, True])
async def test_a_bust_that_settles_is_done_again(stops: bool) -> None:
    """What came meanwhile goes, too, unless the daemon is stopped by then; the layer tells when."""
    settling = FakeDaemon(capabilities=[*BUSTS, "cache.bust.settle"], layers=["redis", "pages"])
    async with settling as fake, calling(fake) as caller:
        fake.entries["a"] = ()
        reply = BustReply.model_validate_json((await caller.bust("a", settle=0.05))[1])
        assert [(layer.name, layer.removed, layer.settle) for layer in reply.layers] == [
            ("redis", 1, 0.05), ("pages", 0, 0.05),
        ]  # fmt: skip
        fake.entries["a"] = ()
        if stops:
            await fake.stop()
            assert not fake._second
        else:
            await eventually(lambda: not fake.entries)
        assert list(fake.entries) == (["a"] if stops else [])
        assert len(fake.applied) == 1


async def test_of_a_dry_run_the_layer_tells_what_is_matched() -> None:
    """And of no second bust."""
    settling = FakeDaemon(capabilities=[*BUSTS, "cache.bust.settle"], layers=["redis"])
    async with settling as fake, calling(fake) as caller:
        fake.entries["a"] = ()
        reply = BustReply.model_validate_json((await caller.bust("a", settle=1, dry_run=True))[1])
        assert reply.layers == (LayerReply(name="redis", ok=True, removed=1),)


async def test_a_hybrid_bust_is_a_job_that_is_done_once_it_was_asked_for() -> None:
    """Unless it is cancelled before; or planned otherwise, or a dry run."""
    async with stocked() as (fake, caller):
        jobs = [BustReply.model_validate_json((await caller.bust("a/b", strategy="hybrid"))[1]).job for _ in range(2)]
        assert [job.state for job in fake.jobs.values()] == ["running", "running"]
        assert json.loads((await caller.get(f"/api/v1/jobs/{jobs[0]}"))[1])["state"] == "running"
        told = json.loads((await caller.get(f"/api/v1/jobs/{jobs[0]}"))[1])
        assert (told["state"], told["removed"], len(fake.applied)) == ("done", 2, 1)
        assert json.loads((await caller.get(f"/api/v1/jobs/{jobs[1]}", "DELETE"))[1])["state"] == "cancelled"
        assert json.loads((await caller.get(f"/api/v1/jobs/{jobs[1]}"))[1])["state"] == "cancelled"
        assert (await caller.bust("a", strategy="hybrid", dry_run=True))[0] == 200
        fake.plan.append(Answer())
        assert (await caller.bust("a", strategy="hybrid"))[0] == 200
        assert (len(fake.jobs), len(fake.applied)) == (2, 2)


async def test_a_key_is_bound_to_what_is_done_and_to_no_dry_run() -> None:
    """Not to the reason for it; a dry run is answered anew each time."""
    async with stocked() as (fake, caller):
        assert (await caller.bust("a", "k", dry_run=True))[::2] == (200, None)
        assert (await caller.bust("a", "k", reason="one"))[::2] == (200, None)
        assert (await caller.bust("a", "k", reason="two"))[::2] == (200, "true")
        assert (await caller.bust("a", "k", soft=True))[0] == 422
        assert (await caller.bust("a", "k", dry_run=True))[::2] == (200, None)
        assert len(fake.applied) == 1


@pytest.mark.parametrize(
    ("query", "field"), [("limit=0", "limit"), ("limit=1001", "limit"), ("limit=%C2%B2", "limit"), ("state=x", "state")]
)
async def test_a_question_for_jobs_that_cannot_be_is_refused(query: str, field: str) -> None:
    """By its field."""
    async with stocked() as (_, caller):
        status, body = await caller.get(f"/api/v1/jobs?{query}")
        assert (status, Problem.model_validate_json(body).field) == (422, field)


async def test_an_accepted_bust_has_its_effect_when_it_is_finished() -> None:
    """Until then it is a job."""
    layer = LayerReply(name="cdn", ok=False, error="down")
    async with stocked(Answer.accepted("j9", layers=[layer]), Answer.accepted()) as (fake, caller):
        status, body, _ = await caller.bust("a/b", reason="why")
        reply = BustReply.model_validate_json(body)
        assert (status, reply.accepted, reply.job, reply.layers) == (202, True, "j9", (layer,))
        assert (fake.applied, fake.jobs["j9"].state, fake.jobs["j9"].reason) == ([], "waiting", "why")
        fake.finish("j9")
        assert (fake.jobs["j9"].state, fake.jobs["j9"].removed) == ("done", 2)
        assert [bust.target for bust in fake.applied] == ["a/b"]
        assert BustReply.model_validate_json((await caller.bust("b"))[1]).job == "job-2"
        fake.finish("job-2", "settling")
        assert fake.jobs["job-2"].ended is None


async def test_an_accepted_bust_is_answered_from_memory_with_the_same_job() -> None:
    """Under the same key; it is no second job."""
    async with stocked(Answer.accepted("j1")) as (fake, caller):
        first = await caller.bust("a", "key")
        again = await caller.bust("a", "key")
        assert (first[0], again[0], again[2]) == (202, 202, "true")
        assert first[1] == again[1]
        assert list(fake.jobs) == ["j1"]


async def test_a_right_answer_may_tell_of_layers() -> None:
    """As the plan says."""
    async with stocked(Answer(layers=(LayerReply(name="redis", ok=True),))) as (_, caller):
        _, body, _ = await caller.bust("a")
        assert [layer.name for layer in BustReply.model_validate_json(body).layers] == ["redis"]


async def test_jobs_are_served_as_the_protocol_says() -> None:
    """Listed, told, cancelled; what is not there is a problem of its own type."""
    async with stocked(Answer.accepted("j1"), Answer.accepted("j2")) as (_, caller):
        await caller.bust("a")
        await caller.bust("b")
        listed = json.loads((await caller.get("/api/v1/jobs?limit=1"))[1])
        assert [job["job"] for job in listed["jobs"]] == ["j2"]
        listed = json.loads((await caller.get("/api/v1/jobs?before=j2&state=running"))[1])
        assert [job["job"] for job in listed["jobs"]] == ["j1"]
        assert json.loads((await caller.get("/api/v1/jobs?before=j7"))[1]) == {"jobs": []}
        assert json.loads((await caller.get("/api/v1/jobs/j1"))[1])["state"] == "running"
        status, body = await caller.get("/api/v1/jobs/j7")
        assert (status, Problem.model_validate_json(body).type) == (404, "urn:bustcall:problem:no-such-job")
