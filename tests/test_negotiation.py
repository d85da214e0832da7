"""Negotiation: when daemons are asked what they can do, by how many questions, and who is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from pydantic import BaseModel

from pybustcall import BustcallClient, ConfigurationError, IncompatibleDaemon, InvalidRequest, Probes
from pybustcall.capabilities import BASE, LIFETIME, Agreement, DaemonCapabilities, advertised_digest
from pybustcall.faults import AttemptFailed, Fault, FaultKind
from pybustcall.models import CapabilityDocument, Requirements, ResolveReply, ResolveRequest
from pybustcall.negotiation import Negotiator
from pybustcall.testing import FakeDaemon
from tests.conftest import PATIENCE, StartDaemon, eventually

_Model = TypeVar("_Model", bound=BaseModel)
URL = "http://127.0.0.1:1"
NEEDY = Requirements(capabilities=("cache.bust.tag",))


def capabilities(*names: str, digest: str = "sha256:1") -> DaemonCapabilities:
    """Make what a daemon with these capabilities beyond the base says."""
    document = CapabilityDocument(binding="test", capabilities=(*sorted(BASE), *names))
    return DaemonCapabilities(URL, document=document, digest=digest)


class Scripted:
    """A daemon that answers as told: a document, or a fault."""

    url = URL

    def __init__(self, *answers: DaemonCapabilities | FaultKind) -> None:
        self.answers = list(answers)
        self.asked: list[DaemonCapabilities | None] = []
        self.advertised = 0
        self.posted: list[tuple[str, BaseModel | None]] = []
        self.methods: list[object] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def document(
        self, *, until: float, deadline: float, known: DaemonCapabilities | None = None
    ) -> DaemonCapabilities:
        self.asked.append(known)
        await self.gate.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, FaultKind):
            raise AttemptFailed(Fault(answer, URL, "as told", "no", status=200))
        return answer

    async def capabilities(
        self,
        *,
        until: float,
        deadline: float,
        known: DaemonCapabilities | None = None,
        started: Callable[[], None] | None = None,
    ) -> DaemonCapabilities:
        if started is not None:
            started()
        return await self.document(until=until, deadline=deadline, known=known)

    async def advertise(self, *, until: float, deadline: float) -> DaemonCapabilities:
        self.advertised += 1
        return await self.document(until=until, deadline=deadline)

    async def use(self, path: str, request: BaseModel | None, reply: type[_Model], /, **how: object) -> _Model:
        self.posted.append((path, request))
        self.methods.append(how["method"])
        return reply.model_validate({"spec": "a@*", "resolved": "a@1.0.0", "version": "1.0.0", "state": "stable"})


class Stage:
    """A negotiator over one scripted daemon, with a clock that stands still."""

    def __init__(self, *answers: DaemonCapabilities | FaultKind, requires: Requirements | None = None) -> None:
        self.daemon = Scripted(*answers)
        self.now = 0.0
        self.judged: list[str] = []
        self.unmet: list[tuple[str, ...]] = []
        self.agreement = Agreement([Requirements() if requires is None else requires])
        self.negotiator = Negotiator(
            [self.daemon],
            [self.agreement],
            judge=self.judge,
            clock=lambda: self.now,
        )

    def judge(self, _: int, misfit: str, unmet: tuple[str, ...]) -> None:
        self.judged.append(misfit)
        self.unmet.append(unmet)

    async def terms(self, *needs: str, seconds: float = 5.0) -> DaemonCapabilities | None:
        until = asyncio.get_running_loop().time() + seconds
        return await self.negotiator.terms(self.daemon, needs, until=until)


async def fault_of(stage: Stage, *needs: str, seconds: float = 5.0) -> Fault:
    """Tell the fault of a request whose terms cannot be met."""
    with pytest.raises(AttemptFailed) as caught:
        await stage.terms(*needs, seconds=seconds)
    return caught.value.fault


async def test_a_base_request_asks_nothing() -> None:
    """And knows nothing."""
    stage = Stage(capabilities())
    assert await stage.terms() is None
    assert stage.daemon.asked == []


async def test_many_requests_share_one_question() -> None:
    """However many wait, and whoever of them gives up; then nobody asks for 300 seconds."""
    stage = Stage(capabilities("cache.bust.tag"))
    stage.daemon.gate.clear()
    waiting = [asyncio.create_task(stage.terms("cache.bust.tag")) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    stage.daemon.gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [stage.daemon.answers[0]] * 19
    assert len(stage.daemon.asked) == 1
    stage.now = LIFETIME - 1
    await stage.terms("cache.bust.tag")
    assert len(stage.daemon.asked) == 1
    stage.now = LIFETIME
    await stage.terms("cache.bust.tag")
    assert stage.daemon.asked == [None, found[1]]


@pytest.mark.requirement("IMP-07")
async def test_an_extension_that_is_not_advertised_is_refused_before_anything_is_sent() -> None:
    """The fault names it; the next daemon is asked."""
    stage = Stage(capabilities())
    fault = await fault_of(stage, "cache.bust.tag")
    assert (fault.kind, fault.applied) == (FaultKind.UNSUPPORTED, "no")
    assert fault.message == "it does not advertise cache.bust.tag"
    assert fault.unmet == (fault.message,)
    assert stage.judged[-1:] in ([], [""])  # it is not left out for other requests


async def test_the_fault_says_what_needs_the_lacking_capability() -> None:
    """In the words of whoever asks."""
    stage = Stage(capabilities())
    until = asyncio.get_running_loop().time() + 5
    with pytest.raises(AttemptFailed) as caught:
        await stage.negotiator.terms(stage.daemon, ["cache.bust.tag"], until=until, what="a bust by tag")
    assert caught.value.fault.message == "it does not advertise cache.bust.tag: a bust by tag needs that"


async def test_what_is_lacking_may_be_told_instead_of_refused() -> None:
    """The document is waited for all the same, so that something else can be asked."""
    stage = Stage(capabilities("cache.bust.all"))
    until = asyncio.get_running_loop().time() + 5
    found = await stage.negotiator.terms(stage.daemon, ["cache.bust.tag"], until=until, strict=False)
    assert found is not None
    assert found.supports("cache.bust.all")


async def test_an_extension_may_take_further_capabilities_and_another_method() -> None:
    """All of them must be advertised; the method is handed on."""
    stage = Stage(capabilities("cache.bust.jobs"))
    until = asyncio.get_running_loop().time() + 5
    ask = stage.negotiator.asking("cache.bust.jobs", "/path", None, ResolveReply, also=["cache.bust.tag"])
    with pytest.raises(AttemptFailed, match=r"does not advertise cache\.bust\.tag"):
        await ask(stage.daemon, until=until, deadline=until, started=lambda: None)
    ask = stage.negotiator.asking("cache.bust.jobs", "/path", None, ResolveReply, method="DELETE")
    await ask(stage.daemon, until=until, deadline=until, started=lambda: None)
    assert stage.daemon.methods == ["DELETE"]


async def test_a_question_that_fails_fails_each_who_waits_with_an_error_of_their_own() -> None:
    """Errors are marked by the calls that they end."""
    stage = Stage(FaultKind.UNREACHABLE)
    ended = await asyncio.gather(*[stage.terms("a") for _ in range(3)], return_exceptions=True)
    assert [type(error) for error in ended] == [AttemptFailed] * 3
    assert len({id(error) for error in ended}) == 3
    assert len(stage.daemon.asked) == 1
    await fault_of(stage, "a")
    assert len(stage.daemon.asked) == 2


async def test_a_question_that_takes_too_long_is_not_waited_for() -> None:
    """It goes on, for those who come later; closing ends it."""
    stage = Stage(capabilities())
    stage.daemon.gate.clear()
    fault = await fault_of(stage, "a", seconds=0.01)
    assert (fault.kind, fault.applied) == (FaultKind.TIMED_OUT, "no")
    assert len(stage.negotiator._asking) == 1
    waiting = asyncio.create_task(fault_of(stage, "a"))
    await asyncio.sleep(0)
    await stage.negotiator.aclose()
    assert "the client closes" in (await waiting).message
    assert stage.negotiator._asking == {}


async def test_an_error_that_is_nobodys_fault_reaches_whoever_waits() -> None:
    """Such as a client that was closed under the question."""
    stage = Stage(capabilities())

    async def broken(**_: object) -> DaemonCapabilities:
        raise LookupError("as told")

    stage.daemon.document = broken  # type: ignore[method-assign]
    with pytest.raises(LookupError):
        await stage.terms("a")


async def test_started_is_told_when_a_request_waits_for_the_document() -> None:
    """And not otherwise: what is sent later tells of itself."""
    stage = Stage(capabilities("a"))
    told: list[str] = []
    until = asyncio.get_running_loop().time() + 5
    await stage.negotiator.terms(stage.daemon, until=until, started=lambda: told.append("base"))
    await stage.negotiator.terms(stage.daemon, ["a"], until=until, started=lambda: told.append("asked"))
    await stage.negotiator.terms(stage.daemon, ["a"], until=until, started=lambda: told.append("known"))
    assert told == ["asked"]


async def test_an_answer_with_another_digest_is_looked_into_in_the_background() -> None:
    """Once, by one question, and only if the document was ever asked for."""
    stage = Stage(capabilities("a"), capabilities("b", digest="sha256:2"))
    stage.negotiator.heard(URL, "sha256:2")
    assert stage.daemon.asked == []
    await stage.terms("a")
    stage.now = 2.0
    stage.negotiator.heard(URL, "sha256:1")
    assert not stage.negotiator._asking
    stage.negotiator.heard(URL, "sha256:2")
    stage.now = 4.0
    stage.negotiator.heard(URL, "sha256:2")
    (asking,) = stage.negotiator._asking.values()
    await asking
    assert len(stage.daemon.asked) == 2
    known = stage.agreement.known
    assert known is not None
    assert known.supports("b")
    stage.negotiator.cancel()  # with nothing under way


@pytest.mark.requirement("IMP-10")
async def test_a_misfit_is_left_out_until_it_fits() -> None:
    """The judge is told; after half a minute it is asked again in the background."""
    stage = Stage(capabilities(), capabilities("cache.bust.tag", digest="sha256:2"), requires=NEEDY)
    fault = await fault_of(stage)
    assert fault.kind is FaultKind.INCOMPATIBLE
    assert "capability cache.bust.tag is missing" in fault.message
    assert fault.unmet == ("capability cache.bust.tag is missing",)
    assert stage.judged == [fault.message] * 2
    assert set(stage.unmet) == {fault.unmet}
    await fault_of(stage)
    assert len(stage.daemon.asked) == 1
    stage.negotiator.look_again()
    assert (stage.judged[-1], stage.negotiator._asking) == (fault.message, {})
    stage.now = 30.0
    stage.negotiator.look_again()  # for a call: it is let through, since nobody else is there, and asks first
    assert (stage.judged[-1], stage.negotiator._asking) == ("", {})
    stage.negotiator.look_again(for_call=False)
    stage.negotiator.look_again(for_call=False)
    (asking,) = stage.negotiator._asking.values()
    await asking
    assert len(stage.daemon.asked) == 2
    assert stage.judged[-1] == ""
    assert await stage.terms() == stage.agreement.known


def refusing(stage: Stage, *faults: Fault) -> Callable[[], object]:
    """Make a request that meets these faults, and then goes well."""
    left = list(faults)

    async def request() -> str:
        if left:
            raise AttemptFailed(left.pop(0))
        return "done"

    return request


async def send(stage: Stage, *faults: Fault) -> object:
    """Send such a request."""
    now = asyncio.get_running_loop().time()
    request = refusing(stage, *faults)
    return await stage.negotiator.send(stage.daemon, request, until=now + 5, deadline=now + 5)  # type: ignore[arg-type]


REFUSED = Fault(FaultKind.INCOMPATIBLE, URL, "it refused", "no", status=426, unmet=("too old for it",))
WANTS_TO_KNOW = Fault(FaultKind.INCOMPATIBLE, URL, "advertise first", "no", status=428)


@pytest.mark.requirement("IMP-10")
async def test_a_daemon_that_wants_to_know_us_is_told_and_asked_again() -> None:
    """Thrice at most, since there may be several behind one URL; that it still asks does not make it a misfit."""
    stage = Stage(capabilities("a"))
    assert await send(stage, WANTS_TO_KNOW) == "done"
    assert stage.daemon.advertised == 1
    assert stage.agreement.known == stage.daemon.answers[0]
    assert await send(stage, WANTS_TO_KNOW, WANTS_TO_KNOW) == "done"
    assert stage.daemon.advertised == 4
    with pytest.raises(AttemptFailed):
        await send(stage, WANTS_TO_KNOW, WANTS_TO_KNOW, WANTS_TO_KNOW)
    assert set(stage.judged) == {""}


async def test_a_daemon_that_refuses_what_we_advertise_is_left_out() -> None:
    """It asked, was told, and found us wanting: it need not be told again by the next call."""
    stage = Stage(capabilities())

    async def refuse(**_: object) -> DaemonCapabilities:
        raise AttemptFailed(REFUSED)

    stage.daemon.advertise = refuse  # type: ignore[method-assign]
    with pytest.raises(AttemptFailed) as caught:
        await send(stage, replace(WANTS_TO_KNOW, applied="maybe"))
    assert stage.judged == ["it refused this client before: too old for it"]
    assert caught.value.fault.applied == "maybe"


async def test_what_may_have_been_done_before_a_daemon_wants_to_know_us_stays_so() -> None:
    """A refusal of the repeat says nothing of the request that was lost."""
    stage = Stage(capabilities())
    with pytest.raises(AttemptFailed) as caught:
        await send(stage, replace(WANTS_TO_KNOW, applied="maybe"), Fault(FaultKind.REJECTED, URL, "no", "no"))
    assert caught.value.fault.applied == "maybe"


@pytest.mark.requirement("IMP-10")
async def test_a_daemon_that_refuses_us_is_left_out() -> None:
    """With what it says of us; other faults are none of this module's business."""
    stage = Stage(capabilities())
    with pytest.raises(AttemptFailed):
        await send(stage, Fault(FaultKind.UNREACHABLE, URL, "down", "no"))
    assert stage.judged == []
    with pytest.raises(AttemptFailed):
        await send(stage, REFUSED)
    told = "it refused this client before: too old for it"
    assert stage.judged == [told]
    fault = await fault_of(stage)
    assert (fault.message, fault.unmet) == (told, REFUSED.unmet)


