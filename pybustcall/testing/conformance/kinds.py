"""Kinds of busts, and how they are done: prefixes, tags, everything; soft, dry, verified, settled, in layers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from pybustcall.keys import SEPARATORS
from pybustcall.models import EVERYTHING, KINDS, Problem
from pybustcall.testing.conformance.checking import (
    IDEMPOTENT,
    LATE,
    PAUSE,
    REGISTERS,
    Check,
    Skipped,
    Unmet,
    capabilities_of,
)
from pybustcall.testing.conformance.entries import (
    busted,
    expect_count,
    expect_namespaces,
    is_held,
    namespaces,
    register,
    removed_by,
    try_register,
)
from pybustcall.testing.conformance.expecting import (
    expect,
    expect_bust,
    expect_problem,
    expect_success,
    expect_told,
    reply_of,
)
from pybustcall.testing.conformance.probe import ACCEPTED, KEY, Probe, new_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CHECKS"]

_REFUSED: Final = (400, 403, 422)  # the answers to a bust that a daemon does not do
_SETTLE: Final = 0.1  # seconds until a second bust, at first: it must not come before a registration


async def _repeats_what_was_asked(probe: Probe) -> None:
    target = probe.new_target()
    expect_told(await probe.bust(target=target, strategy="direct"), target)
    for fields in await _askable(probe):
        named = EVERYTHING if fields.get("kind") == "all" else target
        expect_told(await probe.bust(target=named, strategy="direct", **fields), named, **fields)


async def _askable(probe: Probe) -> list[dict[str, object]]:
    """Tell what can be asked of this daemon that it must repeat: each field, and all together; nothing that is wide."""
    kinds: list[dict[str, object]] = [{"kind": kind} for kind in ("prefix", "tag") if probe.offers(kind)]
    others: list[dict[str, object]] = [{name: True} for name in ("soft", "dry_run") if probe.offers(name)]
    if probe.offers("namespace") and (own := await namespaces(probe)):
        others.append({"namespace": own[0]})
    together = {name: value for fields in (*kinds, *others) for name, value in fields.items()}
    if probe.offers("all") and (apart := await _apart(probe)):
        kinds.append({"kind": "all", "confirm": True, **apart})
    return [*kinds, *others, together]


async def _claims_nothing_else(probe: Probe) -> None:
    """Ask for what is not advertised. A daemon of the base ignores a field, and a client sees it by the answer."""
    knows_kinds = any(probe.offers(kind) for kind in KINDS)
    ignored = False
    for kind in (*(kind for kind in KINDS if kind != "key" and not probe.offers(kind)), "no-such-kind"):
        target = probe.new_target()
        answer = await probe.bust(target=target, strategy="direct", kind=kind, confirm=True)
        if answer.status in _REFUSED:
            continue
        if expect_bust(answer, target).kind not in {None, "key"}:
            raise Unmet(f"it says that it did a bust of the kind {kind}, which it does not advertise")
        if knows_kinds:
            raise Unmet(f"it takes the kind {kind}, which it does not advertise, for a key; it must refuse it")
        ignored = True
    for name, value in (("soft", True), ("dry_run", True), ("namespace", "conformance")):
        if not probe.offers(name):
            target = probe.new_target()
            answer = await probe.bust(target=target, strategy="direct", **{name: value})
            if answer.status not in _REFUSED and getattr(expect_bust(answer, target), name):
                raise Unmet(f"it says that it kept to {name}, which it does not advertise")
    if ignored:
        raise Skipped("it knows no kinds: it ignores the field and does not repeat it, which clients take for a fault")


async def _refuses_what_fields_cannot_be(probe: Probe) -> None:
    wrong: dict[str, tuple[object, ...]] = {
        "soft": ("yes", 1),
        "dry_run": ("yes", 0),
        "verify": ("yes", 1),
        "settle": (-1, 3601, "soon", True),
    }
    values = {name: given for name, given in wrong.items() if probe.offers(name)}
    if any(probe.offers(kind) for kind in KINDS):
        values["kind"] = ("", "no-such-kind", 7)
    await _refuses_each(probe, values)


async def _refuses_what_is_no_namespace(probe: Probe) -> None:
    await _refuses_each(probe, {"namespace": ("", " ", "two words", ".hidden", "a/b", "é", "x" * 65, 7)})


async def _refuses_each(probe: Probe, values: Mapping[str, Sequence[object]]) -> None:
    """Expect that a bust is refused with each of these values, by the name of its field, and has no effect."""
    key = probe.new_target()
    held = await _holds_again(probe, key)
    for name, given in values.items():
        for value in given:
            try:
                expect_problem(await probe.bust(target=key, strategy="direct", **{name: value}), 422, name)
            except Unmet as unmet:
                raise Unmet(f"{name} {str(value)[:20]!r}: {unmet}") from unmet
    await _expect_held(probe, key, held, "a refused bust removed an entry")


async def _refuses_everything_unconfirmed(probe: Probe) -> None:
    apart = await _apart(probe) or {}
    where = {name: value for name, value in apart.items() if name == "namespace"}
    key = probe.new_target()
    held = await _holds_again(probe, key, **where)
    for how, fields in (
        ("without confirm", {"target": EVERYTHING}),
        ("with confirm false", {"target": EVERYTHING, "confirm": False}),
        ("with confirm 1", {"target": EVERYTHING, "confirm": 1}),
        (f"with another target than {EVERYTHING}", {"target": key, "confirm": True}),
    ):
        answer = await probe.bust(strategy="direct", kind="all", **fields, **apart)
        if answer.status in {200, ACCEPTED}:
            raise Unmet(f"everything is busted {how}: answered HTTP {answer.status}, expected 422")
        expect(answer, 422)
        field_name = reply_of(Problem, answer).field
        if field_name not in {None, "confirm", "target"}:
            raise Unmet(f"the problem of busting everything {how} names the field {field_name!r}")
    await _expect_held(probe, key, held, "a refused bust of everything removed an entry", **where)


async def _busts_everything(probe: Probe) -> None:
    own, other = await expect_namespaces(probe)
    key = probe.new_target()
    held = await is_held(probe, key, namespace=own)
    for namespace, entries in ((own, ("", "/b", "c")), (other, ("",)), (None, ("",))):
        for entry in entries:
            await register(probe, key + entry, namespace=namespace)
    reply = await busted(probe, EVERYTHING, kind="all", confirm=True, namespace=own)
    expect_count("a bust of everything in a namespace of 3 entries", "removed", reply.removed, 3, held=held)
    for namespace in (other, None):
        whose = "another namespace" if namespace else "the default namespace"
        await _expect_held(
            probe, key, held, f"a bust of everything in a namespace reached {whose}", namespace=namespace
        )


async def _busts_by_prefix(probe: Probe) -> None:
    key = probe.new_target()
    held = await is_held(probe, key)
    below = (key, *(f"{key}{mark}c" for mark in SEPARATORS), f"{key}/c/d")
    beside = (f"{key}c", f"{key}c/d", f"{key}.c", f"{key}*")
    entries = [entry for entry in (*below, *beside) if await try_register(probe, entry)]
    covered = sum(entry in below for entry in entries)
    reply = await busted(probe, key, kind="prefix")
    expect_count(f"a bust by a prefix of {covered} entries", "removed", reply.removed, covered, held=held)
    for entry in beside:
        if entry in entries:
            why = f"a bust by the prefix a/b reached a/b{entry.removeprefix(key)}, which does not lie below it"
            await _expect_held(probe, entry, held, why)
    for entry in (key, f"{key}/c"):
        await register(probe, entry)
    reply = await busted(probe, f"{key}/", kind="prefix")
    expect_count("a bust by a prefix that ends with /, of one entry", "removed", reply.removed, 1, held=held)
    await _expect_held(probe, key, held, "a bust by the prefix a/b/ reached a/b")


async def _busts_by_tag(probe: Probe) -> None:
    key = probe.new_target()
    tag, other = f"{key}/tag", f"{key}/tag/other"
    held = await is_held(probe, key)
    for entry, tags in ((f"{key}/a", (tag, other)), (f"{key}/b", (tag,)), (f"{key}/c", (other,)), (tag, ())):
        await register(probe, entry, tags=tags)
    reply = await busted(probe, tag, kind="tag")
    expect_count("a bust by a tag of 2 entries", "removed", reply.removed, 2, held=held)
    await _expect_held(probe, f"{key}/c", held, "a bust by a tag reached an entry with another")
    await _expect_held(probe, tag, held, "a bust by a tag reached the key that is called so")


async def _marks_as_stale(probe: Probe) -> None:
    key = probe.new_target()
    held = await is_held(probe, key)
    await register(probe, key)
    reply = await busted(probe, key, soft=True)
    expect_count("a soft bust of one entry", "removed", reply.removed, 1, held=held)
    await _expect_held(probe, key, held, "a soft bust removed the entry, which should be stale")


async def _keeps_namespaces_apart(probe: Probe) -> None:
    own, other = await expect_namespaces(probe)
    key = probe.new_target()
    held = await is_held(probe, key, namespace=own)
    for namespace in (own, other, None):
        await register(probe, key, namespace=namespace)
    reply = await busted(probe, key, namespace=own)
    expect_count("a bust in a namespace with one such entry", "removed", reply.removed, 1, held=held)
    await _expect_held(probe, key, held, "a bust in a namespace reached another", namespace=other)
    await _expect_held(probe, key, held, "a bust in a namespace reached the default one")


async def _removes_nothing_in_a_dry_run(probe: Probe) -> None:
    key = probe.new_target()
    tag = f"{key}/tag"
    held = await is_held(probe, key)
    asked: list[tuple[str, dict[str, object], int]] = [(key, {"strategy": "dimensional"}, 2)]
    asked += [(key, {"kind": "prefix"}, 2)] if probe.offers("prefix") else []
    asked += [(tag, {"kind": "tag"}, 1)] if probe.offers("tag") else []
    for target, fields, count in asked:
        await register(probe, key)
        await register(probe, f"{key}/page", key, tags=[tag])
        for _ in range(2):
            told = (await busted(probe, target, **fields, dry_run=True)).matched
            expect_count(f"a dry run over {count} entries", "matched", told, count, held=held)
        removed = (await busted(probe, target, **fields)).removed
        expect_count(f"the bust after a dry run over {count} entries", "removed", removed, count, held=held)
        told = (await busted(probe, target, **fields, dry_run=True)).matched
        expect_count("a dry run after the bust", "matched", told, 0, held=held)


async def _verifies(probe: Probe) -> None:
    key = probe.new_target()
    if probe.advertises(*REGISTERS):
        await register(probe, key)
    await busted(probe, key, verify=True)


async def _tells_when_it_settles(probe: Probe) -> None:
    for seconds in (0, 0.5):
        target = probe.new_target()
        answer = await probe.bust(target=target, strategy="direct", settle=seconds)
        reply = expect_told(answer, target, settle=seconds)
        if reply.accepted or not reply.layers:
            raise Skipped("it tells nothing of its layers")
        told = {layer.settle or 0 for layer in reply.layers}
        if seconds not in told or (seconds == 0 and len(told) > 1):
            found = ", ".join(f"{layer.name} {layer.settle or 0:g}" for layer in reply.layers)
            raise Unmet(f"a bust with settle {seconds:g} is told to settle otherwise ({found})")


async def _busts_again(probe: Probe) -> None:
    held = await is_held(probe, probe.new_target())
    if not held:
        raise Skipped("not decided: the cache does not hold what is only registered")
    clock = asyncio.get_running_loop().time
    wait = _SETTLE
    while True:
        key, begun = probe.new_target(), clock()
        await busted(probe, key, settle=wait)
        await register(probe, key)
        if clock() - begun < wait:  # so that it was stored before the second bust
            break
        wait *= 2
        if wait > LATE:
            raise Skipped(f"not decided: two requests take it more than {LATE:g} s")
    while (await busted(probe, key, dry_run=True)).matched:
        if clock() - begun > wait + LATE:
            raise Unmet(f"what was stored before the second bust was due is still there {LATE:g} s after it")
        await asyncio.sleep(PAUSE)


async def _tells_its_layers(probe: Probe) -> None:
    target = probe.new_target()
    reply = expect_bust(await probe.bust(target=target, strategy="direct"), target)
    if not reply.layers:
        raise Skipped("it tells nothing of its layers")
    names = [layer.name for layer in reply.layers]
    if len(set(names)) < len(names) or "" in names:
        raise Unmet(f"it has two layers of one name, or one without a name: {', '.join(names)}")
    failed = [layer for layer in reply.layers if not layer.ok]
    if failed and not reply.accepted:
        raise Unmet(f"it answers HTTP 200 to a bust that failed in the layer {failed[0].name}")
    if any(not layer.error for layer in failed):
        raise Unmet("a layer failed, and does not say why in error")
    total = sum(layer.removed for layer in reply.layers)
    if reply.removed is not None and reply.removed != total:
        raise Unmet(f"removed is {reply.removed}, and of its layers together {total}")


async def _refuses_a_key_of_another_kind(probe: Probe) -> None:
    key, target = new_key(), probe.new_target()
    expect_success(await probe.bust_once(key, target=target, strategy="direct"))
    asked: list[dict[str, object]] = [{"kind": kind} for kind in ("prefix", "tag") if probe.offers(kind)]
    asked += [{"soft": True}] if probe.offers("soft") else []
    asked += [{"namespace": name} for name in (await namespaces(probe))[:1]] if probe.offers("namespace") else []
    for fields in asked:
        try:
            expect_problem(await probe.bust_once(key, target=target, strategy="direct", **fields), 422, KEY)
        except Unmet as unmet:
            raise Unmet(f"the key of a plain bust with another {next(iter(fields))}: {unmet}") from unmet


async def _holds_again(probe: Probe, key: str, **where: Any) -> bool:
    """Register an entry, if that is possible; tell whether the cache holds it, as far as it tells."""
    if not probe.advertises(*REGISTERS):
        return False
    held = await is_held(probe, key, **where)
    await register(probe, key, **where)
    return held


async def _expect_held(probe: Probe, key: str, held: bool, why: str, **where: Any) -> None:
    """Expect that an entry is still there, if the cache holds such; it goes now."""
    if held and await removed_by(probe, key, **where) != 1:
        raise Unmet(why)


async def _apart(probe: Probe) -> dict[str, object] | None:
    """Tell fields with which a bust of everything removes nothing of anybody else's; None if there are none."""
    if probe.offers("namespace") and (own := await namespaces(probe)):
        return {"namespace": own[0]}
    return {"dry_run": True} if probe.offers("dry_run") else None


