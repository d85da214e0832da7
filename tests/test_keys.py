"""What a prefix covers: whole segments, the same whether it is asked of one key, of ranges or of a key's prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.keys import SEPARATORS, bases_of, covers, is_variant, prefixes_of, ranges_of

KEYS = st.text(alphabet="ab/:?#é", min_size=1, max_size=8)


@pytest.mark.parametrize("mark", SEPARATORS)
def test_a_segment_ends_at_each_mark(mark: str) -> None:
    """And at the end of the key."""
    assert covers("a/b", f"a/b{mark}c")
    assert covers(f"a{mark}", f"a{mark}b")


@pytest.mark.parametrize(
    ("prefix", "key", "covered"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/bc", False),
        ("a/b", "a", False),
        ("a/", "a/b", True),
        ("a/", "a", False),
        ("a", "ab/c", False),
        ("/", "/a", True),
        ("é", "é/a", True),
    ],
)
def test_a_prefix_covers_whole_segments(prefix: str, key: str, covered: bool) -> None:
    """Never a part of one."""
    assert covers(prefix, key) is covered


@given(KEYS, KEYS)
def test_the_ranges_hold_just_what_is_covered(prefix: str, key: str) -> None:
    """Beside the prefix itself, by the order of code points, which is that of UTF-8 bytes."""
    by_points = any(begin <= key < end for begin, end in ranges_of(prefix))
    by_bytes = any(begin.encode() <= key.encode() < end.encode() for begin, end in ranges_of(prefix))
    assert by_points is by_bytes
    assert (key == prefix or by_points) is covers(prefix, key)


@given(KEYS, KEYS)
def test_the_prefixes_of_a_key_are_those_that_cover_it(prefix: str, key: str) -> None:
    """All of them, the shortest first."""
    found = prefixes_of(key)
    assert (prefix in found) is covers(prefix, key)
    assert list(found) == sorted(set(found), key=len)
    assert all(covers(one, key) for one in found)


@given(KEYS, KEYS, KEYS)
def test_to_cover_is_an_order(first: str, second: str, third: str) -> None:
    """Reflexive, transitive, and never both ways for two."""
    assert covers(first, first)
    if covers(first, second) and covers(second, third):
        assert covers(first, third)
    if covers(first, second) and covers(second, first):
        assert first == second


VARIANTS = st.lists(st.sampled_from(["a", ".gz", ".br", "?v=2", "/b", ".css"]), min_size=1, max_size=5).map("".join)


@pytest.mark.parametrize(
    ("key", "other", "variant"),
    [
        ("main.css", "main.css.gz", True),
        ("main.css", "main.css?v=2", True),
        ("main.css", "main.css.gz?v=2", True),
        ("main.css", "main.css?v=2.gz", True),
        ("main.css", "main.css", False),
        ("main.css", "main.css.map", False),
        ("main.css", "main.css2", False),
        ("main.css.gz", "main.css", False),
    ],
)
def test_a_variant_is_another_encoding_or_query_of_a_key(key: str, other: str, variant: bool) -> None:
    """And nothing else that begins so."""
    assert is_variant(key, other) is variant


@given(VARIANTS, VARIANTS)
def test_the_bases_of_a_key_are_what_it_is_a_variant_of(key: str, other: str) -> None:
    """All of them, the longest first."""
    bases = bases_of(other)
    assert (key in bases) is is_variant(key, other)
    assert list(bases) == sorted(bases, key=len, reverse=True)
    assert all(is_variant(base, other) for base in bases)
    assert (key in bases_of(key + other)) is is_variant(key, key + other)
