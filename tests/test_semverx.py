"""Versions and their order, ranges, specs, Python's versions and hot-swap: by tables, vectors and laws."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.metadata
import json
import pickle
import re
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from pybustcall import semverx
from pybustcall.capabilities import semverx_of
from pybustcall.errors import BustcallError, InvalidRequest, InvalidVersion
from pybustcall.semverx import (
    HOT_SWAP,
    MAX_ALTERNATIVES,
    MAX_NUMBER,
    MAX_RANGE_CHARACTERS,
    MAX_VERSION_CHARACTERS,
    SemverX,
    SemverXRange,
    Spec,
    State,
    can_hot_swap,
    installed,
)

pytestmark = pytest.mark.requirement("IMP-07")

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "vectors"
VERSIONS: dict[str, Any] = json.loads((VECTORS / "versions.json").read_text(encoding="utf-8"))
RANGES: dict[str, Any] = json.loads((VECTORS / "ranges.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/reference/semverx.md").read_text(encoding="utf-8")
FLAGS = ("allow_experimental", "validated", "migrate", "rollback")

parse = SemverX.parse
S, L, X = State.STABLE, State.LEGACY, State.EXPERIMENTAL


class Reader(Protocol):
    """Something that reads a text, and refuses others."""

    def __call__(self, text: object, /) -> object: ...


READERS: list[Reader] = [SemverX.parse, SemverX.from_pep440, SemverXRange.parse, Spec.parse]


def label(value: object) -> str:
    """Name a test after its vector, shortly."""
    return ascii(value)[1:49] if isinstance(value, str) else str(value)


# Vectors


@pytest.mark.requirement("RES-04")
@pytest.mark.parametrize("vector", VERSIONS["valid"], ids=lambda vector: label(vector["text"]))
def test_a_version_is_read_and_written_as_the_vectors_say(vector: dict[str, Any]) -> None:
    """Numbers, states, pre-release, build; the canonical form and the six parts."""
    version = parse(vector["text"])
    assert {
        "text": vector["text"],
        "major": version.major,
        "minor": version.minor,
        "patch": version.patch,
        "states": [str(state) for state in version.states],
        "prerelease": ".".join(map(str, version.prerelease)),
        "build": version.build,
        "canonical": str(version),
        "six_parts": version.six_parts(),
    } == vector
    assert parse(str(version)).identical(version)
    assert parse(version.six_parts()).states == version.states


@pytest.mark.parametrize("vector", VERSIONS["invalid"], ids=lambda vector: label(vector["text"]))
def test_what_is_no_version_is_refused(vector: dict[str, str]) -> None:
    """By an error of ours that is a ValueError, and that holds the text."""
    with pytest.raises(InvalidVersion, match=r"^version '") as refusal:
        parse(vector["text"])
    assert isinstance(refusal.value, BustcallError)
    assert isinstance(refusal.value, ValueError)
    assert refusal.value.text == vector["text"]


@pytest.mark.parametrize("chain", VERSIONS["ascending"], ids=lambda chain: label(chain[0]))
def test_versions_of_the_vectors_ascend(chain: list[str]) -> None:
    """Each is lower than all that follow it."""
    versions = [parse(text) for text in chain]
    for lower, higher in pairwise(versions):
        assert lower < higher
        assert lower <= higher
        assert higher > lower
        assert higher >= lower
        assert lower != higher
    assert sorted(set(versions)) == versions


@pytest.mark.parametrize("pair", VERSIONS["equal"], ids=lambda pair: label(" = ".join(pair)))
def test_versions_of_the_vectors_are_equal(pair: tuple[str, str]) -> None:
    """In `==`, in order and in hash."""
    one, other = map(parse, pair)
    assert one == other
    assert one <= other <= one
    assert not one < other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "vector", RANGES["matches"], ids=lambda vector: label(f"{vector['range']} has {vector['version']}")
)
def test_a_range_matches_what_the_vectors_say(vector: dict[str, Any]) -> None:
    """Written as given, and as canonical; the version as text or value."""
    versions = SemverXRange.parse(vector["range"])
    assert versions.matches(vector["version"]) is vector["matches"]
    assert SemverXRange.parse(str(versions)).matches(parse(vector["version"])) is vector["matches"]


@pytest.mark.parametrize("vector", RANGES["invalid"], ids=lambda vector: label(vector["text"]))
def test_what_is_no_range_is_refused(vector: dict[str, str]) -> None:
    """The error tells of the range."""
    with pytest.raises(InvalidVersion, match=r"^range '") as refusal:
        SemverXRange.parse(vector["text"])
    assert refusal.value.text == vector["text"]


@pytest.mark.parametrize("vector", RANGES["specs"], ids=lambda vector: label(vector["spec"]))
def test_a_spec_is_a_name_and_a_range(vector: dict[str, str]) -> None:
    """Divided at the last @; written again, it is read as the same."""
    spec = Spec.parse(vector["spec"])
    assert (spec.name, str(spec.range)) == (vector["name"], vector["range"])
    assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize("vector", RANGES["invalid_specs"], ids=lambda vector: label(vector["spec"]))
def test_what_is_no_spec_is_refused(vector: dict[str, str]) -> None:
    """Whether it is the name or the range that is wrong."""
    with pytest.raises(InvalidVersion, match=r"^(spec|name|range) '"):
        Spec.parse(vector["spec"])


@pytest.mark.parametrize("vector", RANGES["best"], ids=lambda vector: label(f"{vector['range']} {vector['versions']}"))
def test_the_best_version_is_the_one_that_the_vectors_say(vector: dict[str, Any]) -> None:
    """Of texts and of values."""
    versions = SemverXRange.parse(vector["range"])
    expected = None if vector["best"] is None else repr(parse(vector["best"]))
    for offered in (vector["versions"], map(parse, vector["versions"])):
        best = versions.best(offered)
        assert (best if best is None else repr(best)) == expected


@pytest.mark.parametrize(
    "vector", RANGES["swaps"], ids=lambda v: label(f"{v['current']} to {v['candidate']} {','.join(v['flags'])}")
)
def test_a_swap_is_judged_as_the_vectors_say(vector: dict[str, Any]) -> None:
    """Which parts fail, and so whether it may be."""
    verdict = can_hot_swap(vector["current"], vector["candidate"], **vector["flags"])
    assert bool(verdict) is verdict.allowed is vector["allowed"]
    assert list(verdict.failed) == vector["failed"]
    assert len(verdict.reasons) == (3 if verdict else len(verdict.failed))


def test_the_vectors_have_an_example_of_every_swap_and_operator() -> None:
    """Each pair of states, each flag, each operator; no text is refused and taken."""
    pairs = {
        pair
        for vector in RANGES["swaps"]
        for pair in zip(parse(vector["current"]).states, parse(vector["candidate"]).states, strict=True)
    }
    assert pairs == set(HOT_SWAP)
    assert {flag for vector in RANGES["swaps"] for flag in vector["flags"]} == set(FLAGS)
    for operator in ("=", ">", ">=", "<", "<=", "^", "~"):
        answers = {vector["matches"] for vector in RANGES["matches"] if re.match(rf"{operator}\s*\d", vector["range"])}
        assert answers == {True, False}, operator
    taken = {vector["text"] for vector in VERSIONS["valid"]}
    assert len(taken) == len(VERSIONS["valid"])
    assert not taken & {vector["text"] for vector in VERSIONS["invalid"]}


# Versions


def test_precedence_is_that_of_semver() -> None:
    """The chain of its section 11."""
    chain = ["alpha", "alpha.1", "alpha.beta", "beta", "beta.2", "beta.11", "rc.1"]
    versions = [*(parse(f"1.0.0-{prerelease}") for prerelease in chain), parse("1.0.0")]
    for (place, one), (other_place, other) in product(enumerate(versions), repeat=2):
        assert (one < other, one == other) == (place < other_place, place == other_place)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("1.2.3", S),
        ("1.stable.2.legacy.3.stable", L),
        ("1.legacy.2.stable.3.experimental", X),
        ("1.experimental.2.stable.3.stable", X),
        ("1.2.3-legacy.1", L),
        ("1.2.3-beta", X),
    ],
)
def test_a_version_is_as_trusted_as_its_least_trusted_part(text: str, state: State) -> None:
    """Experimental if any part is, else legacy if any is."""
    assert parse(text).state is state


def test_identical_compares_what_the_order_leaves_out() -> None:
    """States and build."""
    plain = parse("1.2.3")
    assert plain.identical(parse("v1.stable.2.stable.3.stable"))
    for other in ("1.2.3+b", "1.legacy.2.stable.3.stable", "1.2.3-stable", "1.2.4"):
        assert not plain.identical(parse(other))
    assert plain == parse("1.2.3+b")


def test_a_version_is_compared_with_versions_only() -> None:
    """A text is unequal to it, and neither higher nor lower."""
    version: Any = parse("1.2.3")
    assert version != "1.2.3"
    assert version.__eq__("1.2.3") is NotImplemented
    assert version.__lt__("1.2.3") is NotImplemented
    with pytest.raises(TypeError):
        assert version < "2.0.0"
    with pytest.raises(TypeError):
        assert version >= (1, 2, 3)


@pytest.mark.parametrize("text", ["1.2.3-rc.1+b", "1.stable.2.legacy.3.experimental"])
def test_a_version_can_be_copied_pickled_and_shown(text: str) -> None:
    """As a value: it cannot be changed either."""
    version = parse(text)
    assert pickle.loads(pickle.dumps(version)).identical(version)
    assert copy.deepcopy(version).identical(version)
    assert repr(version) == f"SemverX.parse('{text}')"
    with pytest.raises(AttributeError):
        version.major = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [
        {"major": -1},
        {"major": "1"},
        {"major": True},
        {"minor": MAX_NUMBER + 1},
        {"patch": 1.0},
        {"prerelease": ("rc", 1)},
        {"prerelease": ("stable", "1")},
        {"prerelease": ["stable"]},
        {"prerelease": ("stable", "")},
        {"prerelease": ("stable", "a.b")},
        {"prerelease": ("stable", -1)},
        {"build": "a b"},
        {"build": "a..b"},
        {"patch_state": L, "build": "b"},
        {"patch_state": "beta"},
        {"prerelease": ("stable", *"a" * 200)},
        {"major": 10**5000},
        {"major": -(10**5000)},
        {"prerelease": (10**5000,)},
        {"prerelease": ((10**5000,),)},
        {"prerelease": 5},
        {"prerelease": {1: "rc"}},
        {"prerelease": None},
        {"prerelease": "rc"},
        {"build": 10**5000},
        {"build": None},
        {"patch_state": 10**5000},
        {"patch_state": L, "prerelease": (10**5000,)},
    ],
)
def test_fields_that_no_text_says_are_refused(change: dict[str, Any]) -> None:
    """So every version can be written."""
    with pytest.raises(InvalidVersion):
        replace(parse("1.2.3"), **change)


def test_fields_that_a_text_says_are_taken() -> None:
    """The states are stable unless given."""
    assert SemverX(1, 2, 3).identical(parse("1.2.3"))
    assert SemverX(1, 2, 3, X, X, X, ("rc", 1), "b").identical(parse("1.2.3-rc.1+b"))
    assert str(replace(parse("1.2.3"), minor_state=L)) == "1.stable.2.legacy.3.stable"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("value", [None, 1, 1.2, b"1.2.3", ["1.2.3"], True])
def test_what_is_no_text_is_refused(read: Reader, value: object) -> None:
    """The error names the type, and is an InvalidVersion too."""
    with pytest.raises(InvalidVersion, match=f"must be a string, not {type(value).__name__}"):
        read(value)


@pytest.mark.parametrize(
    ("read", "text", "why"),
    [
        (parse, "", "is empty"),
        (parse, "1.02.3", "'02' as its minor number, with a leading zero"),
        (parse, "1.2.x", "'x' as its patch number, which is none"),
        (parse, "1.2", "'1.2' has 2 parts; write three numbers, as in 1.2.0, or six parts with states"),
        (parse, "new", "'new' has 1 part; write three numbers"),
        (parse, "1.2.\u0663", r"U\+0663 at position 4"),
        (parse, "9007199254740992.0.0", "major number above 2"),
        (parse, "1.2.3-a..b", "'' as an identifier"),
        (parse, "1.stable.2.beta.3.stable", "'beta' as a state, and these are stable, legacy, experimental"),
        (parse, "1.stable.2.stable.3.stable+b", "six parts, and these take neither pre-release nor build"),
        (parse, "1" * 257, "257 characters, which is more than 256"),
        (SemverXRange.parse, ">", "an operator stands where a version should"),
        (SemverXRange.parse, "1.x,", "missing beside a comma"),
        (SemverXRange.parse, "1.2.3.4", "'1.2.3.4' has 4 parts; write one to three numbers, as in 1.2, or six parts"),
        (SemverXRange.parse, "1.0.0 - 2.0.0", "is written >=1.0.0 <=2.0.0"),
        (SemverXRange.parse, "^*", "no number that it could compare with"),
        (SemverXRange.parse, "1.x.2", "a number after a wildcard"),
        (SemverXRange.parse, "1.2-rc", "go with three numbers only"),
        (SemverXRange.parse, "2.{stable|stable}.*.*.*.*", "names a state twice"),
        (SemverXRange.parse, "2.{stable|legacy.*.*.*.*", "a brace has no other"),
        (SemverXRange.parse, ">=2.stable.*.stable.*.stable", "a pattern after an operator"),
        (Spec.parse, "a b@1.x", "has a space"),
        (Spec.parse, "@scope@1.x", "only stands before a scope"),
        (Spec.parse, "\u00e4" * 129, "258 bytes, which is more than 256"),
    ],
)
def test_a_refusal_says_what_is_wrong(read: Reader, text: str, why: str) -> None:
    """Precisely enough to mend it."""
    with pytest.raises(InvalidVersion, match=why):
        read(text)


# Laws of versions

numbers = st.one_of(st.integers(0, 3), st.integers(0, MAX_NUMBER))
identifiers = st.one_of(
    st.integers(0, 12).map(str),
    st.sampled_from(["a", "B", "alpha", "rc", "-", "0a", "legacy", "Stable", "experimental"]),
)
prereleases = st.lists(identifiers, max_size=3).map(lambda words: "-" + ".".join(words) if words else "")
builds = st.lists(st.sampled_from(["b", "7", "007", "-"]), max_size=2).map(
    lambda words: f"+{'.'.join(words)}" if words else ""
)
semver_texts = st.builds(
    "{}{}.{}.{}{}{}".format, st.sampled_from(["", "v"]), numbers, numbers, numbers, prereleases, builds
)
states = st.sampled_from(["stable", "legacy", "experimental", "Stable", "LEGACY"])
six_part_texts = st.builds("{}.{}.{}.{}.{}.{}".format, numbers, states, numbers, states, numbers, states)
texts = st.one_of(semver_texts, six_part_texts)
versions = texts.map(parse)


@given(texts)
def test_a_version_written_is_read_as_the_identical_one(text: str) -> None:
    """And written the same again; nothing depends on how it was spelled."""
    version = parse(text)
    again = parse(str(version))
    assert again.identical(version)
    assert str(again) == str(version)
    assert again == version
    assert parse(version.six_parts()).numbers == version.numbers


@given(versions, versions)
def test_of_two_versions_exactly_one_is_lower_or_they_are_equal(one: SemverX, other: SemverX) -> None:
    """Trichotomy and antisymmetry; equal ones have one hash; identical ones, and only those, are written alike."""
    assert [one < other, one == other, one > other].count(True) == 1
    assert (one <= other) is (not one > other)
    assert (one >= other) is (not one < other)
    assert (one < other) is (other > one)
    assert one != other or hash(one) == hash(other)
    assert not one.identical(other) or one == other
    assert one.identical(other) is (str(one) == str(other))


@given(versions, versions, versions)
def test_the_order_of_versions_is_transitive(one: SemverX, two: SemverX, three: SemverX) -> None:
    """Of three sorted versions the first is not above the last, and equality passes on."""
    low, middle, high = sorted([one, two, three])
    assert low <= middle <= high
    assert low <= high
    assert (low == high) is (low == middle and middle == high)


@given(numbers, numbers, numbers, prereleases, builds, st.tuples(states, states, states))
def test_states_and_build_have_no_part_in_the_order(
    major: int, minor: int, patch: int, prerelease: str, build: str, others: tuple[str, str, str]
) -> None:
    """A version is equal to itself with other ones."""
    plain = f"{major}.{minor}.{patch}"
    assert parse(plain + prerelease) == parse(plain + prerelease + build)
    assert parse(plain) == parse(
        ".".join(f"{number}.{state}" for number, state in zip(plain.split("."), others, strict=True))
    )


# Laws of ranges

small = st.integers(0, 3)
small_versions = st.one_of(
    st.builds("{}.{}.{}{}".format, small, small, small, prereleases),
    st.builds("{}.{}.{}.{}.{}.{}".format, small, states, small, states, small, states),
).map(parse)
operators = st.sampled_from(["", "=", ">", ">=", "<", "<=", "^", "~", "^ ", ">= "])
allowed = st.sampled_from(["*", "stable", "Legacy", "{stable|experimental}", "{experimental|legacy}", "{stable}"])
terms = st.one_of(
    st.builds("{}{}.{}.{}{}".format, operators, small, small, small, prereleases),
    st.builds("{}{}.{}".format, operators, small, small),
    st.builds("{}v{}.x".format, operators, small),
    st.builds(
        "{}.{}.{}.{}.{}.{}".format, small, allowed, st.sampled_from(["1", "*", "x"]), allowed, st.just("*"), allowed
    ),
    st.builds("{}{}.{}.{}.{}.{}.{}".format, operators, small, states, small, states, small, states),
    st.sampled_from(["*", "x", "latest", "*.stable.*.*.*.*"]),
)
conjunctions = st.lists(terms, min_size=1, max_size=3).map(" ".join)
range_texts = st.lists(conjunctions, min_size=1, max_size=3).map(" || ".join)


def matches(text: str, version: SemverX) -> bool:
    return SemverXRange.parse(text).matches(version)


@given(range_texts, small_versions)
def test_a_range_written_is_read_as_an_equal_one(text: str, version: SemverX) -> None:
    """Canonical text is a fixed point, and matches the same."""
    versions = SemverXRange.parse(text)
    again = SemverXRange.parse(str(versions))
    assert again == versions
    assert str(again) == str(versions)
    assert hash(again) == hash(versions)
    assert again.matches(version) is versions.matches(version)


@given(range_texts, range_texts, small_versions)
def test_two_bars_are_or(one: str, other: str, version: SemverX) -> None:
    """A version is in `a || b` iff it is in a or in b."""
    assert matches(f"{one} || {other}", version) is (matches(one, version) or matches(other, version))
    assert matches(f"{one}||{other}", version) is matches(f"{other} || {one}", version)


@given(conjunctions, conjunctions, small_versions, st.sampled_from([" ", ",", ", ", " , ", "   "]))
def test_space_and_comma_are_and(one: str, other: str, version: SemverX, between: str) -> None:
    """A version is in `a b` iff it is in a and in b."""
    assert matches(f"{one}{between}{other}", version) is (matches(one, version) and matches(other, version))


@given(versions, versions)
def test_comparisons_go_by_precedence_only(bound: SemverX, version: SemverX) -> None:
    """Whatever the states; a full version bounds, in either spelling."""
    assert matches(f">{bound}", version) is (version > bound)
    assert matches(f">={bound}", version) is (version >= bound)
    assert matches(f"<{bound}", version) is (version < bound)
    assert matches(f"<={bound}", version) is (version <= bound)
    if str(bound) != bound.six_parts():
        assert matches(f"={bound}", version) is matches(str(bound), version) is (version == bound)


@given(small_versions, small_versions)
def test_caret_and_tilde_are_bounds_with_the_same_first_numbers(bound: SemverX, version: SemverX) -> None:
    """`^v` is `>=v` with v's major number, 0 like any other; `~v` with the minor number too, so within `^v`."""
    above = version >= bound
    assert matches(f"^{bound}", version) is (above and version.major == bound.major)
    assert matches(f"~{bound}", version) is (above and version.numbers[:2] == bound.numbers[:2])
    assert matches(f"^{bound}", bound)
    assert matches(f"~{bound}", bound)


