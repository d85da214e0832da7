"""Dependencies: announced, resolved, swapped; and what depends on what is busted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pybustcall.models import DependenciesReply, DependencyReply, ForgetReply, HotSwapReply, Problem, ResolveReply
from pybustcall.testing.conformance.checking import REGISTERS, Answer, Check, Skipped, Unmet
from pybustcall.testing.conformance.entries import busted, expect_count, is_held, register, removed_by
from pybustcall.testing.conformance.expecting import expect, expect_one, expect_problem, expect_replay, reply_of
from pybustcall.testing.conformance.probe import (
    DEPENDENCIES,
    FORGET,
    HOTSWAP,
    KEY,
    MISSING,
    REPLAYED,
    RESOLVE,
    ROUNDS,
    Probe,
    new_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CHECKS", "forget", "known_dependencies"]

_KNOWS: Final = ("cache.dependencies",)
_RESOLVES: Final = ("cache.dependencies", "semver.resolve")
_SWAPS: Final = ("cache.dependencies", "cache.hotswap")


async def _announces(probe: Probe) -> None:
    name, other = probe.new_name(), probe.new_name()
    for _ in range(2):
        known = await _announce(probe, name, "1.2.0", "1.0.0", "2.0.0-rc.1")
        _expect_known(known, name, "1.2.0", "1.0.0", "1.2.0", "2.0.0-rc.1")
    known = await _announce(probe, name, "1.10.0", "v1.0.0", current="1.2.0")
    _expect_known(known, name, "1.2.0", "1.0.0", "1.2.0", "1.10.0", "2.0.0-rc.1")
    _expect_known(await _announce(probe, other, "2.0.0", current="1.0.0"), other, "1.0.0", "1.0.0", "2.0.0")
    listed = await known_dependencies(probe)
    if listed.get(name) != known or other not in listed:
        raise Unmet("what was announced is not listed as it was answered")


async def _refuses_announcements(probe: Probe) -> None:
    name = probe.new_name()
    for field_name, wrong in (
        ("name", {"name": "two words"}),
        ("versions", {"versions": []}),
        ("versions", {"versions": ["1.0.0", "one"]}),
        ("current", {"current": "one"}),
    ):
        answer = await probe.post(DEPENDENCIES, {"name": name, "versions": ["1.0.0"], **wrong})
        expect_problem(answer, 422, field_name)
    if name in await known_dependencies(probe):
        raise Unmet("a dependency is known whose announcement was refused")
    before = await _announce(probe, name, "1.0.0", "1.1.0", current="1.0.0")
    expect(await probe.post(DEPENDENCIES, {"name": name, "versions": ["1.2.0"], "current": "1.1.0"}), 409)
    if (await known_dependencies(probe)).get(name) != before:
        raise Unmet("a refused announcement changed what is known")


async def _forgets(probe: Probe) -> None:
    name, other = probe.new_name(), probe.new_name()
    for one in (name, other):
        await _announce(probe, one, "1.0.0")
    first = await _forget_first(probe, name)
    for answer in (first, await forget(probe, name)):  # what is not known is forgotten already
        expect(answer, 200)
        if reply_of(ForgetReply, answer).name != name:
            raise Unmet("it tells that it forgot another dependency")
    listed = await known_dependencies(probe)
    if name in listed or other not in listed:
        raise Unmet("a forgotten dependency is still listed, or another is not")
    _expect_known(await _announce(probe, name, "0.9.0"), name, "0.9.0", "0.9.0")
    expect_problem(await forget(probe, "two words"), 422, "name")


async def _forgets_nothing_in_use(probe: Probe) -> None:
    name, key = probe.new_name(), probe.new_target()
    before = await _announce(probe, name, "1.0.0")
    await register(probe, key, name)
    expect_problem(await _forget_first(probe, name), 409, "name")
    if (await known_dependencies(probe)).get(name) != before:
        raise Unmet("a dependency changed that could not be forgotten")
    await register(probe, key)
    expect(await forget(probe, name), 200)


async def _resolves(probe: Probe) -> None:
    name = probe.new_name()
    await _announce(probe, name, "0.9.0-legacy", "1.0.0", "1.2.0", "1.10.0", "2.0.0", "2.1.0-rc.1", current="1.0.0")
    for asked, version, state in (
        ("@^1.0.0", "1.10.0", "stable"),
        ("@1.2.x", "1.2.0", "stable"),
        ("", "2.0.0", "stable"),
        ("@latest", "2.0.0", "stable"),
        ("@<1.0.0", "0.9.0-legacy", "legacy"),
        ("@>2.0.0", "2.1.0-rc.1", "experimental"),
    ):
        answer = await probe.post(RESOLVE, {"spec": name + asked})
        expect(answer, 200)
        reply = reply_of(ResolveReply, answer)
        found = (reply.spec, reply.resolved, reply.version, reply.state)
        if found != (name + asked, f"{name}@{version}", version, state):
            raise Unmet(f"name{asked} is {reply.version} ({reply.state}), not {version} ({state})")


async def _refuses_specs(probe: Probe) -> None:
    name = probe.new_name()
    await _announce(probe, name, "1.0.0")
    for spec in (f"{name}@^2.0.0", f"{probe.new_name()}@*", f"{name}@private", "two words@*", ""):
        expect_problem(await probe.post(RESOLVE, {"spec": spec}), 422, "spec")


async def _swaps(probe: Probe) -> None:
    name, other = await _new_pair(probe)
    answer = await _swap(probe, {"name": name, "from": "1.0.0", "to": "1.1.0"}, {"name": other, "to": "1.2.0"})
    reply = _expect_swap(answer)
    told = {(swapped.name, swapped.from_, swapped.to) for swapped in reply.swaps}
    if told != {(name, "1.0.0", "1.1.0"), (other, "1.0.0", "1.2.0")}:
        raise Unmet("swaps does not tell what was replaced")
    listed = await known_dependencies(probe)
    _expect_known(listed[name], name, "1.1.0", "1.0.0", "1.1.0")
    _expect_known(listed[other], other, "1.2.0", "1.0.0", "1.1.0", "1.2.0")


async def _answers_a_repeated_swap(probe: Probe) -> None:
    name, other = await _new_pair(probe)
    key, swap = new_key(), {"name": name, "from": "1.0.0", "to": "1.1.0"}
    first = await _swap(probe, swap, key=key)
    _expect_swap(first)
    _expect_swap(await _swap(probe, {"name": name, "to": "1.0.0"}, key=new_key()))
    expect_replay(first, await _swap(probe, swap, key=key))
    await _expect_current(probe, name, "1.0.0")
    expect_problem(await _swap(probe, {"name": other, "to": "1.1.0"}, key=key), 422, KEY)
    await _expect_current(probe, other, "1.0.0")


async def _swaps_once_what_comes_at_once(probe: Probe) -> None:
    for _ in range(ROUNDS):
        name, _ = await _new_pair(probe)
        swaps = [{"name": name, "from": "1.0.0", "to": "1.1.0"}]
        expect_one(await probe.post_at_once(HOTSWAP, {"swaps": swaps}, new_key()))
        await _expect_current(probe, name, "1.1.0")


async def _remembers_no_refused_swap(probe: Probe) -> None:
    name, _ = await _new_pair(probe)
    key = new_key()
    _expect_refused(await _swap(probe, {"name": name, "to": "2.0.0"}, key=key))
    answer = await _swap(probe, {"name": name, "to": "1.1.0"}, key=key)
    _expect_swap(answer)
    if REPLAYED in answer.headers:
        raise Unmet(f"the first success of a key has {REPLAYED}")


async def _keeps_to_the_rules(probe: Probe) -> None:
    name, _ = await _new_pair(probe)
    for before, to, opted in (
        ("1.0.0", "2.0.0", None),
        ("1.0.0", "1.1.0-rc.1", "allow_experimental"),
        ("1.1.0-rc.1", "1.1.0", "validated"),
        ("1.1.0", "1.0.0-legacy", "rollback"),
        ("1.0.0-legacy", "2.0.0", "migrate"),
    ):
        _expect_refused(await _swap(probe, {"name": name, "to": to}))
        await _expect_current(probe, name, before)
        if opted is not None:
            _expect_swap(await _swap(probe, {"name": name, "to": to, opted: True}))
            await _expect_current(probe, name, to)


async def _swaps_all_or_none(probe: Probe) -> None:
    name, other = await _new_pair(probe)
    for bad in (
        {"name": other, "to": "2.0.0"},
        {"name": other, "from": "0.9.0", "to": "1.1.0"},
        {"name": probe.new_name(), "to": "1.1.0"},
    ):
        _expect_refused(await _swap(probe, {"name": name, "to": "1.1.0"}, bad))
        await _expect_current(probe, name, "1.0.0")
        await _expect_current(probe, other, "1.0.0")


async def _refuses_what_is_no_swap(probe: Probe) -> None:
    name, _ = await _new_pair(probe)
    for swaps in ([], [{"name": name}], [{"name": name, "to": "one"}], [{"name": name, "to": "1.1.0", "from": "one"}]):
        expect_problem(await probe.post(HOTSWAP, {"swaps": swaps}), 422, "swaps")
    await _expect_current(probe, name, "1.0.0")


async def _busts_dependents(probe: Probe) -> None:
    key = probe.new_target()
    await register(probe, f"{key}/page", f"{key}/part")
    await register(probe, f"{key}/whole", f"{key}/page")
    held = await is_held(probe, f"{key}/part")
    await register(probe, f"{key}/part")
    reply = await busted(probe, f"{key}/part", strategy="dimensional")
    expect_count("a bust of a target with 2 dependents", "removed", reply.removed, 3, held=held)


async def _busts_what_depends(probe: Probe) -> None:
    name, other = await _new_pair(probe)
    key = probe.new_target()
    held = await is_held(probe, f"{key}/alone")
    await register(probe, f"{key}/alone", probe.new_name())
    await register(probe, f"{key}/page", name)
    await register(probe, f"{key}/part", other, probe.new_name())
    await register(probe, f"{key}/whole", f"{key}/part")
    for versions, count in ((("1.1.0", "1.1.0"), 3), (("1.0.0", "1.0.0"), 0)):
        swaps = ({"name": swapped, "to": to} for swapped, to in zip((name, other), versions, strict=True))
        reply = _expect_swap(await _swap(probe, *swaps))
        expect_count(f"a swap of what {count} entries depend on", "busted", reply.busted, count, held=held)
    if held and await removed_by(probe, f"{key}/alone") != 1:
        raise Unmet("an entry was busted that does not depend on what was swapped")


async def _new_pair(probe: Probe) -> tuple[str, str]:
    """Announce two dependencies in versions 1.0.0, which is current, and 1.1.0."""
    names = (probe.new_name(), probe.new_name())
    for name in names:
        _expect_known(await _announce(probe, name, "1.0.0", "1.1.0", current="1.0.0"), name, "1.0.0", "1.0.0", "1.1.0")
    return names


async def _announce(probe: Probe, name: str, *versions: str, current: str | None = None) -> DependencyReply:
    said = {"name": name, "versions": versions, **({} if current is None else {"current": current})}
    answer = await probe.post(DEPENDENCIES, said)
    expect(answer, 200)
    return reply_of(DependencyReply, answer)


async def known_dependencies(probe: Probe) -> dict[str, DependencyReply]:
    """List what is announced, by name."""
    answer = await probe.send("GET", DEPENDENCIES)
    expect(answer, 200)
    return {known.name: known for known in reply_of(DependenciesReply, answer).dependencies}


async def forget(probe: Probe, name: str) -> Answer:
    """Have a dependency forgotten."""
    return await probe.post(FORGET, {"name": name})


async def _forget_first(probe: Probe, name: str) -> Answer:
    """Do the same where it is not known whether the daemon can forget at all."""
    answer = await forget(probe, name)
    if answer.status in MISSING:
        raise Skipped("it cannot forget dependencies")
    return answer


async def _swap(probe: Probe, *swaps: Mapping[str, object], key: str | None = None) -> Answer:
    return await probe.post(HOTSWAP, {"swaps": swaps}, key)


def _expect_known(known: DependencyReply, name: str, current: str, *versions: str) -> None:
    if known != DependencyReply(name=name, current=current, versions=versions):
        told = f"current {known.current}, versions {', '.join(known.versions)}"
        raise Unmet(f"a dependency is told as {told}, not as current {current}, versions {', '.join(versions)}")


def _expect_swap(answer: Answer) -> HotSwapReply:
    expect(answer, 200)
    reply = reply_of(HotSwapReply, answer)
    if not reply.committed:
        raise Unmet("a swap is answered with 200, and was not committed")
    return reply


def _expect_refused(answer: Answer) -> None:
    expect(answer, 409)
    if not reply_of(Problem, answer).unmet:
        raise Unmet("a refused swap does not say in unmet why")


async def _expect_current(probe: Probe, name: str, version: str) -> None:
    known = (await known_dependencies(probe)).get(name)
    if known is None or known.current != version:
        raise Unmet(f"the current version is {known.current if known else 'none'}, and should be {version}")


CHECKS: Final[tuple[Check, ...]] = (
    Check("busts what depends on what is busted", _busts_dependents, needs=REGISTERS),
    Check("keeps what is announced of dependencies", _announces, needs=_KNOWS),
    Check("refuses announcements that say no dependency", _refuses_announcements, needs=_KNOWS),
    Check("forgets dependencies", _forgets, needs=_KNOWS),
    Check("forgets no dependency in use", _forgets_nothing_in_use, needs=(*_KNOWS, *REGISTERS)),
    Check("resolves a spec to the best known version", _resolves, needs=_RESOLVES),
    Check("refuses specs that mean no known version", _refuses_specs, needs=_RESOLVES),
    Check("swaps dependencies", _swaps, needs=_SWAPS),
    Check("answers a repeated swap from memory", _answers_a_repeated_swap, needs=_SWAPS),
    Check("swaps once what comes with a key many times at once", _swaps_once_what_comes_at_once, needs=_SWAPS),
    Check("remembers no refused swap under a key", _remembers_no_refused_swap, needs=_SWAPS),
    Check("keeps to the rules of hot swaps", _keeps_to_the_rules, needs=_SWAPS),
    Check("swaps all or none", _swaps_all_or_none, needs=_SWAPS),
    Check("refuses what is no swap", _refuses_what_is_no_swap, needs=_SWAPS),
    Check("busts what depends on what is swapped", _busts_what_depends, needs=(*_SWAPS, *REGISTERS)),
)
