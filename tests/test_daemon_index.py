"""The index: what depends on what, and which keys are variants, against a dict that does it the slow way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pybustcall.daemon import Index
from pybustcall.daemon.index import is_variant

KEYS = [
    stem + encoding + query
    for stem in ("main.css", "main.css2", "a", "é")
    for encoding in ("", ".gz", ".gzip", ".br", ".map", ".zst")
    for query in ("", "?", "?v=2", "?v=2.gz")
]
keys = st.sampled_from(KEYS)


@pytest.mark.parametrize(
    "other",
    [
        "main.css.gz",
        "main.css.br",
        "main.css.zst",
        "main.css.deflate",
        "main.css?v=2",
        "main.css?v=2.gz",
        "main.css.gz?v=2",
        "main.css?",
        "main.css?a\nb",
    ],
)
def test_an_encoding_a_query_or_both_make_a_variant(other: str) -> None:
    """A suffix of a content encoding and a query, in either order, make a variant of a key."""
    assert is_variant("main.css", other)


@pytest.mark.parametrize(
    "other",
    ["main.css", "main.css.map", "main.css2", "main.css.gzip", "main.css.gz.br", "main.cs", "x/main.css.gz", ""],
)
def test_nothing_else_is_a_variant(other: str) -> None:
    """The key itself, other suffixes and other names are no variants."""
    assert not is_variant("main.css", other)


@settings(deadline=None)
@given(st.text(), st.sampled_from(["", ".gz", ".br", ".zst", ".deflate"]), st.text())
def test_the_rest_of_a_variant_is_an_encoding_and_a_query(key: str, encoding: str, query: str) -> None:
    """Whatever the key is, an encoding and a query after it make a variant, unless both are missing."""
    assert is_variant(key, f"{key}{encoding}?{query}")
    assert is_variant(key, key + encoding) is bool(encoding)


def test_dependents_are_found_by_way_of_others() -> None:
    """What depends on a dependent depends on the key."""
    index = Index()
    index.add("page", ["fragment"])
    index.add("fragment", ["product:7"])
    assert index.dependents("product:7") == ["fragment", "page"]
    assert index.dependencies("page") == ("fragment",)


def test_a_cycle_of_dependencies_ends() -> None:
    """Entries that depend on each other are each other's dependents, and never their own."""
    index = Index()
    index.add("a", ["b", "a"])
    index.add("b", ["a"])
    assert index.dependents("a") == ["b"]
    assert index.dependents("b") == ["a"]


def test_adding_again_replaces_what_an_entry_depends_on() -> None:
    """The newest registration counts."""
    index = Index()
    index.add("page", ["old"])
    index.add("page", ["new", "new"])
    assert index.dependents("old") == []
    assert index.dependents("new") == ["page"]
    assert index.dependencies("page") == ("new",)
    assert len(index) == 1


def test_removing_an_entry_removes_its_own_edges_only() -> None:
    """What depends on a removed entry stays registered as depending on it."""
    index = Index()
    index.add("fragment", ["product:7"])
    index.add("page", ["fragment"])
    assert index.remove("fragment")
    assert index.dependents("product:7") == []
    assert index.dependents("fragment") == ["page"]
    assert not index.remove("fragment")


def test_what_is_depended_on_is_no_entry_by_that() -> None:
    """An abstract subject is not held, and has no size."""
    index = Index()
    index.add("é", ["product:7"])
    assert "product:7" not in index
    assert index.dependencies("product:7") == ()
    assert index.size_bytes == 2
    assert repr(index) == "Index(1 entries, 2 bytes of keys)"


class IndexAgainstModel(RuleBasedStateMachine):
    """Every answer of the index is that of a dict that is searched from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.model: dict[str, set[str]] = {}

    @rule(key=keys, depends_on=st.lists(keys, max_size=4))
    def add(self, key: str, depends_on: list[str]) -> None:
        self.index.add(key, depends_on)
        self.model[key] = set(depends_on) - {key}

    @rule(key=keys)
    def remove(self, key: str) -> None:
        assert self.index.remove(key) is (self.model.pop(key, None) is not None)

    @rule(key=keys)
    def ask(self, key: str) -> None:
        found: set[str] = set()
        while new := {name for name, on in self.model.items() if on & (found | {key})} - found:
            found |= new
        assert self.index.dependents(key) == sorted(found - {key})
        assert self.index.variants(key) == sorted(name for name in self.model if is_variant(key, name))
        assert set(self.index.dependencies(key)) == self.model.get(key, set())
        assert (key in self.index) is (key in self.model)

    @invariant()
    def counts(self) -> None:
        assert len(self.index) == len(self.model)
        assert self.index.size_bytes == sum(len(key.encode()) for key in self.model)


TestIndexAgainstModel = IndexAgainstModel.TestCase
TestIndexAgainstModel.settings = settings(deadline=None, max_examples=60)