@given(small, small, small_versions)
def test_a_version_that_lacks_numbers_is_compared_by_those_it_has(major: int, minor: int, version: SemverX) -> None:
    """The same in full, since x.y.0-0 is the lowest version that begins with x.y."""
    for short, full in {
        f">={major}": f">={major}.0.0-0",
        f"<{major}": f"<{major}.0.0-0",
        f">{major}": f">={major + 1}.0.0-0",
        f"<={major}": f"<{major + 1}.0.0-0",
        f"^{major}": f">={major}.0.0-0 <{major + 1}.0.0-0",
        f"~{major}": f">={major}.0.0-0 <{major + 1}.0.0-0",
        f"{major}.x": f">={major}.0.0-0 <{major + 1}.0.0-0",
        f">={major}.{minor}": f">={major}.{minor}.0-0",
        f"<{major}.{minor}": f"<{major}.{minor}.0-0",
        f">{major}.{minor}": f">={major}.{minor + 1}.0-0",
        f"<={major}.{minor}": f"<{major}.{minor + 1}.0-0",
        f"^{major}.{minor}": f">={major}.{minor}.0-0 <{major + 1}.0.0-0",
        f"~{major}.{minor}": f">={major}.{minor}.0-0 <{major}.{minor + 1}.0-0",
        f"={major}.{minor}.*": f">={major}.{minor}.0-0 <{major}.{minor + 1}.0-0",
    }.items():
        assert matches(short, version) is matches(full, version), short


