"""What a bust needs of a daemon, and what is asked instead: over every request and every daemon there can be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.models import BustRequest, bust_request
from pybustcall.needs import needs_of, phrase_of, remedy_of, widened

NAMES = ("all", "dry_run", "namespace", "prefix", "settle", "soft", "tag", "verify")


def request(kind: str = "key", **more: Any) -> BustRequest:
    """Make a request of that kind."""
    return bust_request("*" if kind == "all" else "a/b", "direct", 6, kind=kind, confirm=kind == "all", **more)


REQUESTS = st.builds(
    request,
    kind=st.sampled_from(["key", "prefix", "tag", "all"]),
    soft=st.booleans(),
    namespace=st.sampled_from([None, "n"]),
    dry_run=st.booleans(),
    verify=st.booleans(),
    settle=st.sampled_from([None, 0.0, 2.0]),
    reason=st.sampled_from([None, "why"]),
)
DAEMONS = st.frozensets(st.sampled_from([f"cache.bust.{name}" for name in NAMES]))


@pytest.mark.parametrize(
    ("asked", "needs"),
    [
        ({}, ()),
        ({"reason": "why"}, ()),
        ({"kind": "prefix"}, ("cache.bust.prefix",)),
        ({"kind": "tag", "soft": True}, ("cache.bust.tag", "cache.bust.soft")),
        ({"kind": "all", "namespace": "n"}, ("cache.bust.all", "cache.bust.namespace")),
        ({"dry_run": True, "verify": True}, ("cache.bust.dry_run", "cache.bust.verify")),
        ({"settle": 0.0}, ("cache.bust.settle",)),
    ],
)
def test_what_a_bust_needs(asked: dict[str, Any], needs: tuple[str, ...]) -> None:
    """Each field beyond the base takes its capability; a reason takes none."""
    assert needs_of(request(**asked)) == needs


@given(REQUESTS)
def test_what_needs_nothing_is_sent_as_a_base_daemon_knows_it(asked: BustRequest) -> None:
    """And nothing else is."""
    extensions = set(asked.model_dump(exclude_defaults=True)) - {"target", "strategy", "reason"}
    assert bool(needs_of(asked)) == bool(extensions)


@pytest.mark.parametrize(
    ("asked", "phrase"),
    [
        ({"kind": "tag", "soft": True}, "a soft bust by tag"),
        ({"kind": "all", "namespace": "n"}, "a bust of everything in a namespace"),
        ({"dry_run": True}, "a dry run of a key"),
        ({"kind": "prefix", "verify": True, "settle": 1.0}, "a bust by prefix with verify and settle"),
    ],
)
def test_a_bust_is_called_by_what_it_needs(asked: dict[str, Any], phrase: str) -> None:
    """So that an error can say what for."""
    assert phrase_of(request(**asked)) == phrase


@pytest.mark.parametrize(
    ("asked", "has", "sent"),
    [
        ({"kind": "tag"}, ("all",), {"kind": "all", "target": "*", "confirm": True}),
        ({"kind": "prefix"}, ("all", "tag"), {"kind": "all", "target": "*", "confirm": True}),
        ({"kind": "tag", "soft": True}, ("tag",), {"soft": False}),
        ({"kind": "tag", "soft": True}, ("soft", "all"), {"kind": "all", "target": "*", "confirm": True}),
        ({"kind": "tag", "namespace": "n"}, ("namespace", "all"), {"kind": "all", "target": "*", "confirm": True}),
        ({"soft": True}, (), {"soft": False}),
        ({"kind": "tag"}, (), None),
        ({"kind": "all"}, ("tag", "prefix"), None),
        ({"namespace": "n"}, ("all",), None),
        ({"kind": "tag", "dry_run": True}, ("dry_run", "all"), None),
        ({"dry_run": True}, ("all",), None),
        ({"verify": True}, ("all",), None),
        ({"settle": 1.0, "soft": True}, ("all",), None),
    ],
)
def test_the_next_wider_bust_that_a_daemon_can_do(
    asked: dict[str, Any], has: tuple[str, ...], sent: dict[str, Any] | None
) -> None:
    """Tag and prefix become everything, soft becomes hard; across namespaces, and for a promise, there is none."""
    found = widened(request(**asked), {f"cache.bust.{name}" for name in has}.__contains__)
    assert found == (None if sent is None else request(**asked).model_copy(update=sent))


@given(REQUESTS, DAEMONS)
def test_what_is_asked_instead_can_be_done_and_reaches_no_other_tenant(asked: BustRequest, has: frozenset[str]) -> None:
    """It needs only what is there; namespace, dry run, verify and settle stay; what can be done stays as it is."""
    found = widened(asked, has.__contains__)
    if set(needs_of(asked)) <= has:
        assert found is asked
    elif found is not None:
        assert set(needs_of(found)) <= has
        for name in ("namespace", "dry_run", "verify", "settle", "reason", "strategy"):
            assert getattr(found, name) == getattr(asked, name)
        assert not found.dry_run
        assert (found.kind, found.target) in {(asked.kind, asked.target), ("all", "*")}
        assert BustRequest.model_validate_json(found.wire()) == found


@given(REQUESTS)
def test_wider_is_offered_only_where_there_may_be_something_wider(asked: BustRequest) -> None:
    """Wherever some daemon could be asked for it instead, and in the words of whoever asks."""
    told = remedy_of(asked.kind, soft=asked.soft, dry_run=asked.dry_run, option="--allow-wider")
    base = {"cache.bust.all", "cache.bust.namespace", "cache.bust.verify", "cache.bust.settle"}
    wider = widened(asked, base.__contains__)
    assert ("With --allow-wider " in told) == (wider is not None and wider != asked)
    assert "wider" not in remedy_of(asked.kind, soft=asked.soft, dry_run=asked.dry_run, option=None)