async def test_a_probe_takes_a_document_that_cannot_be_read_for_a_sign_of_life() -> None:
    """Any other fault is told."""
    until = asyncio.get_running_loop().time() + 5
    assert await Stage(FaultKind.MALFORMED).negotiator.probe(0, until=until) is None
    assert await Stage(capabilities()).negotiator.probe(0, until=until) is None
    fault = await Stage(FaultKind.TIMED_OUT).negotiator.probe(0, until=until)
    assert fault is not None
    assert fault.kind is FaultKind.TIMED_OUT


async def test_a_look_asks_anew_and_what_is_settled_is_not_asked() -> None:
    """Both tell `started`."""
    stage = Stage(capabilities("a"))
    told: list[str] = []
    until = asyncio.get_running_loop().time() + 5
    for _ in range(2):
        found = await stage.negotiator.settled(
            stage.daemon, until=until, deadline=until, started=lambda: told.append("settled")
        )
        assert found.supports("a")
    assert (told, len(stage.daemon.asked)) == (["settled"], 1)
    await stage.negotiator.look(stage.daemon, until=until, deadline=until)
    assert len(stage.daemon.asked) == 2


async def test_an_extension_is_used_only_where_it_is_advertised() -> None:
    """Nothing is posted elsewhere."""
    stage = Stage(capabilities("semver.resolve"))
    until = asyncio.get_running_loop().time() + 5
    for capability, works in (("semver.resolve", True), ("cache.hotswap", False)):
        request = ResolveRequest(spec="a@*")
        ask = stage.negotiator.asking(capability, "/path", request, ResolveReply)
        if works:
            found = await ask(stage.daemon, until=until, deadline=until, started=lambda: None)
            assert found.resolved == "a@1.0.0"
        else:
            with pytest.raises(AttemptFailed, match="does not advertise"):
                await ask(stage.daemon, until=until, deadline=until, started=lambda: None)
    assert stage.daemon.posted == [("/path", request)]
    doubted = stage.negotiator.asking("semver.resolve", "/path", None, ResolveReply, doubt=lambda _: "as told")
    with pytest.raises(AttemptFailed, match="its answer is not to what was asked: as told") as caught:
        await doubted(stage.daemon, until=until, deadline=until, started=lambda: None)
    assert (caught.value.fault.kind, caught.value.fault.applied) == (FaultKind.MALFORMED, "maybe")