@given(versions)
def test_any_version_is_in_the_widest_ranges_and_in_its_own_six_parts(version: SemverX) -> None:
    """`*`, `x`, `latest`, any states; a version is in the range that it is."""
    for text in ("*", "x.X.*", "latest", "*.*.*.*.*.*", version.six_parts(), f"={version.six_parts()}", str(version)):
        assert matches(text, version), text


@given(small_versions, small_versions)
def test_six_parts_as_a_range_ask_for_numbers_and_states(wanted: SemverX, version: SemverX) -> None:
    """And for nothing else."""
    same = (version.numbers, version.states) == (wanted.numbers, wanted.states)
    assert matches(wanted.six_parts(), version) is same


@given(range_texts, st.lists(small_versions, max_size=8))
def test_the_best_version_is_a_match_that_none_beats(text: str, offered: list[SemverX]) -> None:
    """None is better trusted, unless the range names a state; of those, none is higher."""
    wanted = SemverXRange.parse(text)
    best = wanted.best(offered)
    fitting = [version for version in offered if wanted.matches(version)]
    if best is None:
        assert fitting == []
        return
    assert any(best is version for version in fitting)
    again = wanted.best(reversed(offered))
    assert again is not None
    assert (again, again.state) == (best, best.state)
    if not re.search("-|stable|legacy|experimental", text, re.IGNORECASE):
        trusted = next(state for state in State if any(version.state is state for version in fitting))
        assert best == max(version for version in fitting if version.state is trusted)
    assert all(version <= best for version in fitting if version.state is best.state)


