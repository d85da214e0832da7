"""How entries lie in memcached: names, what they hold, and that what is busted is exactly what a bust covers."""

from __future__ import annotations

import re
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall import memcached_layout as items
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.keys import covers, is_variant
from pybustcall.memcached_layout import Answer, Command, Layout, Reach, judge
from pybustcall.models import Kind

SHOP: Final = Layout("bustcall", "shop")
TEXTS: Final = st.text(st.sampled_from("ab/:?#.gz"), min_size=1, max_size=10) | st.sampled_from(
    ["a", "a/", "a/b", "a.gz", "a?b", "a.gz?b", "a?b.gz", "a.br", "a/b.zst?", "/", "?", "a?"]
)


def held(packed: bytes, *, flags: str = "1", more: str = "") -> Answer:
    """What a server says of an item that holds this."""
    return Answer("VA", {"f": flags, "c": "7", **dict.fromkeys(more, "")}, packed)


def generation(number: int, soft: int = 0) -> bytes:
    """A generation of which both halves are known."""
    return number.to_bytes(8) + soft.to_bytes(8)


# Names


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=3000), st.sampled_from("sx"))
def test_every_name_is_one_that_memcached_takes(key: str, tenant: str) -> None:
    """However long the key is, and whatever it has: at most 250 bytes, none of them a space."""
    layout = Layout("x" * 64, tenant)
    names = [
        layout.entry(key),
        *layout.covering(key, [key]),
        layout.lease(key, 1, [b"g"]),
        layout.mark,
        layout.sequence,
    ]
    for name in names:
        assert re.fullmatch(rb"[!-~]{1,250}", name)


def test_names_are_told_apart() -> None:
    """By prefix, by namespace, by what they stand for, and by the text."""
    layouts = [Layout(prefix, tenant) for prefix in ("one", "two") for tenant in ("a", "b", "ab")]
    names = [
        name
        for layout in layouts
        for name in (
            layout.entry("a"),
            layout.entry("a/"),
            *layout.covering("a/"),
            layout.tag("a"),
            layout.tag("a/"),
            layout.sequence,
            layout.lease("a", 1, [b"x"]),
            layout.lease("a", 2, [b"x"]),
            layout.lease("a", 1, [b"y"]),
        )
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("prefix", "namespace"), [("", "shop"), ("a b", "shop"), ("é", "shop"), ("x" * 65, "shop")])
def test_a_prefix_that_no_name_can_begin_with_is_refused(prefix: str, namespace: str) -> None:
    """When the layout is made."""
    with pytest.raises(ConfigurationError):
        Layout(prefix, namespace)


def test_a_namespace_that_cannot_be_is_refused() -> None:
    """Likewise."""
    with pytest.raises(InvalidRequest):
        Layout("bustcall", "a/b")


# What a bust reaches


def is_reached(reach: Reach, key: str, tags: tuple[str, ...] = ()) -> bool:
    """Tell whether an entry is among what is busted, by itself or by a generation."""
    return SHOP.entry(key) in reach.entries or bool(set(SHOP.covering(key, tags)) & set(reach.generations))


@given(TEXTS, TEXTS)
def test_a_bust_of_a_key_reaches_the_key_alone(target: str, key: str) -> None:
    """If it is not wide."""
    assert is_reached(SHOP.reach("key", target, wide=False), key) is (key == target)


@given(TEXTS, TEXTS)
def test_a_wide_bust_of_a_key_reaches_its_variants(target: str, key: str) -> None:
    """And nothing else, whether anybody ever stored one or not."""
    expected = key == target or is_variant(target, key)
    assert is_reached(SHOP.reach("key", target, wide=True), key) is expected


@given(TEXTS, TEXTS)
def test_a_bust_of_a_prefix_reaches_what_it_covers(target: str, key: str) -> None:
    """By whole segments."""
    assert is_reached(SHOP.reach("prefix", target, wide=False), key) is covers(target, key)


@given(TEXTS, TEXTS)
def test_a_wide_bust_of_a_prefix_reaches_the_variants_of_the_prefix_too(target: str, key: str) -> None:
    """Those of what it covers are covered anyway."""
    expected = covers(target, key) or is_variant(target, key)
    assert is_reached(SHOP.reach("prefix", target, wide=True), key) is expected


@given(TEXTS, TEXTS, st.lists(TEXTS, max_size=3, unique=True))
def test_a_bust_of_a_tag_reaches_who_bears_it(target: str, key: str, tags: list[str]) -> None:
    """Keys and prefixes that read like the tag are no matter."""
    reach = SHOP.reach("tag", target, wide=True)
    assert is_reached(reach, key, tuple(tags)) is (target in tags)
    assert reach.before == (SHOP.sequence,)


@given(TEXTS)
def test_a_bust_of_everything_reaches_everything_in_the_namespace(key: str) -> None:
    """By one item."""
    reach = SHOP.reach("all", "*", wide=True)
    assert is_reached(reach, key)
    assert len(reach.generations) == 1
    assert not set(reach.generations) & set(Layout("bustcall", "shop2").covering(key))