CHECKS: Final[tuple[Check, ...]] = (
    Check(
        "refuses a key that belongs to another kind of bust",
        _refuses_a_key_of_another_kind,
        needs=(IDEMPOTENT,),
        any_of=capabilities_of("prefix", "tag", "soft", "namespace"),
    ),
    Check("tells each of its layers, and none that failed as done", _tells_its_layers),
    Check(
        "repeats the kind, the namespace, soft and dry_run as they were asked",
        _repeats_what_was_asked,
        any_of=capabilities_of("prefix", "tag", "all", "soft", "namespace", "dry_run"),
    ),
    Check("claims no kind of bust that it does not advertise", _claims_nothing_else),
    Check(
        "refuses what the fields of a bust cannot be",
        _refuses_what_fields_cannot_be,
        any_of=capabilities_of("prefix", "tag", "all", "soft", "dry_run", "verify", "settle"),
    ),
    Check(
        "refuses what is no namespace, the empty one too",
        _refuses_what_is_no_namespace,
        needs=capabilities_of("namespace"),
    ),
    Check("refuses to bust everything without confirm", _refuses_everything_unconfirmed, needs=capabilities_of("all")),
    Check(
        "busts everything in a namespace, and nothing beyond",
        _busts_everything,
        needs=(*capabilities_of("all", "namespace"), *REGISTERS),
    ),
    Check(
        "busts by prefix what lies below it, by whole segments",
        _busts_by_prefix,
        needs=(*capabilities_of("prefix"), *REGISTERS),
    ),
    Check("busts by tag what has it, and nothing else", _busts_by_tag, needs=(*capabilities_of("tag"), *REGISTERS)),
    Check(
        "marks as stale in a soft bust, and removes nothing",
        _marks_as_stale,
        needs=(*capabilities_of("soft"), *REGISTERS),
    ),
    Check("keeps namespaces apart", _keeps_namespaces_apart, needs=(*capabilities_of("namespace"), *REGISTERS)),
    Check(
        "removes nothing in a dry run, and tells what the bust then removes",
        _removes_nothing_in_a_dry_run,
        needs=(*capabilities_of("dry_run"), *REGISTERS),
    ),
    Check("says that it verified a bust", _verifies, needs=capabilities_of("verify")),
    Check("tells when it settles", _tells_when_it_settles, needs=capabilities_of("settle")),
    Check("busts again after settle", _busts_again, needs=(*capabilities_of("settle", "dry_run"), *REGISTERS)),
)