def test_the_best_of_texts_that_are_no_versions_is_an_error() -> None:
    """Rather than to pass over them."""
    with pytest.raises(InvalidVersion):
        SemverXRange.parse("*").best(["1.2.3", "newest"])


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("=1.2.3+b", "1.2.3"),
        (" >= v1.2 ,<2.x||1.X.* ", ">=1.2 <2 || 1.x"),
        ("LATEST", "*"),
        ("1.2", "1.2.x"),
        ("^1.*", "^1"),
        ("~2.legacy.1.stable.0.stable", "~2.1.0"),
        ("v2.{LEGACY|stable}.x.{stable}.X.*", "2.{stable|legacy}.*.stable.*.*"),
        ("1.2.3-RC.1", "1.2.3-RC.1"),
    ],
)
def test_a_range_is_written_in_one_form(text: str, canonical: str) -> None:
    """What has no part is left out."""
    assert str(SemverXRange.parse(text)) == canonical


def test_a_range_is_bounded() -> None:
    """In characters and alternatives; the most is taken."""
    most = " || ".join(["1.x"] * MAX_ALTERNATIVES)
    assert SemverXRange.parse(most).matches("1.2.3")
    with pytest.raises(InvalidVersion, match="33 alternatives"):
        SemverXRange.parse(f"{most} || 1.x")
    longest = "1.x".ljust(MAX_RANGE_CHARACTERS)
    assert SemverXRange.parse(longest).matches("1.2.3")
    with pytest.raises(InvalidVersion, match="1025 characters"):
        SemverXRange.parse(longest + " ")
    with pytest.raises(InvalidVersion, match="257 characters"):
        SemverXRange.parse(">1.2.3-".ljust(MAX_VERSION_CHARACTERS + 2, "a"))
    assert SemverXRange.parse(">1.2.3-".ljust(MAX_VERSION_CHARACTERS + 1, "a")).matches("1.2.3")