async def test_those_that_are_left_out_can_be_asked_at_once() -> None:
    """And waited for; without any, nothing is asked."""
    stage = Stage(capabilities(), capabilities("cache.bust.tag", digest="sha256:2"), requires=NEEDY)
    await stage.negotiator.ask_again()
    assert stage.daemon.asked == []
    await fault_of(stage)
    assert stage.negotiator.misfit(stage.daemon)
    await stage.negotiator.ask_again()
    assert not stage.negotiator.misfit(stage.daemon)


def test_what_we_advertise_has_a_digest() -> None:
    """Which every request carries."""
    assert advertised_digest().startswith("sha256:")


# As a caller sees it

TAG = "cache.bust.tag"


@pytest.mark.requirement("IMP-10")
@pytest.mark.requirement("IMP-07")
async def test_a_bust_goes_to_a_daemon_that_fits() -> None:
    """The first call finds that out and is a success after a fault; the next ones are clean."""
    async with FakeDaemon() as hub, FakeDaemon(capabilities=[TAG]) as peer:
        async with BustcallClient(hub.url, peers=[peer.url], probes=None, requires=NEEDY) as client:
            first = await client.bust("a")
            assert (first.status, first.stage, first.daemon) == ("busted", 9, peer.url)
            assert [cause.kind for cause in first.causes] == [FaultKind.INCOMPATIBLE]
            second = await client.bust("b")
            assert (second.stage, second.daemon) == (12, peer.url)
            view = client.topology()
            assert "capability cache.bust.tag is missing" in view.daemons[0].misfit
            assert (view.daemons[0].down, view.daemons[1].misfit, view.order[0]) == (True, "", peer.url)
        assert hub.requests == []


