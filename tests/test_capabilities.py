"""What each side can do, what it requires of the other, and when a daemon's document has to be asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import pybustcall
from pybustcall.capabilities import (
    BASE,
    LIFETIME,
    SEMVERX,
    Agreement,
    DaemonCapabilities,
    advertised_digest,
    advertisement,
    advertisement_bytes,
    check_requirements,
    digest_of,
    unmet,
)
from pybustcall.errors import ConfigurationError, InvalidVersion
from pybustcall.models import BindingCapabilities, CapabilityDocument, Requirements
from pybustcall.semverx import SemverX

ROOT = Path(__file__).parent.parent
URL = "http://127.0.0.1:8989"
ANY = Requirements()
STABLE = "*.stable.*.stable.*.stable"


def capabilities(digest: str = "sha256:1", **fields: object) -> DaemonCapabilities:
    """Make what a daemon with a document of these fields says."""
    document = CapabilityDocument.model_validate({"binding": "test", "capabilities": sorted(BASE), **fields})
    return DaemonCapabilities(URL, document=document, digest=digest, etag=f'"{digest}"')


def test_a_digest_is_that_of_the_bytes() -> None:
    """Of ours: the very bytes of capabilities.json."""
    assert digest_of(b"{}") == "sha256:" + hashlib.sha256(b"{}").hexdigest()
    assert advertisement_bytes() == (ROOT / "capabilities.json").read_bytes()
    assert advertised_digest() == digest_of(advertisement_bytes())
    assert CapabilityDocument.model_validate_json(advertisement_bytes()) == advertisement()


@pytest.mark.requirement("RES-04")
def test_our_own_document_says_versions_that_are_some() -> None:
    """Its SemverX parses, and is the one that every request carries."""
    assert advertisement().semverx == SEMVERX
    assert SemverX.parse(SEMVERX).states == ("experimental",) * 3
    assert check_requirements(advertisement().requires) is advertisement().requires


@pytest.mark.requirement("IMP-07")
@pytest.mark.parametrize(
    ("requires", "semverx", "has", "lacks"),
    [
        (ANY, None, set(), ()),
        (ANY, "nonsense", set(), ()),
        (Requirements(semverx="^1.0.0"), "1.4.2", set(), ()),
        (Requirements(semverx="^1.0.0"), "v1.4.2", set(), ()),
        (Requirements(semverx="^1.0.0"), "2.0.0", set(), ("version 2.0.0 does not match ^1.0.0",)),
        (Requirements(semverx="^1.0.0"), None, set(), ("its version is not known, and ^1.0.0 is required",)),
        (Requirements(semverx="^1.0.0"), "nonsense", set(), ("its version is none, and ^1.0.0 is required",)),
        (Requirements(semverx=STABLE), SEMVERX, set(), (f"version {SEMVERX} does not match {STABLE}",)),
        (Requirements(capabilities=("a", "b")), None, {"b"}, ("capability a is missing",)),
        (
            Requirements(semverx=">=9", capabilities=("a",)),
            "1.0.0",
            set(),
            ("version 1.0.0 does not match >=9", "capability a is missing"),
        ),
    ],
)  # fmt: skip
def test_what_is_unmet_is_named(
    requires: Requirements, semverx: str | None, has: set[str], lacks: tuple[str, ...]
) -> None:
    """A sentence for each requirement; a version that is not known meets only the range "*"."""
    assert unmet(requires, semverx, has) == lacks


def test_a_range_that_is_none_is_refused_where_it_enters() -> None:
    """As a setting, with its name; as a document of somebody else's, as what it is."""
    with pytest.raises(ConfigurationError, match="semverx: ") as caught:
        check_requirements(Requirements(semverx="^"))
    assert caught.value.setting == "requires"
    for name in ("", "a b"):
        with pytest.raises(ConfigurationError, match="is not the name of a capability"):
            check_requirements(Requirements(capabilities=(name,)))
    with pytest.raises(InvalidVersion):
        unmet(Requirements(semverx="^"), "1.0.0", ())


def test_a_daemon_without_a_document_is_base_only() -> None:
    """What its bindings can do is shown, and not relied on."""
    bindings = {"rust": BindingCapabilities(binding="rust", capabilities=("cache.bust", "cache.bust.tag"))}
    found = DaemonCapabilities(URL, bindings=bindings)
    assert found.base_only
    assert found.names == {"cache.bust", "cache.bust.tag"}
    assert found.supports("cache.bust")
    assert not found.supports("cache.bust.tag")
    assert found.usable == BASE


def test_a_daemon_with_a_document_has_what_it_says() -> None:
    """And nothing that it does not say, be it of the base."""
    found = capabilities(capabilities=["cache.bust.tag"])
    assert not found.base_only
    assert found.supports("cache.bust.tag")
    assert not found.supports("cache.bust")
    assert found.usable == found.names == {"cache.bust.tag"}


# Agreements


def test_nothing_is_asked_for_a_request_that_needs_nothing() -> None:
    """A base bust by a client without requirements waits for no document, be it unknown or old."""
    agreement = Agreement([ANY])
    assert not agreement.must_ask(0.0)
    assert not agreement.must_ask(0.0, ["cache.bust"])
    agreement.learned(capabilities(), 0.0)
    assert not agreement.must_ask(LIFETIME + 1)