def test_a_spec_is_sound_however_it_is_made() -> None:
    """The name is checked when one is made of its parts too."""
    wanted = SemverXRange.parse("^1")
    assert str(Spec("@scope/name", wanted)) == "@scope/name@^1"
    with pytest.raises(InvalidVersion):
        Spec("a b", wanted)


# Python's versions


@pytest.mark.requirement("RES-04")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2.3", "1.2.3"),
        ("1.2", "1.2.0"),
        ("v7", "7.0.0"),
        ("1.2.3.0.0", "1.2.3"),
        ("0.1.0a1", "0.1.0-alpha.1"),
        ("1.2.3b4", "1.2.3-beta.4"),
        ("1.2.3-RC.4", "1.2.3-rc.4"),
        ("1.2.3c4", "1.2.3-rc.4"),
        ("1.2.3.dev4", "1.2.3-0.dev.4"),
        ("1.2.3.dev4+local.7", "1.2.3-0.dev.4+local.7"),
        ("1.2.3a4.dev5", "1.2.3-alpha.4+dev.5"),
        ("1.2.3.post4", "1.2.3+post.4"),
        ("1.2.3a4.post5", "1.2.3-alpha.4+post.5"),
        ("1.2.3rc4.post5.dev6+abc", "1.2.3-rc.4+post.5.dev.6.abc"),
        ("1.2.3+Ubuntu-1", "1.2.3+ubuntu.1"),
        ("1.2.3.post4.dev5", "1.experimental.2.experimental.3.experimental"),
        ("1.2.3.post4.dev5+local", "1.experimental.2.experimental.3.experimental"),
    ],
)
def test_a_python_version_is_said(text: str, expected: str) -> None:
    """With its state, and what SemVer cannot order as build."""
    version = SemverX.from_pep440(text)
    assert str(version) == expected
    assert version.six_parts() == semverx_of(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1!2.0", "has an epoch"),
        ("1.2.3.4", "more than three numbers"),
        ("1.2.3-alpha-beta", "is not written as PEP 440 says"),
        ("latest", "is not written as PEP 440 says"),
        ("", "is empty"),
        (" 1.0", r"U\+0020"),
        ("1.0.po\u017ft1", r"U\+017F"),
        ("9007199254740992.0", "major number above"),
        ("1.0a9007199254740992", "pre-release number above"),
        ("1.0+" + "a" * 252, "256"),
        ("1.0+" + "a" * 260, "264 characters"),
    ],
)
def test_a_python_version_that_cannot_be_said_is_refused(text: str, why: str) -> None:
    """Rather than to say something else."""
    with pytest.raises(InvalidVersion, match=why):
        SemverX.from_pep440(text)