@pytest.mark.requirement("IMP-10")
async def test_a_daemon_is_let_in_again_when_it_fits() -> None:
    """A probe sees that its document has changed."""
    async with FakeDaemon() as hub:
        async with BustcallClient(hub.url, probes=Probes(hub=0.02), requires=NEEDY) as client:
            with pytest.raises(IncompatibleDaemon, match=r"capability cache\.bust\.tag is missing") as caught:
                await client.bust("a")
            assert (caught.value.applied, caught.value.stage, hub.requests) == ("no", 3, [])
            hub.advertises = {"capabilities": ["cache.bust", TAG]}
            await eventually(lambda: not client.topology().daemons[0].misfit)
            assert (await client.bust("a")).stage == 12


@pytest.mark.requirement("IMP-10")
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--require-semverx", ">=99", "does not match >=99"),
        ("--require-capability", "cache.telepathy", "capability cache.telepathy is missing"),
    ],
)
async def test_a_daemon_refuses_a_client_that_lacks_what_it_requires(
    start_daemon: StartDaemon, option: str, value: str, says: str
) -> None:
    """The error names it; asking for the status stays allowed, and the daemon remembers the refusal."""
    process = start_daemon(option, value)
    (process.root / "a").write_text("old")
    async with BustcallClient(process.url) as client:
        with pytest.raises(IncompatibleDaemon) as caught:
            await client.bust("a")
        assert says in str(caught.value)
        assert says in caught.value.causes[0].unmet[0]
        assert (process.root / "a").exists()
        assert any(says in record.message for record in (await client.status()).fault_history)
        assert (await client.capabilities()).document is not None


