"""Hot swaps as a caller sees them: what can be sent, at which daemon it is done, and how a refusal reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from pybustcall import (
    BustcallClient,
    BustRejected,
    DaemonsUnavailable,
    DeadlineExceeded,
    Dependency,
    IncompatibleDaemon,
    InvalidRequest,
    ProtocolViolation,
    Requirements,
    Resolution,
    Retry,
    SemverX,
    Swap,
)
from pybustcall.faults import FaultKind
from pybustcall.hotswap import (
    announce_request,
    at_one,
    check_name,
    check_spec,
    check_version,
    doubt_dependency,
    doubt_registration,
    doubt_resolution,
    doubt_swap,
    register_request,
    swap_request,
)
from pybustcall.models import (
    DependencyReply,
    HotSwapReply,
    RegisterReply,
    ResolveReply,
    ResolveRequest,
    Swapped,
    cache_key_of,
)
from pybustcall.testing import Answer, FakeDaemon
from tests.conftest import StartDaemon, virtual_time
from tests.scripted import NEVER, Scripted, daemon

pytestmark = pytest.mark.requirement("IMP-12")

HUB, PEER = "http://10.0.0.1", "http://10.0.0.2"


# What can be sent


@pytest.mark.parametrize(
    ("swaps", "field"),
    [
        ([], "swaps"),
        (7, "swaps"),
        (Swap("a", "1.0.0"), "swaps"),
        (["a"], "swaps[0]"),
        ([Swap("a", "1.0.0"), Swap("a", "2.0.0")], "swaps"),
        ([Swap(f"n{number}", "1.0.0") for number in range(65)], "swaps"),
        ([Swap("", "1.0.0")], "swaps[0].name"),
        ([Swap("a b", "1.0.0")], "swaps[0].name"),
        ([Swap("a@1", "1.0.0")], "swaps[0].name"),
        ([Swap(7, "1.0.0")], "swaps[0].name"),  # type: ignore[arg-type]
        ([Swap("a", "1.0")], "swaps[0].to"),
        ([Swap("a", "1.0.0"), Swap("b", "^1.0.0")], "swaps[1].to"),
        ([Swap("a", 1)], "swaps[0].to"),  # type: ignore[arg-type]
        ([Swap("a", "1.0.0", from_="x")], "swaps[0].from_"),
        ([Swap("a", "1.0.0", migrate=1)], "swaps[0].migrate"),  # type: ignore[arg-type]
    ],
)
async def test_what_cannot_be_sent_is_refused_before_anything_is(swaps: Any, field: str) -> None:
    """Naming which, and what of it."""
    async with BustcallClient("http://127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match="nothing was sent") as caught:
            await client.hot_swap(swaps)
        assert caught.value.field == field
        assert client.statistics().attempts == 0


def test_a_request_says_what_the_swaps_say() -> None:
    """Versions may be given as such; what opts in is sent, `from` only if it was given."""
    request = swap_request([Swap("@scope/a", SemverX.parse("v2.0.0"), from_="1.9.0", migrate=True)])  # type: ignore[arg-type]
    (item,) = request.swaps
    assert item.model_dump(by_alias=True, exclude_defaults=True) == {
        "name": "@scope/a",
        "to": "2.0.0",
        "from": "1.9.0",
        "migrate": True,
    }
    assert swap_request(Swap(name, "1.0.0") for name in "ab").swaps[1].name == "b"


def test_names_versions_and_specs_are_checked_where_they_enter() -> None:
    """And come out as they went in."""
    assert check_name("@scope/pricing-model", "name") == "@scope/pricing-model"
    assert check_version("v1.2.3-rc.1", "version") == "v1.2.3-rc.1"
    assert check_spec("@scope/name@^1") == "@scope/name@^1"
    for bad in ("a@^", "", 7):
        with pytest.raises(InvalidRequest) as caught:
            check_spec(bad)
        assert caught.value.field == "spec"


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.announce("a", []), "versions"),
        (lambda client: client.announce("a", ["1.0.0"] * 257), "versions"),
        (lambda client: client.announce("a", 5), "versions"),
        (lambda client: client.announce("a", None), "versions"),
        (lambda client: client.announce("a", ["1.0.0", "x"]), "versions[1]"),
        (lambda client: client.announce("a b", "1.0.0"), "name"),
        (lambda client: client.announce("a", "1.0.0", current="x"), "current"),
        (lambda client: client.register("page", "model"), "depends_on"),
        (lambda client: client.register("page", None), "depends_on"),
        (lambda client: client.register("page", ["a"] * 257), "depends_on"),
        (lambda client: client.register("page", ["a", ""]), "depends_on[1]"),
        (lambda client: client.register("", ["a"]), "key"),
        (lambda client: client.register(7), "key"),
        (lambda client: client.resolve("a@^"), "spec"),
    ],
)
async def test_what_cannot_be_announced_registered_or_resolved_is_refused(call: Any, field: str) -> None:
    """A lone name in place of a list, above all: its letters would be registered."""
    async with BustcallClient("http://127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match="nothing was sent") as caught:
            await call(client)
        assert caught.value.field == field


ALL = ("cache.dependencies", "semver.resolve", "cache.hotswap", "cache.register")


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ({"committed": False}, "nothing was committed"),
        ({"committed": True, "swaps": [{"name": "b", "from": "1.0.0", "to": "1.1.0"}]}, "other swaps"),
        ({"committed": True, "swaps": [{"name": "a", "from": "1.0.0", "to": "1.2.0"}]}, "other swaps"),
        ({"committed": True, "swaps": [{"name": "a", "from": "1.0.0", "to": "x"}]}, "other swaps"),
    ],
)
async def test_a_reply_that_does_not_tell_of_the_swap_is_no_success(reply: dict[str, object], why: str) -> None:
    """A protocol violation; whether it was done is not known, so nobody else is asked."""
    async with FakeDaemon(capabilities=ALL) as hub, FakeDaemon(capabilities=ALL) as peer:
        hub.swap_plan.append(Answer(body=json.dumps(reply).encode()))
        async with BustcallClient(hub.url, peers=[peer.url], retry=None) as client:
            for daemon in (hub.url, peer.url):
                await client.announce("a", "1.0.0", daemon=daemon)
            with pytest.raises(ProtocolViolation, match=why) as caught:
                await client.hot_swap([Swap("a", "1.1.0")], idempotency_key="k-7")
            assert caught.value.applied == "maybe"
            assert "Ask that daemon again, with idempotency_key='k-7'" in str(caught.value)
        assert peer.swaps == []


def test_a_reply_may_spell_versions_otherwise() -> None:
    """And leave the swaps out."""
    request = swap_request([Swap("a", "v1.1.0")])
    swapped = Swapped.model_validate({"name": "a", "from": "1.0.0", "to": "1.stable.1.stable.0.stable"})
    assert doubt_swap(request, HotSwapReply(committed=True, swaps=(swapped,))) == ""
    assert doubt_swap(request, HotSwapReply(committed=True)) == ""


@pytest.mark.parametrize(
    ("resolved", "version", "why"),
    [
        ("a@1.2.0", "1.2.0", ""),
        ("b@1.2.0", "1.2.0", "another spec"),
        ("a@2.0.0", "2.0.0", "another spec"),
        ("a@1.2.0", "1.3.0", "another spec"),
        ("a@x", "x", "its version is none"),
    ],
)
def test_a_resolution_must_be_of_the_spec(resolved: str, version: str, why: str) -> None:
    """Its name, and a version in its range."""
    reply = ResolveReply(spec="a@^1", resolved=resolved, version=version, state="stable")
    assert why in doubt_resolution(ResolveRequest(spec="a@^1"), reply)
    assert bool(why) == bool(doubt_resolution(ResolveRequest(spec="a@^1"), reply))


def test_a_dependency_and_an_entry_must_be_those_that_were_told() -> None:
    """By name and versions, by the hash of the key."""
    asked = announce_request("a", "1.0.0", None)
    assert doubt_dependency(asked, DependencyReply(name="a", current="1.0.0", versions=("1.0.0", "2.0.0"))) == ""
    for name, version in (("b", "1.0.0"), ("a", "2.0.0"), ("a", "x")):
        assert doubt_dependency(asked, DependencyReply(name=name, current=version, versions=(version,)))
    entry = register_request("page", ["a"])
    assert doubt_registration(entry, RegisterReply(cache_key=cache_key_of("page"))) == ""
    assert doubt_registration(entry, RegisterReply(cache_key=cache_key_of("other")))


# At which daemon


async def swap_at(*daemons: Scripted, timeout: float = 5.0, retry: Retry | None = None) -> tuple[Any, Any]:
    """Have something done at one of the scripted daemons, the first of them the hub."""

    async def ask(one: Scripted, /, *, until: float, deadline: float, started: Callable[[], None]) -> str:
        return await one.answer(until, started)

    deadline = asyncio.get_running_loop().time() + timeout
    return await at_one(ask, daemons, client_id="me", deadline=deadline, retry=retry, random=lambda: 0.5)


@virtual_time
async def test_it_is_done_at_the_hub() -> None:
    """And nowhere else."""
    hub, peer = daemon(HUB, (0.1, "done")), daemon(PEER, (0, "done"))
    receipt, causes = await swap_at(hub, peer)
    assert (receipt.reply, receipt.daemon, causes, peer.asked) == ("done", hub, (), [])


@virtual_time
async def test_the_next_daemon_does_it_if_the_hub_surely_has_not() -> None:
    """A refused connection, a hub that does not advertise it: told as causes."""
    for kind in (FaultKind.UNREACHABLE, FaultKind.INCOMPATIBLE):
        hub, peer = daemon(HUB, (0, kind)), daemon(PEER, (0, "done"))
        receipt, causes = await swap_at(hub, peer)
        assert (receipt.reply, receipt.daemon) == ("done", peer)
        assert [cause.kind for cause in causes] == [kind]


@virtual_time
async def test_a_hub_that_may_have_done_it_is_asked_again_and_no_other() -> None:
    """With the same key, which its registry answers by; a second daemon might do it a second time."""
    hub, peer = daemon(HUB, (NEVER, "late"), (0, "done")), daemon(PEER, (0, "done"))
    receipt, causes = await swap_at(hub, peer, timeout=20, retry=Retry())
    assert (receipt.reply, receipt.daemon, peer.asked) == ("done", hub, [])
    assert [cause.kind for cause in causes] == [FaultKind.TIMED_OUT]
    hub = daemon(HUB, (NEVER, "late"))
    receipt, causes = await swap_at(hub, peer, timeout=20, retry=Retry())
    assert (receipt.reply, peer.asked) == (None, [])
    assert len(hub.asked) > 1


@virtual_time
async def test_a_refusal_ends_it() -> None:
    """Every other daemon would refuse as well."""
    hub, peer = daemon(HUB, (0, FaultKind.REJECTED)), daemon(PEER, (0, "done"))
    receipt, _ = await swap_at(hub, peer)
    assert (receipt.ending, peer.asked) == ("halted", [])


@virtual_time
async def test_the_hub_gets_half_of_the_time_if_there_is_another() -> None:
    """One that cannot be reached at all leaves time for the next."""
    hub, peer = daemon(HUB, (0, FaultKind.UNREACHABLE)), daemon(PEER, (0, "done"))
    receipt, _ = await swap_at(hub, peer, timeout=2.0, retry=Retry(attempts=100, base=0.2))
    assert len(hub.asked) > 2
    assert receipt.daemon is peer
    assert peer.asked[0] - hub.asked[0] <= 1.1


# Against the reference daemon


async def test_dependencies_are_announced_resolved_and_swapped(start_daemon: StartDaemon) -> None:
    """What depends on them goes; what does not stays."""
    process = start_daemon()
    for name in ("page.html", "page.html.gz", "other.html"):
        (process.root / name).write_text("old")
    async with BustcallClient(process.url) as client:
        known = await client.announce("pricing-model", ["2.1.0", "2.2.0-rc.1"])
        assert known == Dependency("pricing-model", "2.1.0", ("2.1.0", "2.2.0-rc.1"), process.url)
        assert await client.register("page.html", ["pricing-model"]) == process.url
        await client.register("other.html", ["other-model"])
        assert await client.dependencies() == (known,)
        assert await client.resolve("pricing-model@^2.0.0") == Resolution(
            "pricing-model@^2.0.0", "pricing-model@2.1.0", SemverX.parse("2.1.0"), "stable", process.url
        )
        result = await client.hot_swap([Swap("pricing-model", to="2.2.0")], idempotency_key="k")
        assert result.swaps == (Swap("pricing-model", to="2.2.0", from_="2.1.0"),)
        assert (result.busted, result.daemon, result.stage, result.causes, result.key) == (2, process.url, 12, (), "k")
        assert sorted(path.name for path in process.root.iterdir()) == ["other.html"]
        assert (await client.resolve("pricing-model@*")).version == SemverX.parse("2.2.0")


async def test_a_swap_that_the_rules_refuse_changes_nothing(start_daemon: StartDaemon) -> None:
    """All or none; every reason is told, in the text and as data."""
    process = start_daemon()
    (process.root / "page.html").write_text("old")
    async with BustcallClient(process.url) as client:
        await client.announce("a", "1.0.0")
        await client.announce("b", "1.0.0")
        await client.register("page.html", ["a"])
        with pytest.raises(BustRejected, match="the hot swap of a, b failed") as caught:
            await client.hot_swap([Swap("a", to="1.1.0"), Swap("b", to="2.0.0")])
        error = caught.value
        assert (error.applied, error.stage, error.daemon) == ("no", 4, process.url)
        (cause,) = error.causes
        assert all(reason.startswith("b: ") for reason in cause.unmet)
        assert cause.unmet[0] in str(error)
        assert (process.root / "page.html").exists()
        assert (await client.resolve("a@*")).version == SemverX.parse("1.0.0")
        with pytest.raises(BustRejected, match=r"1\.0\.0.*or name another daemon with daemon="):
            await client.resolve("a@^9")
        with pytest.raises(BustRejected, match=r"announcing a failed .* it was not applied"):
            await client.announce("a", "2.0.0", current="2.0.0")
        with pytest.raises(BustRejected):
            await client.hot_swap([Swap("a", to="1.1.0", from_="0.9.0")])


async def test_a_dependency_that_nothing_depends_on_is_forgotten(start_daemon: StartDaemon) -> None:
    """One that is in use is not; one that is not known is forgotten already."""
    process = start_daemon()
    async with BustcallClient(process.url) as client:
        for name in ("a", "b"):
            await client.announce(name, "1.0.0")
        await client.register("page.html", ["a"])
        with pytest.raises(BustRejected, match=r"forgetting a failed .* it was not applied") as caught:
            await client.forget("a")
        assert caught.value.applied == "no"
        assert await client.forget("b") == await client.forget("b") == process.url
        assert [one.name for one in await client.dependencies()] == ["a"]


async def test_a_daemon_without_the_capability_is_not_asked(start_daemon: StartDaemon) -> None:
    """The error names what it does not advertise; it was not sent, and so not applied."""
    process = start_daemon("--access", "cache.hotswap=private")
    async with BustcallClient(process.url) as client:
        with pytest.raises(IncompatibleDaemon, match=r"it keeps cache\.hotswap private") as caught:
            await client.hot_swap([Swap("a", to="1.0.0")])
        assert caught.value.applied == "no"
        assert await client.supports("semver.resolve")
        assert not await client.supports("cache.hotswap")


async def test_nobody_there_is_told_as_of_a_bust() -> None:
    """DaemonsUnavailable, or the deadline."""
    async with BustcallClient("http://127.0.0.1:1", retry=None) as client:
        with pytest.raises(DaemonsUnavailable) as caught:
            await client.hot_swap([Swap("a", to="1.0.0")])
        assert caught.value.applied == "no"
        with pytest.raises((DaemonsUnavailable, DeadlineExceeded)):
            await client.resolve("a@*", timeout=0.05)


async def test_one_daemon_can_be_named(start_daemon: StartDaemon) -> None:
    """Registries are each daemon's own."""
    hub, peer = start_daemon(), start_daemon()
    async with BustcallClient(hub.url, peers=[peer.url]) as client:
        await client.announce("a", "1.0.0", daemon=peer.url)
        with pytest.raises(BustRejected):
            await client.resolve("a@*")
        assert (await client.resolve("a@*", daemon=peer.url)).daemon == peer.url
        assert (await client.hot_swap([Swap("a", to="1.1.0")], daemon=peer.url)).daemon == peer.url
        with pytest.raises(InvalidRequest):
            await client.hot_swap([Swap("a", to="1.2.0")], daemon="http://127.0.0.1:1")


async def test_a_disabled_client_has_nothing_to_ask() -> None:
    """A bust may be left undone; a question has no answer, and a swap must not be taken for done."""
    client = BustcallClient.disabled()
    assert not await client.supports("cache.bust")
    for call in (
        client.resolve("a@*"),
        client.announce("a", "1.0.0"),
        client.register("a"),
        client.dependencies(),
        client.forget("a"),
        client.hot_swap([Swap("a", to="1.0.0")]),
    ):
        with pytest.raises(InvalidRequest, match="disabled"):
            await call


async def test_what_the_client_requires_of_the_daemon_is_asked_of_swaps_too(start_daemon: StartDaemon) -> None:
    """Before anything is sent."""
    async with BustcallClient(start_daemon().url, requires=Requirements(semverx=">=99")) as client:
        with pytest.raises(IncompatibleDaemon, match="does not match >=99"):
            await client.hot_swap([Swap("a", to="1.0.0")])