def optional(pattern: str) -> st.SearchStrategy[str]:
    return st.one_of(st.just(""), st.integers(0, 3).map(pattern.format))


pep440 = st.builds(
    "{}{}{}{}{}".format,
    st.lists(small, min_size=1, max_size=3).map(lambda release: ".".join(map(str, release))),
    st.one_of(*map(optional, ["a{}", "b{}", "rc{}"])),
    optional(".post{}"),
    optional(".dev{}"),
    optional("+l.{}"),
)


@given(pep440, pep440)
def test_the_order_of_python_versions_is_never_turned_around(one: str, other: str) -> None:
    """And it is kept strictly between versions that are said without build; the state is packaging's."""
    lower, higher = sorted([one, other], key=Version)
    low, high = SemverX.from_pep440(lower), SemverX.from_pep440(higher)
    assert low <= high
    assert (low.state is X) is Version(lower).is_prerelease
    if not re.search(r"post|\+|(a|b|rc)\d\.dev", lower + " " + higher):
        assert (low < high) is (Version(lower) < Version(higher))


def test_the_version_of_an_installed_distribution_is_found() -> None:
    """As packaging has it; any spelling of the name will do."""
    found = installed("packaging")
    assert found.identical(SemverX.from_pep440(importlib.metadata.version("packaging")))
    assert installed("PyBustCall").six_parts() == semverx_of(importlib.metadata.version("pybustcall"))


@pytest.mark.parametrize("name", ["no-such-distribution-anywhere", "", "a b", None, "../x"])
def test_a_distribution_that_is_not_installed_has_no_version(name: Any) -> None:
    """The same error as for a version that cannot be read."""
    with pytest.raises(InvalidVersion, match="distribution"):
        installed(name)


# Hot-swap


def test_the_swap_table_has_every_pair_and_only_known_needs() -> None:
    """Nine pairs; what is needed is an argument, or the same major number."""
    assert set(HOT_SWAP) == set(product(State, State))
    assert {need for needs in HOT_SWAP.values() for need in needs} == {"same_major", *FLAGS}
    assert all(HOT_SWAP.values())


@pytest.mark.parametrize("pair", HOT_SWAP, ids=" to ".join)
@pytest.mark.parametrize("major", [1, 2])
def test_a_part_passes_iff_all_that_its_pair_takes_is_given(pair: tuple[State, State], major: int) -> None:
    """Over all sixteen settings of the arguments; the other parts are stable and pass within the major number."""
    before, after = pair
    for part, given_flags in product(range(3), product([False, True], repeat=4)):
        flags = dict(zip(FLAGS, given_flags, strict=True))
        old, new = (["stable"] * part + [state] + ["stable"] * (2 - part) for state in (before, after))
        verdict = can_hot_swap(
            ".".join(f"1.{state}" for state in old),
            ".".join(f"{number}.{state}" for number, state in zip((major, 1, 1), new, strict=True)),
            **flags,
        )
        fulfilled = flags | {"same_major": major == 1}
        name = ("major", "minor", "patch")[part]
        assert (name in verdict.failed) is (not all(fulfilled[need] for need in HOT_SWAP[pair]))
        others = {"major", "minor", "patch"} - {name}
        assert others & set(verdict.failed) == (set() if major == 1 else others)