@pytest.mark.requirement("IMP-10")
async def test_a_daemon_that_requires_what_we_have_is_told_and_busts(start_daemon: StartDaemon) -> None:
    """Once: it remembers our document by its digest. No fault is told of that."""
    process = start_daemon("--require-capability", "cache.bust", "--require-semverx", ">=0.1")
    async with BustcallClient(process.url) as client:
        for name in ("a", "b"):
            (process.root / name).write_text("old")
            assert (await client.bust(name)).stage == 12
            assert not (process.root / name).exists()


async def test_a_key_is_left_out_where_it_is_known_that_nobody_reads_it() -> None:
    """Sent while that is not known: a key that came too late would protect nothing."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, probes=None) as client:
        await client.bust("a")
        assert not await client.supports("cache.bust.idempotent")
        await client.bust("a")
        assert ["Idempotency-Key" in headers for headers in fake.headers] == [True, False]


async def test_every_request_tells_what_we_can_do() -> None:
    """By the digest of our document."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        await client.bust("a")
        assert fake.headers[0]["Bustcall-Capabilities"] == advertised_digest()


async def test_a_document_is_fetched_once_and_revalidated_cheaply() -> None:
    """What is supported is asked once; who asks for the capabilities gets a 304, and what is known."""
    async with FakeDaemon(capabilities=[TAG]) as fake, BustcallClient(fake.url, probes=None) as client:
        for _ in range(3):
            assert await client.supports(TAG)
            assert not await client.supports("cache.bust.prefix")
        assert fake.probes == 1
        first = await client.capabilities()
        assert await client.capabilities() is first
        assert fake.probes == 3
        with pytest.raises(InvalidRequest):
            await client.supports("")


