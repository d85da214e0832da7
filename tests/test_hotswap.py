"""Hot swaps as a caller sees them: what can be sent, at which daemon it is done, and how a refusal reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pybustcall import (
    BustcallClient,
    BustRejected,
    DaemonsUnavailable,
    DeadlineExceeded,
    IncompatibleDaemon,
    InvalidRequest,
    Requirements,
    Resolution,
    Retry,
    SemverX,
    Swap,
)
from pybustcall.faults import FaultKind
from pybustcall.hotswap import at_one, check_name, check_spec, check_version, swap_request
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
        assert (known.current, known.versions) == ("2.1.0", ("2.1.0", "2.2.0-rc.1"))
        await client.register("page.html", ["pricing-model"])
        await client.register("other.html", ["other-model"])
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
        with pytest.raises(BustRejected, match=r"1\.0\.0"):
            await client.resolve("a@^9")
        with pytest.raises(BustRejected):
            await client.hot_swap([Swap("a", to="1.1.0", from_="0.9.0")])


async def test_a_daemon_without_the_capability_is_not_asked(start_daemon: StartDaemon) -> None:
    """The error names what it does not advertise; it was not sent, and so not applied."""
    process = start_daemon("--access", "cache.hotswap=private")
    async with BustcallClient(process.url) as client:
        with pytest.raises(IncompatibleDaemon, match=r"does not advertise cache\.hotswap") as caught:
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
        client.hot_swap([Swap("a", to="1.0.0")]),
    ):
        with pytest.raises(InvalidRequest, match="disabled"):
            await call


async def test_what_the_client_requires_of_the_daemon_is_asked_of_swaps_too(start_daemon: StartDaemon) -> None:
    """Before anything is sent."""
    async with BustcallClient(start_daemon().url, requires=Requirements(semverx=">=99")) as client:
        with pytest.raises(IncompatibleDaemon, match="does not match >=99"):
            await client.hot_swap([Swap("a", to="1.0.0")])