@pytest.mark.parametrize(
    ("current", "candidate", "flags", "reasons"),
    [
        ("2.1.0", "2.2.0", {}, [f"{part}: stable to stable within major 2" for part in ("major", "minor", "patch")]),
        (
            "2.1.0",
            "2.stable.2.experimental.0.stable",
            {},
            ["minor: stable to experimental takes allow_experimental"],
        ),
        (
            "2.stable.1.stable.0.experimental",
            "3.0.0",
            {},
            [
                "major: stable to stable takes a candidate of major 2",
                "minor: stable to stable takes a candidate of major 2",
                "patch: experimental to stable takes a candidate of major 2 and validated",
            ],
        ),
        (
            "2.legacy.1.experimental.0.stable",
            "2.stable.1.stable.0.legacy",
            {"migrate": True, "validated": True, "rollback": True},
            [
                "major: legacy to stable with migrate",
                "minor: experimental to stable within major 2 with validated",
                "patch: stable to legacy with rollback",
            ],
        ),
    ],
)
def test_a_verdict_gives_its_reasons(current: str, candidate: str, flags: dict[str, bool], reasons: list[str]) -> None:
    """Why it may be, or what it would take."""
    assert list(can_hot_swap(parse(current), candidate, **flags).reasons) == reasons


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", ["no", "", 1, 0, None])
def test_a_flag_is_true_or_false(flag: str, value: object) -> None:
    """What only seems so is refused by name: "no" is no opting in."""
    flags: dict[str, Any] = {flag: value}
    with pytest.raises(InvalidRequest, match=f"{flag} must be true or false, not {type(value).__name__}") as caught:
        can_hot_swap("1.0.0", "1.1.0", **flags)
    assert caught.value.field == flag


def test_a_new_major_of_something_stable_is_not_swapped_in_one_step() -> None:
    """Whatever is given."""
    verdict = can_hot_swap("1.9.0", "2.0.0", **dict.fromkeys(FLAGS, True))
    assert not verdict
    assert verdict.failed == ("major", "minor", "patch")


def test_a_new_major_is_swapped_by_way_of_an_experimental_version() -> None:
    """The steps are those of the page, and none of them goes without what the page has it take."""
    section = PAGE.partition("\n## Hot-swap\n")[2]
    steps = re.findall(r"^\d\. from `([^`]+)` to `([^`]+)` with `([^`]+)`$", section, re.MULTILINE)
    assert [steps[0][0], steps[-1][1]] == ["1.9.0", "2.0.0"]
    assert [step[0] for step in steps[1:]] == [step[1] for step in steps[:-1]]
    for current, candidate, flag in steps:
        assert can_hot_swap(current, candidate, **{flag: True})
        assert not can_hot_swap(current, candidate)


def test_a_swap_of_what_is_no_version_is_an_error() -> None:
    """Neither a yes nor a no."""
    with pytest.raises(InvalidVersion):
        can_hot_swap("1.2.3", "^1.2.3")


# Hostile texts


def refusal_of(read: Reader, text: str) -> str | None:
    """Tell why a text is refused, or None if it is read."""
    try:
        read(text)
    except InvalidVersion as refusal:
        return str(refusal)
    return None


