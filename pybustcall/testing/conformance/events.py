"""Events: what is told of busts, in which order, and to whom."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from pybustcall.models import DEFAULT_NAMESPACE, EVERYTHING, Problem, StreamedBust
from pybustcall.testing.conformance.checking import REGISTERS, Check, Silent, Skipped, Unmet, capabilities_of
from pybustcall.testing.conformance.entries import expect_namespaces, namespaces, register
from pybustcall.testing.conformance.expecting import expect_told, reply_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pybustcall.testing.conformance.probe import Probe
    from pybustcall.testing.conformance.reader import Stream, Told

__all__ = ["CHECKS"]

_TELLS: Final = ("events.stream",)
_LONGEST_BEAT: Final = 10.0  # seconds: a longer heartbeat is not waited for


async def _tells_of_busts(probe: Probe) -> None:
    key = probe.new_target()
    await _bust_told(probe, f"{key}/before")
    async with probe.follow(key) as stream:
        await stream.begin()
        if stream.first != "live":
            raise Unmet(f"a stream that goes on from no id begins with {stream.first}, not with live")
        heartbeat = stream.live.heartbeat if stream.live is not None else 0.0
        if not 0 < heartbeat < float("inf"):
            raise Unmet(f"the heartbeat that it says is {heartbeat:g} s")
        await _bust_told(probe, key)
        _expect_event(await stream.until(key), key)


async def _tells_in_order(probe: Probe) -> None:
    key = probe.new_target()
    names = [f"{key}/{number}" for number in range(5)]
    async with probe.follow(key) as stream, probe.follow(key) as other:
        for reader in (stream, other):
            await reader.begin()
        for name in names:
            await _bust_told(probe, name)
        for reader in (stream, other):
            await reader.until(names[-1])
            if reader.targets != names:
                raise Unmet("five busts, one after another, are told in another order, or not all")
        if _upto(stream.told, other.number) != _upto(other.told, stream.number):
            raise Unmet("two readers are told of a bust under other ids")


async def _tells_what_was_asked(probe: Probe) -> None:
    key = probe.new_target()
    own = (await namespaces(probe))[:1] if probe.offers("namespace") else ()
    asked: list[dict[str, object]] = [{"kind": kind} for kind in ("prefix", "tag") if probe.offers(kind)]
    asked += [{"soft": True}] if probe.offers("soft") else []
    asked += [{"strategy": strategy} for strategy in ("direct", "dimensional")]
    for namespace in (None, *own):
        where: dict[str, object] = {} if namespace is None else {"namespace": namespace}
        wanted = () if namespace is None else (("namespace", namespace),)
        async with probe.follow(key, *wanted) as stream:
            await stream.begin()
            for number, fields in enumerate(asked):
                await _bust_told(probe, f"{key}/{number}", **fields, **where)
                _expect_event(await stream.until(f"{key}/{number}"), f"{key}/{number}", **fields, **where)
            if namespace and probe.offers("all"):
                await _bust_told(probe, EVERYTHING, kind="all", confirm=True, **where)
                _expect_event(await stream.until(EVERYTHING), EVERYTHING, kind="all", **where)


async def _tells_what_was_missed(probe: Probe) -> None:
    key = probe.new_target()
    names = [f"{key}/{number}" for number in range(4)]
    async with probe.follow(key) as staying:
        await staying.begin()
        async with probe.follow(key) as going:
            await going.begin()
            await _bust_told(probe, names[0])
            await going.until(names[0])
        for name in names[1:]:
            await _bust_told(probe, name)
        await staying.until(names[-1])
        since = [told for told in staying.told if told.number > going.number]
        async with probe.follow(key, after=going.place) as back:
            await back.begin()
        if (back.epoch, _upto(back.missed, staying.number)) != (staying.epoch, since):
            told, count = len(_upto(back.missed, staying.number)), len(since)
            raise Unmet(
                f"who comes back is told {told} of {count} events that were missed before it is live, or others"
            )
        async with probe.follow(key, after=staying.place) as back:
            await back.begin()
            await _bust_told(probe, key)
            await back.until(key)
        if _upto(back.missed, staying.number):
            raise Unmet("who comes back and has missed nothing is told again what was told")


async def _has_forgotten(probe: Probe) -> None:
    key = probe.new_target()
    async with probe.follow(key) as reader:
        await reader.begin()
        await _bust_told(probe, f"{key}/before")
        await reader.until(f"{key}/before")
    epoch, number = reader.epoch, reader.number
    for what, place in (
        ("of another epoch", f"{secrets.token_hex(8)}-{number}"),
        ("that was never given", f"{epoch}-{number + 10**15}"),
        ("that is none", "nonsense"),
        ("with a number that is none", f"{epoch}-{number}x"),
    ):
        async with probe.follow(key, after=place) as back:
            try:
                await back.begin(forgets=True)
            except Unmet as unmet:
                raise Unmet(f"after an id {what}: {unmet}") from unmet
            if back.missed or key in (back.reset or ""):
                raise Unmet(f"after an id {what} a reset tells what was busted")
            if (back.epoch, back.reset_at >= number) != (epoch, True):
                raise Unmet(f"after an id {what} a reset has another id than the newest event")
            await _bust_told(probe, key)
            await back.until(key)


async def _filters_by_prefix(probe: Probe) -> None:
    key = probe.new_target()
    direct, wide = {"strategy": "direct"}, {"strategy": "dimensional"}
    through = {f"{key}/{name}": direct for name in ("a", "a/", "a/b", "a:b", "a?b", "a#b", "z/y")}
    without = {f"{key}/{name}": direct for name in ("ab", "ab/c", "a.gz", "z", "A/b", "b/a", "a*")}
    if probe.offers("prefix"):
        through[key] = {"kind": "prefix"}
        without[f"{key}/b"] = {"kind": "prefix"}
    if probe.offers("tag"):
        without[f"{key}/a/c"] = {"kind": "tag"}
    await _expect_filtered(probe, key, (("prefix", f"{key}/a"), ("prefix", f"{key}/z/")), through, without)
    key = probe.new_target()
    through = {f"{key}/a.css": wide, f"{key}/b.css": wide, f"{key}/c.css.gz": direct}
    without = {f"{key}/a": wide, f"{key}/b": wide, f"{key}/c.css": direct, f"{key}/d.css": direct}
    variants = ("a.css?v=1", "b.css.gz", "c.css.gz", "d.css?v=1")
    await _expect_filtered(probe, key, [("prefix", f"{key}/{name}") for name in variants], through, without)


async def _filters_by_tag(probe: Probe) -> None:
    key = probe.new_target()
    tag, direct = {"kind": "tag"}, {"strategy": "direct"}
    wanted = (("tag", f"{key}/t"), ("tag", f"{key}/u"), ("prefix", f"{key}/p"))
    through = {f"{key}/p": direct, f"{key}/t": tag, f"{key}/u": tag}
    without = {f"{key}/t/a": tag, f"{key}/v": tag, f"{key}/p/q": tag, f"{key}/u/a": direct}
    await _expect_filtered(probe, key, wanted, through, without)
    if probe.advertises(*REGISTERS):
        entry, held_by = f"{key}/held/entry", f"{key}/held-by"
        async with probe.follow(key, ("prefix", f"{key}/held")) as stream:
            await stream.begin()
            await register(probe, entry, tags=[held_by])
            await _bust_told(probe, held_by, **tag)
            try:
                await stream.until(held_by)
            except Silent as silent:
                raise Unmet("the bust of a tag is not told to who wants the prefix of an entry with it") from silent
        async with probe.follow(key, ("tag", held_by)) as stream:
            await stream.begin()
            await register(probe, entry, tags=[held_by])
            await _bust_told(probe, entry)
            try:
                await stream.until(entry)
            except Silent as silent:
                raise Unmet("the bust of a registered entry is not told to who wants its tag") from silent


async def _tells_namespaces_apart(probe: Probe) -> None:
    own, other = await expect_namespaces(probe)
    key = probe.new_target()
    async with (
        probe.follow(key, ("namespace", own)) as one,
        probe.follow(key, ("namespace", other)) as two,
        probe.follow(key) as default,
    ):
        readers: tuple[tuple[Stream, str | None], ...] = ((one, own), (two, other), (default, None))
        for reader, _ in readers:
            await reader.begin()
        for _, namespace in readers:
            where = {} if namespace is None else {"namespace": namespace}
            await _bust_told(probe, f"{key}/{namespace}", **where)
            await _bust_told(probe, key, **where)
        for reader, namespace in readers:
            await reader.until(key)
            if reader.targets != [f"{key}/{namespace}", key]:
                raise Unmet("a reader of one namespace is told what was busted in another, or not what was in its own")


async def _tells_of_no_dry_run(probe: Probe) -> None:
    key = probe.new_target()
    async with probe.follow(key) as stream:
        await stream.begin()
        await _bust_told(probe, f"{key}/dry", dry_run=True)
        await _bust_told(probe, key)
        await stream.until(key)
        if stream.targets != [key]:
            raise Unmet("a dry run, which removes nothing, is told as a bust")


async def _tells_what_went_too(probe: Probe) -> None:
    key = probe.new_target()
    asked: list[tuple[str, dict[str, object]]] = [(f"{key}/part", {"strategy": "dimensional"})]
    asked += [(f"{key}/tag", {"kind": "tag"})] if probe.offers("tag") else []
    async with probe.follow(key) as stream:
        await stream.begin()
        for target, fields in asked:
            await register(probe, f"{key}/page", f"{key}/part", tags=[f"{key}/tag"] if probe.offers("tag") else [])
            await _bust_told(probe, target, **fields)
            told = await stream.until(target)
            if told.kind != "all" and f"{key}/page" not in told.also:
                why = "has the tag that" if fields.get("kind") else "depends on what"
                raise Unmet(f"also does not name an entry that {why} was busted")


async def _says_where_it_is(probe: Probe) -> None:
    key = probe.new_target()
    async with probe.follow(key) as everything, probe.follow(key, ("prefix", f"{key}/nothing")) as nothing:
        await everything.begin()
        await nothing.begin()
        beat = nothing.live.heartbeat if nothing.live is not None else 0.0
        if beat > _LONGEST_BEAT:
            raise Skipped(f"not decided: it would say so every {beat:g} s only")
        await _bust_told(probe, key)
        await everything.until(key)
        try:
            await nothing.until_place(everything.number, 2 * beat + 1)
        except Silent as silent:
            said = "says what it said" if nothing.beats else f"says nothing for {2 * beat + 1:g} s"
            raise Unmet(f"a stream {said}; every {beat:g} s it must say the newest id") from silent


async def _bust_told(probe: Probe, target: str, **fields: object) -> bool:
    """Have something busted, by default directly and once, so that it is told by the time that it is answered.

    Return whether the cache can have such a key.
    """
    fields = {"strategy": "direct", **({"settle": 0} if probe.offers("settle") else {}), **fields}
    answer = await probe.bust(target=target, **fields)
    if answer.status == 422 and reply_of(Problem, answer).field == "target":
        return False
    expect_told(answer, target, **fields)
    return True


def _upto(told: Sequence[Told], number: int) -> list[Told]:
    return [one for one in told if one.number <= number]


def _expect_event(told: StreamedBust, target: str, **fields: object) -> None:
    """Expect that a bust is told as it was asked."""
    asked: dict[str, object] = {
        "namespace": DEFAULT_NAMESPACE,
        "kind": "key",
        "target": target,
        "soft": False,
        "strategy": "direct",
        **fields,
    }
    for name, value in asked.items():
        if (found := getattr(told, name)) != value:
            raise Unmet(f"an event tells {name} {str(found)[:40]!r}, and {str(value)[:40]!r} was asked")


async def _expect_filtered(
    probe: Probe,
    key: str,
    wanted: Sequence[tuple[str, str]],
    through: Mapping[str, Mapping[str, object]],
    without: Mapping[str, Mapping[str, object]],
) -> None:
    """Expect that who wants this is told of busts of `through`, and of none of `without`, but for what cannot be."""
    asked = ", ".join(f"{name} {text.removeprefix(key)[1:]}" for name, text in wanted)

    def phrase(target: str, fields: Mapping[str, object]) -> str:
        kind = fields.get("kind", "key")
        return f"a {fields.get('strategy', 'direct')} bust of the {kind} {target.removeprefix(key)[1:] or 'above'}"

    async with probe.follow(key, *wanted) as stream:
        await stream.begin()
        busted = {
            target: phrase(target, fields)
            for target, fields in (*without.items(), *through.items())
            if await _bust_told(probe, target, **fields)
        }
        for target in through:
            try:
                if target in busted:
                    await stream.until(target)
            except Silent as silent:
                raise Unmet(f"who wants {asked} is not told of {busted[target]}") from silent
        for target in stream.targets:
            if target not in through:
                raise Unmet(f"who wants {asked} is told of {busted.get(target, 'what was not busted')}")


CHECKS: Final[tuple[Check, ...]] = (
    Check("tells of busts in a stream, from when it says that it is live", _tells_of_busts, needs=_TELLS),
    Check("tells busts in their order, under ids that rise", _tells_in_order, needs=_TELLS),
    Check("tells in an event what was asked of the bust", _tells_what_was_asked, needs=_TELLS),
    Check("tells who comes back exactly what was missed", _tells_what_was_missed, needs=_TELLS),
    Check("has a reader forget who comes back with an id that it does not know", _has_forgotten, needs=_TELLS),
    Check("leaves out of a stream what concerns none of its prefixes, and no more", _filters_by_prefix, needs=_TELLS),
    Check(
        "leaves out of a stream what concerns none of its tags, and no more",
        _filters_by_tag,
        needs=(*_TELLS, *capabilities_of("tag")),
    ),
    Check(
        "tells each namespace its own busts", _tells_namespaces_apart, needs=(*_TELLS, *capabilities_of("namespace"))
    ),
    Check("tells of no dry run", _tells_of_no_dry_run, needs=(*_TELLS, *capabilities_of("dry_run"))),
    Check("tells what went with what was busted", _tells_what_went_too, needs=(*_TELLS, *REGISTERS)),
    Check("says with each heartbeat how far it is", _says_where_it_is, needs=_TELLS),
)