@pytest.mark.parametrize("kind", ["key", "prefix", "tag", "all"])
def test_a_bust_is_of_few_items_whatever_it_covers(kind: Kind) -> None:
    """A dozen or so, none of them twice."""
    reach = SHOP.reach(kind, "a?b/c", wide=True)
    names = [*reach.entries, *reach.generations, *reach.before]
    assert len(set(names)) == len(names) <= 14


# Entries


@given(
    st.binary(max_size=100),
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20), unique=True, max_size=9),
    TEXTS,
)
def test_an_entry_is_read_as_it_was_packed(value: bytes, tags: list[str], key: str) -> None:
    """And is fresh under the generations that it was made under."""
    generations = [generation(number) for number in range(len(SHOP.covering(key, tags)))]
    entry = SHOP.unpack(key, held(SHOP.pack(key, value, tags, generations)))
    assert entry is not None
    assert (entry.value, entry.tags, entry.marked) == (value, tuple(tags), False)
    assert judge(entry, generations) == "fresh"


def test_an_entry_says_whose_it_is() -> None:
    """What two keys have one hash of is nobody's, and whoever looks into the server can read it."""
    packed = SHOP.pack("products/7", b"v", ["news"], [generation(1)])
    assert SHOP.unpack("products/8", held(packed)) is None
    assert Layout("bustcall", "shop2").unpack("products/7", held(packed)) is None
    assert b"shopproducts/7news" in packed


@pytest.mark.parametrize(
    "answer",
    [Answer("EN"), held(b"", flags="0"), held(b"x" * 100, flags="0"), held(b"", flags="1"), held(b"x" * 39, flags="1")],
)
def test_what_is_no_entry_is_none(answer: Answer) -> None:
    """Neither the place of one, nor what somebody else has put there."""
    assert SHOP.unpack("k", answer) is None


def test_an_entry_dies_with_any_hard_half_and_is_stale_with_any_soft_one() -> None:
    """And it dies with a generation that is missing, whoever took it away."""
    made = [generation(1), generation(2), generation(3)]
    packed = SHOP.pack("a/b", b"v", ["t"], made)
    entry = SHOP.unpack("a/b", held(packed))
    marked = SHOP.unpack("a/b", held(packed, more="XW"))
    assert entry
    assert marked
    assert judge(marked, made) == "stale"
    for place in range(3):
        softer, harder, missing = [list[bytes | None](made) for _ in range(3)]
        softer[place] = made[place][:8] + generation(9)[:8]
        harder[place] = generation(9)[:8] + made[place][8:]
        missing[place] = None
        assert judge(entry, softer) == judge(marked, softer) == "stale"
        assert judge(entry, harder) == judge(entry, missing) == judge(marked, harder) == "dead"
    assert judge(entry, [made[1], made[0], made[2]]) == "dead"


# Commands and answers


def test_a_lifetime_is_of_whole_seconds_and_ends_within_thirty_days() -> None:
    """More than that memcached would take for a day of long ago, and nothing for ever."""
    for ttl, said in ((0.001, 1), (1.0, 1), (1.2, 2), (60.0, 60), (2592000.0, 2592000), (10.0**9, 2592000), (None, 0)):
        assert f" T{said} ".encode() in items.store(b"n", b"v", ttl=ttl, cas=None).line
    assert items.take(b"n", 0.1).line == b"ms n 0 T2 ME"
    assert items.take(b"n", 10.0**9).line == b"ms n 0 T2592000 ME"


def test_commands_are_what_the_protocol_says() -> None:
    """Each with the length of its value, and with the CAS number where there is one."""
    assert items.store(b"n", b"abc", ttl=None, cas=5) == Command(b"ms n 3 T0 F1 C5", b"abc")
    assert items.delete(b"n") == items.bust(b"n", soft=False) == Command(b"md n")
    assert items.bust(b"n", soft=True, cas=7) == Command(b"md n C7 I")
    assert items.read(b"n") == Command(b"mg n c f v")
    assert items.reserve(b"n") == Command(b"mg n c f v N3600")
    assert items.inspect(b"n") == Command(b"mg n c f u")
    assert items.put_mark(b"n") == Command(b"ms n 0 T0 c", b"")


def test_a_generation_is_random_and_a_soft_bust_keeps_its_hard_half() -> None:
    """No two are the same."""
    one, two = items.add(b"n"), items.add(b"n")
    assert one.line == two.line == b"ms n 16 T0 ME"
    assert one.value is not None
    assert two.value is not None
    assert one.value[:8] != two.value[:8]
    assert one.value[8:] != two.value[8:]
    softer = items.soften(b"n", Answer("VA", {"c": "3"}, one.value))
    assert softer.line == b"ms n 16 T0 C3"
    assert softer.value is not None
    assert softer.value[:8] == one.value[:8]
    assert softer.value[8:] != one.value[8:]


def test_answers_are_understood_also_if_they_lack_something() -> None:
    """A server without CAS tells 0, and what is no generation is none."""
    assert Answer("HD", {"c": "12"}).cas == 12
    assert Answer("HD", {"c": "x"}).cas == Answer("EN").cas == Answer("HD", {"c": "0"}).cas == 0
    assert items.generation_of(held(generation(1))) == generation(1)
    assert items.generation_of(held(b"short")) is items.generation_of(Answer("EN")) is None
    assert Answer("HD").done
    assert not Answer("NF").done