def calls_of(read: Reader, text: str) -> int:
    """Count the calls, of Python and C functions, that it takes to read or refuse a text."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    gc.disable()  # Hypothesis listens to the collector, and would be counted
    sys.setprofile(note)
    try:
        refusal_of(read, text)
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


HOSTILE = [
    "{",
    "1.",
    "1",
    "{stable|",
    "1.x||",
    "||",
    "|",
    ",",
    "* ",
    " ",
    ">",
    "> ",
    "-",
    "1.2.3-a.",
    "@",
    "\u0661",
    "\u017f",
    "\ud800",
    "\x00",
    "1.2.3+",
    "*.{stable|legacy}.",
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("piece", HOSTILE, ids=ascii)
def test_a_text_of_megabytes_is_refused_by_its_length(read: Reader, piece: str) -> None:
    """With the same few calls as one of kilobytes, and an error that does not repeat it."""
    kilobytes, megabytes = (piece * (size // len(piece)) for size in (4_000, 4_000_000))
    assert calls_of(read, megabytes) == calls_of(read, kilobytes) < 30
    with pytest.raises(InvalidVersion, match=f"{len(megabytes)} characters, which is more than") as refusal:
        read(megabytes)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("piece", HOSTILE, ids=ascii)
def test_a_text_within_the_limits_takes_few_calls(read: Reader, piece: str) -> None:
    """Fewer than so many for each of its characters, however it is made."""
    for most in (MAX_VERSION_CHARACTERS, MAX_RANGE_CHARACTERS):
        for start in ("", "1.2.3-", "^1.2.3 || ", "name@"):
            text = (start + piece * most)[:most]
            assert calls_of(read, text) < 20 * most


def test_no_pattern_repeats_a_repetition() -> None:
    """So none can take more than linear time: no group with a repetition in it is repeated."""
    for name, pattern in semverx._PATTERNS.items():
        plain = re.sub(r"\[(\\.|[^\]])*\]", "c", pattern)
        assert not re.search(r"[*+][^()]*\)[*+]", plain), name


# The page


def grammar() -> dict[str, str]:
    """Read the page's rules, with the other rules put in."""
    block = re.search(r"^```grammar\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert block is not None
    rules: dict[str, str] = {}
    for line in block[1].splitlines():
        name, rule = line.split(maxsplit=1)
        rules[name] = re.sub(r"<([a-z]+)>", lambda found: f"(?:{rules[found[1]]})", rule)
    return rules


@functools.cache
def documented(rule: str) -> re.Pattern[str]:
    return re.compile(grammar()[rule].replace("(?i:", "(?ai:"))


def test_the_patterns_of_the_page_are_those_of_the_code() -> None:
    """Word for word, where both have them."""
    rules = grammar()
    for name, rule in {"number": "number", "identifier": "identifier", "name": "visible"}.items():
        assert semverx._PATTERNS[name] == rules[rule], name


LIMITS = "which is more than|above 2.53-1|names a state twice"
soup = st.text(st.sampled_from("012x*v.-+ab{}|,<>=^~ @/"), max_size=14)
words = st.lists(
    st.sampled_from(
        [
            *"01x*....,|@a/-=^~ ",
            "01",
            "v1",
            "||",
            ">=",
            ">",
            "-rc",
            "+b",
            "stable",
            "Legacy",
            "{stable|legacy}",
            "{stable",
        ]
    ),
    max_size=14,
).map("".join)
vector_texts = st.sampled_from(
    [
        vector["text"]
        for vector in VERSIONS["valid"] + VERSIONS["invalid"] + RANGES["invalid"]
        if len(vector["text"]) < 80
    ]
    + [vector["range"] for vector in RANGES["matches"]]
    + [vector["spec"] for vector in RANGES["specs"] + RANGES["invalid_specs"] if len(vector["spec"]) < 80]
)
spliced = st.builds(
    lambda one, cut, more, other: one[:cut] + more + other[cut:], vector_texts, st.integers(0, 12), soup, vector_texts
)


@pytest.mark.requirement("RES-04")
@pytest.mark.parametrize(
    ("rule", "read"), [("version", SemverX.parse), ("range", SemverXRange.parse), ("spec", Spec.parse)], ids=str
)
@given(text=st.one_of(soup, words, vector_texts, spliced, texts, range_texts))
def test_the_grammar_of_the_page_takes_what_the_code_takes(rule: str, read: Reader, text: str) -> None:
    """Both read a text or both refuse it, but for the limits that the page names beside the grammar."""
    told = documented(rule).fullmatch(text) is not None
    refused = refusal_of(read, text)
    assert told is (refused is None) or (told and refused is not None and re.search(LIMITS, refused))


def test_the_swap_table_of_the_page_is_that_of_the_code() -> None:
    """Row by row, in order."""
    rows = re.findall(
        r"^\| (stable|legacy|experimental) \| (stable|legacy|experimental) \| (.*) \|$", PAGE, re.MULTILINE
    )
    assert [((State(one), State(other)), tuple(needs.split(", "))) for one, other, needs in rows] == list(
        HOT_SWAP.items()
    )


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    """Each number stands there."""
    plain = " ".join(PAGE.split())
    assert MAX_NUMBER == 2**53 - 1
    assert f"at most {MAX_VERSION_CHARACTERS} characters, and no space" in plain
    assert f"at most {MAX_RANGE_CHARACTERS} characters and {MAX_ALTERNATIVES} alternatives" in plain
    assert f"1 to {semverx.MAX_NAME_BYTES} bytes of UTF-8" in plain


def test_the_example_of_the_page_says_what_its_comments_say() -> None:
    """Line by line."""
    block = re.search(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert block is not None
    scope: dict[str, Any] = {}
    exec(block[1], scope)
    assert scope["version"].state is X
    told = [line.split("  # ") for line in block[1].splitlines() if "  # " in line]
    assert [(str(eval(code, scope)), comment) for code, comment in told[1:4]] == [
        (comment, comment) for _, comment in told[1:4]
    ]


@pytest.mark.requirement("RES-04")
def test_the_python_versions_of_the_page_are_said_so() -> None:
    """The table's first and second column."""
    rows = re.findall(r"^\| (`[^|]*) \| (`[^|]*|refused) \|", PAGE[PAGE.index("## Python versions") :], re.MULTILINE)
    assert len(rows) == 9
    for left, right in rows:
        pythons, ours = (re.findall(r"`([^`]+)`", cell) for cell in (left, right))
        for place, text in enumerate(pythons):
            whole = text if text[0].isdigit() else f"1.2.3{text}"
            if right == "refused":
                with pytest.raises(InvalidVersion):
                    SemverX.from_pep440(whole)
                continue
            expected = ours[min(place, len(ours) - 1)]
            assert str(SemverX.from_pep440(whole)) == (expected if expected[0].isdigit() else f"1.2.3{expected}")