def test_a_document_is_good_for_its_lifetime() -> None:
    """Then it is asked for again, and may be the same."""
    agreement = Agreement([ANY])
    assert agreement.must_ask(0.0, ["cache.bust.tag"])
    agreement.learned(capabilities(), 0.0)
    assert not agreement.must_ask(LIFETIME - 1, ["cache.bust.tag"])
    assert agreement.must_ask(LIFETIME, ["cache.bust.tag"])
    agreement.learned(capabilities(), LIFETIME)
    assert not agreement.must_ask(LIFETIME + 1, ["cache.bust.tag"])


@pytest.mark.parametrize("requires", [Requirements(semverx=">=0.1"), Requirements(capabilities=("cache.bust.tag",))])
def test_a_client_that_requires_something_asks_first(requires: Requirements) -> None:
    """Also for a base bust."""
    assert Agreement([ANY, requires]).must_ask(0.0)


@pytest.mark.parametrize("requires", [ANY, Requirements(semverx=" * "), Requirements(capabilities=("cache.bust",))])
def test_what_every_daemon_has_is_no_requirement(requires: Requirements) -> None:
    """Nothing is asked for it."""
    assert not Agreement([requires]).must_ask(0.0)


def test_an_answer_with_another_digest_makes_the_document_old() -> None:
    """At most one question a second comes of that; the same digest, and none, say nothing."""
    agreement = Agreement([ANY])
    assert not agreement.heard("sha256:1", 0.0)  # never asked for, so not missed
    agreement.asked(0.0)
    agreement.learned(capabilities("sha256:1"), 0.0)
    assert not agreement.heard("sha256:1", 5.0)
    assert not agreement.heard(None, 5.0)
    assert agreement.is_fresh(5.0)
    assert agreement.heard("sha256:2", 5.0)
    assert not agreement.is_fresh(5.0)
    agreement.asked(5.0)
    agreement.learned(capabilities("sha256:2"), 5.0)
    assert not agreement.heard("sha256:1", 5.9)
    assert agreement.is_fresh(5.9)
    assert agreement.heard("sha256:1", 6.0)


def test_what_a_request_needs_and_the_daemon_does_not_advertise_is_named() -> None:
    """Sorted; of a daemon that is not known, what is beyond the base."""
    agreement = Agreement([ANY])
    assert agreement.lacking(["cache.bust"]) == ()
    assert agreement.lacking(["z", "a"]) == ("it does not advertise a", "it does not advertise z")
    agreement.learned(capabilities(capabilities=["a"], access={"y": "private"}), 0.0)
    assert agreement.lacking(["z", "a", "y"]) == ("it keeps y private", "it does not advertise z")


@pytest.mark.requirement("IMP-10")
def test_a_daemon_that_does_not_meet_our_requirements_is_a_misfit_until_it_changes() -> None:
    """It is asked again after 30 seconds; each requirement is named once."""
    needy = Requirements(semverx=">=2", capabilities=("cache.bust.tag",))
    agreement = Agreement([needy, needy])
    agreement.learned(capabilities(semverx="1.0.0"), 0.0)
    told = "version 1.0.0 does not match >=2; capability cache.bust.tag is missing"
    assert agreement.misfit == f"it does not meet what this client requires: {told}"
    assert not agreement.must_ask(29.0)
    assert agreement.must_ask(30.0)
    agreement.learned(capabilities("sha256:2", semverx="2.0.0", capabilities=["cache.bust.tag"]), 30.0)
    assert agreement.misfit == ""


@pytest.mark.requirement("IMP-10")
@pytest.mark.parametrize(
    ("requires", "says"),
    [
        ({"semverx": ">=99"}, f"version {SEMVERX} does not match >=99"),
        ({"capabilities": ["cache.telepathy"]}, "capability cache.telepathy is missing"),
        ({"semverx": "^^"}, "what it requires of its clients cannot be read"),
    ],
)
def test_a_daemon_whose_requirements_we_do_not_meet_is_a_misfit(requires: dict[str, object], says: str) -> None:
    """Its own document says so, and a daemon without one requires nothing."""
    agreement = Agreement([ANY])
    agreement.learned(capabilities(requires=requires), 0.0)
    assert says in agreement.misfit
    agreement.learned(DaemonCapabilities(URL), 1.0)
    assert agreement.misfit == ""


def test_a_refusal_stands_until_the_document_changes_or_half_a_minute_has_passed() -> None:
    """What the daemon says of us counts for more than what its document lets us expect."""
    agreement = Agreement([ANY])
    agreement.learned(capabilities(), 0.0)
    agreement.refused("too old for it", (), 1.0)
    assert agreement.misfit == "it refused this client before: too old for it"
    assert not agreement.must_ask(30.0)
    assert agreement.must_ask(31.0)  # and not only when the document's own time is over
    agreement.learned(capabilities(), 5.0)
    assert agreement.misfit
    agreement.learned(capabilities("sha256:2", version="2"), 6.0)
    assert agreement.misfit == ""
    assert agreement.unmet == ()
    agreement.refused("still", ("version 1 is too old", "capability a is missing"), 10.0)
    assert agreement.misfit.endswith(": version 1 is too old; capability a is missing")
    assert len(agreement.unmet) == 2
    agreement.learned(capabilities("sha256:2", version="2"), 40.0)
    assert agreement.misfit == ""


def test_the_public_names_are_these() -> None:
    """As a user has them."""
    assert pybustcall.Requirements is Requirements
    assert pybustcall.DaemonCapabilities is DaemonCapabilities