def test_what_is_known_is_shared_by_all_event_loops(start_daemon: StartDaemon) -> None:
    """A script that runs loop after loop asks once; a misfit stays one."""
    url = start_daemon().url
    client = BustcallClient(url, probes=None)
    for _ in range(3):
        assert asyncio.run(client.supports("cache.hotswap"))
    assert client.statistics().pool.granted == 1
    needy = BustcallClient(url, probes=None, requires=Requirements(semverx=">=99"))
    for _ in range(3):
        assert asyncio.run(needy.bust("a", fault_tolerance=12)).status == "failed"
    assert needy.statistics().pool.granted == 1


async def test_an_answer_that_shows_a_change_has_the_document_fetched() -> None:
    """In the background, without a probe."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, probes=None) as client:
        assert not await client.supports(TAG)
        fake.advertises = {"capabilities": ["cache.bust", TAG]}
        async with asyncio.timeout(PATIENCE):
            while fake.probes < 2:  # at most one question a second comes of answers
                await client.bust("a")
                await asyncio.sleep(0.01)
        assert await client.supports(TAG)
        assert fake.probes == 2


async def test_a_daemon_that_does_not_fit_is_owed_what_was_meant_for_all(tmp_path: Path) -> None:
    """It is passed over at once; with an outbox it gets the bust when it fits."""
    async with FakeDaemon(capabilities=[TAG]) as hub, FakeDaemon() as peer:
        async with BustcallClient(
            hub.url, peers=[peer.url], probes=None, requires=NEEDY, delivery="all", outbox=tmp_path / "o.db"
        ) as client:
            for _ in range(2):
                result = await client.bust("a")
                assert result.status == "partial"
                owed = result.deliveries[1]
                assert (owed.status, owed.error and owed.error.kind) == ("owed", FaultKind.INCOMPATIBLE)
        assert peer.requests == []


async def test_a_bust_for_a_lone_misfit_is_kept(tmp_path: Path) -> None:
    """Deferred, and told why: it is delivered when client and daemon fit."""
    async with FakeDaemon() as fake:
        async with BustcallClient(fake.url, probes=None, requires=NEEDY, outbox=tmp_path / "o.db") as client:
            for _ in range(2):
                result = await client.bust("a")
                assert (result.status, result.applied) == ("deferred", "no")
                assert {cause.kind for cause in result.causes} == {FaultKind.INCOMPATIBLE}
        assert fake.requests == []


async def test_a_replay_asks_first_whether_a_misfit_fits_by_now(tmp_path: Path) -> None:
    """Whatever it was waiting for: what was owed is delivered."""
    async with FakeDaemon() as fake:
        path = tmp_path / "o.db"
        async with BustcallClient(fake.url, probes=None, requires=NEEDY, outbox=path, retry=None) as client:
            assert (await client.bust("a")).status == "deferred"
            assert (await client.outbox.replay()).left == 1
            fake.advertises = {"capabilities": ["cache.bust", TAG]}
            assert (await client.outbox.replay()).ok
        assert [request.target for request in fake.applied] == ["a"]


async def test_a_misfit_supports_nothing() -> None:
    """Whatever it advertises: nothing can be used of it."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, probes=None, requires=NEEDY) as client:
        assert not await client.supports("cache.bust")


async def test_warming_up_learns_what_daemons_can_do() -> None:
    """So that nobody asks again."""
    async with FakeDaemon(capabilities=[TAG]) as fake, BustcallClient(fake.url, probes=None) as client:
        await client.warm_up(3)
        asked = fake.probes
        assert await client.supports(TAG)
        assert fake.probes == asked


@pytest.mark.parametrize("requires", [{"semverx": ">=1"}, Requirements(semverx=">>1"), ">=1"])
def test_requirements_that_cannot_be_checked_are_refused(requires: object) -> None:
    """Where the client is made."""
    with pytest.raises(ConfigurationError) as caught:
        BustcallClient(requires=requires)  # type: ignore[arg-type]
    assert caught.value.setting == "requires"
