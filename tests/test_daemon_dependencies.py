"""Cache dependencies: what announcements, specs and swaps come to, by values alone."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pybustcall.daemon.dependencies import (
    MOST_DEPENDENCIES,
    MOST_VERSIONS,
    Change,
    Dependency,
    NotCurrent,
    RegistryFull,
    SwapRefused,
    Unreadable,
    Unresolved,
    announced,
    judged,
    resolved,
    restored,
    with_version,
)
from pybustcall.models import AnnounceRequest, HotSwapReply, HotSwapRequest, SwapItem
from pybustcall.semverx import State

MODEL = Dependency("pricing-model", "1.0.0", ("1.0.0", "1.1.0", "2.0.0"))
KNOWN = {"pricing-model": MODEL, "templates": Dependency("templates", "1.0.0", ("1.0.0",))}


def announce(known: Dependency | None = None, count: int = 0, **fields: Any) -> Dependency:
    return announced(AnnounceRequest.model_validate({"name": "pricing-model", **fields}), known, count)


def swap(*items: dict[str, Any]) -> tuple[Change, ...]:
    return judged(HotSwapRequest.model_validate({"swaps": items}), KNOWN)


def refusals(*items: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(SwapRefused) as caught:
        swap(*items)
    return caught.value.unmet


# Announcements


def test_the_first_announcement_takes_the_best_version_as_current() -> None:
    """Stable before experimental; and keeps all of them in ascending order, each once, in canonical form."""
    told = announce(versions=["2.0.0-rc.1", "v1.10.0", "1.9.0", "1.stable.9.stable.0.stable"])
    assert told == Dependency("pricing-model", "1.10.0", ("1.9.0", "1.10.0", "2.0.0-rc.1"))


def test_the_first_announcement_may_say_what_is_current() -> None:
    """Which is known from then on, whether it was listed or not."""
    assert announce(versions=["1.0.0", "2.0.0"], current="v1.0.0").current == "1.0.0"
    assert announce(versions=["2.0.0"], current="1.0.0").versions == ("1.0.0", "2.0.0")


def test_later_announcements_add_versions_and_leave_the_current_one() -> None:
    """Whatever is highest; and one that says nothing new changes nothing."""
    told = announce(MODEL, versions=["9.0.0", "1.0.0"])
    assert told == Dependency("pricing-model", "1.0.0", ("1.0.0", "1.1.0", "2.0.0", "9.0.0"))
    assert announce(told, versions=["9.0.0"], current="1.0.0") is told


def test_only_a_swap_changes_the_current_version() -> None:
    """The refusal tells which it is."""
    with pytest.raises(NotCurrent, match=r"the current version is 1\.0\.0; only a hot swap changes it"):
        announce(MODEL, versions=["2.0.0"], current="2.0.0")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "two words", "versions": ["1.0.0"]}, "name"),
        ({"name": "a@b", "versions": ["1.0.0"]}, "name"),
        ({"versions": ["1.0.0", "one"]}, "versions.1"),
        ({"versions": ["1.0.0"], "current": "x"}, "current"),
    ],
)
def test_what_cannot_be_read_is_named_and_not_repeated(fields: dict[str, Any], field: str) -> None:
    """A name that no spec could say is refused, too."""
    with pytest.raises(Unreadable) as caught:
        announce(**fields)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} is not a")


def test_there_are_only_so_many_dependencies() -> None:
    """A further one is refused, more about those that there are is not."""
    assert announce(count=MOST_DEPENDENCIES - 1, versions=["1.0.0"]).versions == ("1.0.0",)
    with pytest.raises(RegistryFull, match="the most dependencies that it may have, 10000"):
        announce(count=MOST_DEPENDENCIES, versions=["1.0.0"])
    assert announce(MODEL, MOST_DEPENDENCIES, versions=["3.0.0"]).versions[-1] == "3.0.0"


FULL = with_version(MODEL, *(f"1.2.{number}" for number in range(MOST_VERSIONS - 3)))
"""As many versions as may be: 1.0.0, which is current, then 1.1.0, 1.2.0 to 1.2.252, and 2.0.0."""


def test_a_new_version_takes_the_place_of_the_lowest() -> None:
    """But not of the current one, nor of one that the same announcement names, whatever they are."""
    assert announce(FULL, versions=["1.2.7"]) is FULL
    told = announce(FULL, versions=["1.3.0", "0.1.0", "1.2.0"])
    assert len(told.versions) == MOST_VERSIONS
    assert set(FULL.versions) - set(told.versions) == {"1.1.0", "1.2.1"}
    assert set(told.versions) - set(FULL.versions) == {"1.3.0", "0.1.0"}
    assert told.versions[:3] == ("0.1.0", "1.0.0", "1.2.0")


def test_a_version_that_an_unfinished_swap_names_goes_last() -> None:
    """It goes all the same if nothing else can, so that there never are more."""
    assert "1.1.0" in with_version(FULL, "3.0.0", spared={"1.1.0"}).versions
    told = with_version(FULL, "3.0.0", spared=FULL.versions)
    assert set(FULL.versions) - set(told.versions) == {"1.1.0"}


def test_an_announcement_of_more_than_may_be_known_is_refused() -> None:
    """The current one counts, too; as many as may be take the place of all others."""
    many = [f"3.0.{number}" for number in range(MOST_VERSIONS)]
    assert announce(FULL, versions=many[1:]).versions == ("1.0.0", *many[1:])
    with pytest.raises(Unreadable, match="at most 256 versions, the current one counted in") as caught:
        announce(FULL, versions=many)
    assert caught.value.field == "versions"


def test_what_was_written_down_is_read_back() -> None:
    """In canonical form and order, however somebody wrote it; and what cannot have been written is refused."""
    assert restored("model", "v1.0.0", ["2.0.0", "1.10.0", "1.9.0"]) == Dependency(
        "model", "1.0.0", ("1.0.0", "1.9.0", "1.10.0", "2.0.0")
    )
    for name, current, versions in (("two words", "1.0.0", []), ("model", "one", []), ("model", "1.0.0", ["one"])):
        with pytest.raises(Unreadable):
            restored(name, current, versions)


# Resolution


def test_a_spec_means_the_best_known_version() -> None:
    """Not the current one."""
    spec, version = resolved("pricing-model@^1.0.0", KNOWN)
    assert (spec.name, str(version), version.state) == ("pricing-model", "1.1.0", State.STABLE)


def test_a_spec_that_cannot_be_read_is_named() -> None:
    """The field, not its text."""
    with pytest.raises(Unreadable) as caught:
        resolved("pricing-model@private", KNOWN)
    assert caught.value.field == "spec"
    assert "private" not in str(caught.value)


def test_what_does_not_resolve_tells_what_is_known() -> None:
    """The highest versions, and how many more there are."""
    with pytest.raises(Unresolved, match="no dependency of that name"):
        resolved("private@*", KNOWN)
    with pytest.raises(Unresolved, match=r"known are 1\.0\.0, 1\.1\.0, 2\.0\.0$"):
        resolved("pricing-model@^3.0.0", KNOWN)
    many = with_version(MODEL, *(f"2.0.{number}" for number in range(1, 31)))
    with pytest.raises(Unresolved, match=r"known are 2\.0\.11, .*, 2\.0\.30 and 13 lower ones$"):
        resolved("pricing-model@^3.0.0", {"pricing-model": many})


# Swaps


def test_a_swap_that_may_be_tells_its_changes() -> None:
    """To a version that is not known yet, too; and any spelling of `from` will do."""
    assert swap({"name": "pricing-model", "from": "v1.0.0", "to": "1.1.0"}, {"name": "templates", "to": "v1.2.3"}) == (
        Change("pricing-model", "1.0.0", "1.1.0"),
        Change("templates", "1.0.0", "1.2.3"),
    )


@pytest.mark.requirement("IMP-12")
def test_the_rules_of_semverx_decide_and_are_told() -> None:
    """One sentence for each rule that is broken, with the parts that break it; and each opt-in opens its rule."""
    experimental = "1.stable.1.experimental.0.stable"
    (told,) = refusals({"name": "pricing-model", "to": experimental})
    assert told == "pricing-model: minor: stable to experimental takes allow_experimental"
    assert swap({"name": "pricing-model", "to": experimental, "allow_experimental": True})
    assert refusals({"name": "pricing-model", "to": "1.1.0-rc.1"}) == (
        "pricing-model: major, minor, patch: stable to experimental takes allow_experimental",
    )
    assert refusals({"name": "pricing-model", "to": "2.stable.0.stable.0.legacy"}) == (
        "pricing-model: major, minor: stable to stable takes a candidate of major 1",
        "pricing-model: patch: stable to legacy takes rollback",
    )


def test_every_reason_against_a_swap_is_told() -> None:
    """Of all its dependencies at once; the text has the first."""
    told = refusals(
        {"name": "private", "to": "1.0.0"},
        {"name": "templates", "from": "0.9.0", "to": "1.1.0"},
        {"name": "pricing-model", "to": "2.0.0"},
        {"name": "pricing-model", "to": "1.1.0"},
    )
    assert told[:3] == (
        "pricing-model: is named 2 times",
        "private: was not announced",
        "templates: the current version is 1.0.0, not 0.9.0",
    )
    assert told[3:] == ("pricing-model: major, minor, patch: stable to stable takes a candidate of major 1",)
    assert str(SwapRefused(told)).endswith(f"{told[0]} (and {len(told) - 1} more)")
    assert str(SwapRefused(told[:1])).endswith(told[0])


@pytest.mark.parametrize("field", ["to", "from"])
def test_a_version_of_a_swap_that_cannot_be_read_is_named(field: str) -> None:
    """With its place in the list."""
    good = {"name": "templates", "to": "1.0.0"}
    with pytest.raises(Unreadable) as caught:
        swap(good, {"name": "pricing-model", "to": "1.1.0", field: "1.x"})
    assert caught.value.field == f"swaps.1.{field}"


@pytest.mark.parametrize("name", ["two words", "tab\t", "\u202epricing-model", "a@b"])
def test_a_name_of_a_swap_that_cannot_be_read_is_named_and_not_repeated(name: str) -> None:
    """With its place in the list, as an announcement's is, also if it is there twice."""
    with pytest.raises(Unreadable) as caught:
        swap({"name": "templates", "to": "1.0.0"}, {"name": name, "to": "1.0.0"}, {"name": name, "to": "1.0.0"})
    assert caught.value.field == "swaps.1.name"
    assert name not in str(caught.value)


def test_a_swap_may_go_to_a_version_beyond_those_that_may_be_known() -> None:
    """Another makes room for it."""
    request = HotSwapRequest.model_validate({"swaps": [{"name": "pricing-model", "to": "1.3.0"}]})
    assert judged(request, {"pricing-model": FULL}) == (Change("pricing-model", "1.0.0", "1.3.0"),)


def test_only_the_names_of_the_wire_are_fields() -> None:
    """`from_` is Python's name for `from`; on the wire it is an unknown field, ignored, in requests and replies."""
    assert swap({"name": "pricing-model", "from_": "9.9.9", "to": "1.1.0"})
    both = {"name": "pricing-model", "from_": "1.0.0", "from": "9.9.9", "to": "1.1.0"}
    assert refusals(both) == ("pricing-model: the current version is 1.0.0, not 9.9.9",)
    for swaps in ('[{"name": "a", "from_": "1.0.0", "to": "1.1.0"}]', "7", "[7]"):
        with pytest.raises(ValidationError):
            HotSwapReply.model_validate_json(f'{{"committed": true, "swaps": {swaps}}}')
    assert HotSwapRequest(swaps=(SwapItem(name="a", to="1.1.0", from_="1.0.0"),)).swaps[0].from_ == "1.0.0"
