"""The wire models: what is well formed, what is refused, what is ignored."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pybustcall.errors import InvalidRequest
from pybustcall.models import (
    MAX_TARGET_BYTES,
    BindingCapabilities,
    BustReply,
    BustRequest,
    CapabilityDocument,
    JobReply,
    JobsReply,
    RegisterRequest,
    StatusReply,
    Timestamp,
    bust_request,
    cache_key_of,
    check_namespace,
    check_strategy,
    check_target,
    explain,
    redact,
)

KEY = "sha256:" + hashlib.sha256(b"a").hexdigest()

targets = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=200)


@given(targets)
def test_any_text_without_control_characters_is_a_target(target: str) -> None:
    """The client passes such a target through, and the model that a daemon reads it with takes it too."""
    assert check_target(target) == target
    body = bust_request(target, "direct", 6).model_dump_json().encode()
    assert BustRequest.model_validate_json(body).target == target


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("", "is empty"),
        ("a\x00b", r"control character U\+0000 at character 1"),
        ("a\nb", r"U\+000A"),
        ("\x7f", r"U\+007F"),
        ("a\x85", r"U\+0085"),
        ("\x9f", r"U\+009F"),
        ("ab\ud800", "lone surrogate at character 2"),
        ("x" * (MAX_TARGET_BYTES + 1), "has 8193 bytes, which is more than 8192"),
        ("é" * 4097, "has 8194 bytes"),
        (b"bytes", "must be a string, not bytes"),
        (None, "must be a string, not NoneType"),
        (7, "must be a string, not int"),
    ],
)
def test_what_cannot_be_a_target_is_refused_before_anything_is_sent(target: object, why: str) -> None:
    """The error names the field and the reason, holds the target as data, and does not repeat it."""
    with pytest.raises(InvalidRequest, match=why) as caught:
        bust_request(target, "direct", 6)
    assert caught.value.field == "target"
    assert caught.value.target == (target if isinstance(target, str) else None)
    assert "nothing was sent" in str(caught.value)
    assert caught.value.applied == "no"


def test_the_longest_target_is_taken() -> None:
    """8 KiB of UTF-8, counted in bytes."""
    assert check_target("é" * 4096) == "é" * 4096


@pytest.mark.parametrize("target", ["", "a\x00b", "\ud800", "x" * 8193, 7, None, True])
def test_a_daemon_refuses_the_same_targets(target: object) -> None:
    """Client and daemon both check."""
    with pytest.raises(ValidationError):
        BustRequest.model_validate({"target": target})


@pytest.mark.parametrize("tolerance", [-1, 13, 255, True, 6.0, "6"])
def test_a_daemon_refuses_a_tolerance_outside_the_scale(tolerance: object) -> None:
    """An integer 0 to 12 and no bool."""
    with pytest.raises(ValidationError) as caught:
        BustRequest.model_validate({"target": "a", "fault_tolerance": tolerance})
    assert explain(caught.value)[0] == "fault_tolerance"


@pytest.mark.parametrize("strategy", ["", "a\nb", None, "x" * 129])
def test_a_strategy_that_cannot_be_sent_is_refused(strategy: object) -> None:
    """Whether a strategy is known is the daemon's to say, but it must be text."""
    with pytest.raises(InvalidRequest, match="strategy") as caught:
        check_strategy(strategy)
    assert caught.value.field == "strategy"
    assert caught.value.target is None


def test_an_unknown_strategy_is_sent_verbatim() -> None:
    """The client knows no cache logic."""
    assert bust_request("a", "purge-by-moonlight", 6).strategy == "purge-by-moonlight"


@pytest.mark.parametrize("dialect", [{"status": "success"}, {"success": True}, {"status": "success", "success": True}])
def test_both_dialects_of_success_are_read(dialect: dict[str, object]) -> None:
    """server.rs says status "success", other bindings success true; unknown fields are ignored."""
    reply = BustReply.model_validate({**dialect, "cache_key": KEY, "moon": "full"})
    assert reply.answers("a")


@pytest.mark.parametrize(
    "dialect",
    [
        {},
        {"status": "failure"},
        {"success": False},
        {"status": "success", "success": False},
        {"status": "error", "success": True},
        {"success": "true"},
        {"status": None},
    ],
)
def test_a_200_that_does_not_say_success_is_no_reply(dialect: dict[str, object]) -> None:
    """Neither dialect, or one that says no."""
    with pytest.raises(ValidationError):
        BustReply.model_validate({**dialect, "cache_key": KEY})


@pytest.mark.requirement("INT-01")
@pytest.mark.parametrize("stage", [13, 255])
def test_a_byte_beyond_the_scale_says_nothing(stage: int) -> None:
    """The existing daemon echoes an unchecked byte: the bust was done all the same."""
    assert BustReply.model_validate({"status": "success", "cache_key": KEY, "fault_stage": stage}).fault_stage is None


@pytest.mark.parametrize("stage", [-1, 256, True, 6.5, "6"])
def test_a_fault_stage_outside_the_scale_is_a_protocol_error(stage: object) -> None:
    """A reply's fault_stage is an integer 0 to 12."""
    with pytest.raises(ValidationError):
        BustReply.model_validate({"status": "success", "cache_key": KEY, "fault_stage": stage})


def test_a_cache_key_is_verified_when_it_names_a_sha_256() -> None:
    """So a reply for another target is told apart; a key of another kind cannot be."""
    assert cache_key_of("a") == KEY
    assert not BustReply(status="success", cache_key=KEY).answers("b")
    assert not BustReply(status="success", cache_key="sha256:zz").answers("a")
    assert BustReply(status="success", cache_key="md5:1").answers("anything")


def test_a_reply_without_a_cache_key_is_no_reply() -> None:
    """It could belong to any question."""
    with pytest.raises(ValidationError):
        BustReply.model_validate({"status": "success"})


@pytest.mark.parametrize(
    ("text", "instant", "nanosecond"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), 0),
        ("2026-01-02T03:04:05.123456789Z", datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC), 789),
        ("2016-12-31T23:59:60.5Z", datetime(2017, 1, 1, 0, 0, 0, 500000, tzinfo=UTC), 0),
        ("2026-01-02t03:04:05.1z", datetime(2026, 1, 2, 3, 4, 5, 100000, tzinfo=UTC), 0),
        ("2026-01-02T03:04:05.000000001+01:30", datetime(2026, 1, 2, 1, 34, 5, tzinfo=UTC), 1),
    ],
)
def test_timestamps_keep_their_nanoseconds(text: str, instant: datetime, nanosecond: int) -> None:
    """RFC 3339 with 0 to 9 digits of fraction, any zone."""
    assert Timestamp.parse(text) == Timestamp(instant, nanosecond)


@given(st.integers(0, 4_000_000_000 * 10**9))
def test_a_timestamp_survives_printing_and_reading(nanoseconds: int) -> None:
    """Nothing is lost on the wire."""
    stamp = Timestamp.of_nanoseconds(nanoseconds)
    assert Timestamp.parse(str(stamp)) == stamp


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2026-01-02", "2026-01-02T03:04:05", "2026-01-02T03:04:05.1234567890Z", "2026-13-02T03:04:05Z", 7,
     "٢٠٢٦-01-02T03:04:05Z", "2026-01-02T03:04:05.Z", "2026-01-02T03:04:05+99:00",
     "9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00"],
)  # fmt: skip
def test_what_is_no_timestamp_is_refused(text: object) -> None:
    """No zone, no date, ten digits, other digits than ASCII's: a ValueError."""
    with pytest.raises(ValueError, match=r"."):
        Timestamp.parse(text)


def test_a_status_is_read_with_its_history() -> None:
    """Stages beyond the scale are read there, since the existing daemon keeps them."""
    status = StatusReply.model_validate_json(
        b"""{"daemon_pid": 7, "bindings": {"node": {"status": "active", "version": null}}, "cache_size": "1.2MB",
        "fault_history": [{"timestamp": "2026-01-02T03:04:05.123456789Z", "binding": "node", "fault_stage": 255,
        "message": "m", "extra": 1}], "uptime": 5}"""
    )
    assert status.fault_history[0].timestamp.nanosecond == 789
    assert status.fault_history[0].fault_stage == 255
    assert '"2026-01-02T03:04:05.123456789Z"' in status.model_dump_json()


def test_capabilities_of_another_binding_are_read() -> None:
    """What a document does not say has its default; what it says beyond is ignored."""
    document = CapabilityDocument.model_validate({"binding": "lua", "capabilities": ["cache.bust"], "new": {}})
    assert document.fault_tolerance.max_stage == 12
    binding = BindingCapabilities.model_validate(
        {"binding": "rust", "capabilities": ["cache_bust"], "semverx": "v0.1.3", "stage": 2, "p2p_enabled": True}
    )
    assert binding.p2p_enabled


def test_a_registration_checks_every_name_in_it() -> None:
    """A key and what it depends on are targets."""
    assert RegisterRequest(key="a", depends_on=("b",)).depends_on == ("b",)
    with pytest.raises(ValidationError) as caught:
        RegisterRequest.model_validate({"key": "a", "depends_on": ["b", "\x00"]})
    assert explain(caught.value) == ("depends_on", "target has the control character U+0000 at character 0")


@given(st.text(max_size=300))
def test_a_redacted_target_tells_equality_and_hides_the_rest(target: str) -> None:
    """Equal targets look equal, and what follows the first segment is not shown."""
    shown = redact(target)
    assert shown == redact(target)
    assert len(shown) <= 43


def test_the_first_segment_is_all_that_a_redacted_target_shows() -> None:
    """A target of one segment shows nothing of itself."""
    assert redact("cdn/secret.css").startswith("cdn/…")
    assert redact("user:4711").startswith("user/…")
    assert redact("secret-token-without-segments").startswith("…")
    assert redact("cdn/a") != redact("cdn/b")


def test_the_repr_of_a_request_shows_a_redacted_target() -> None:
    """Nothing that is logged by accident tells a whole target."""
    assert "secret" not in repr(bust_request("cdn/secret.css", "direct", 6))
    assert "cdn/…" in repr(bust_request("cdn/secret.css", "direct", 6))


# Kinds, soft, namespaces, jobs


@pytest.mark.parametrize(
    "more",
    [
        {"kind": "prefix"},
        {"kind": "tag", "soft": True},
        {"namespace": "eu-1.shop_2"},
        {"dry_run": True},
        {"verify": True, "settle": 0.5},
        {"reason": "price"},
    ],
)
def test_what_is_beyond_the_base_is_on_the_wire_only_where_it_says_something(more: dict[str, Any]) -> None:
    """So that a daemon of the base is asked exactly what it knows; it is read back as it was meant."""
    request = bust_request("a", "direct", 6, **more)
    sent = json.loads(request.wire())
    assert sent.keys() == {"target", "strategy", "binding", "fault_tolerance"} | more.keys()
    assert BustRequest.model_validate(sent) == request


def test_a_base_request_has_four_fields() -> None:
    """As the existing daemon knows them."""
    sent = json.loads(bust_request("a", "direct", 6).wire())
    assert sent == {"target": "a", "strategy": "direct", "binding": "pybustcall", "fault_tolerance": 6}


@pytest.mark.parametrize(
    "more",
    [
        {"kind": "planet"},
        {"kind": "all"},
        {"kind": "all", "confirm": True},
        {"kind": "all", "target": "*"},
        {"soft": 1},
        {"namespace": ""},
        {"namespace": ".hidden"},
        {"namespace": "a" * 65},
        {"settle": -0.1},
        {"settle": 3601},
        {"reason": ""},
        {"reason": "a\nb"},
        {"reason": "é" * 257},
    ],
)
def test_client_and_daemon_refuse_the_same(more: dict[str, Any]) -> None:
    """Each before it does anything."""
    with pytest.raises(ValidationError):
        BustRequest.model_validate({"target": "a", **more})
    asked = {"target": "a", "strategy": "direct", "fault_tolerance": 6, **more}
    with pytest.raises(InvalidRequest, match="nothing was sent"):
        bust_request(**asked)


@pytest.mark.parametrize("namespace", [None, 7, "a/b", "ä", " "])
def test_a_namespace_is_never_guessed(namespace: object) -> None:
    """One that was forgotten must not reach everybody's entries."""
    with pytest.raises(InvalidRequest) as caught:
        check_namespace(namespace)
    assert caught.value.field == "namespace"


def test_everything_is_confirmed() -> None:
    """By its target, and by the word."""
    request = bust_request("*", "direct", 6, kind="all", confirm=True)
    assert BustRequest.model_validate_json(request.wire()) == request


@pytest.mark.parametrize(
    ("said", "well"),
    [
        ({"status": "accepted", "job": "j"}, True),
        ({"status": "accepted", "job": "j", "success": True}, True),
        ({"status": "accepted"}, False),
        ({"status": "accepted", "job": "j", "success": False}, False),
        ({"status": "success", "job": "j"}, True),
        ({"status": "done"}, False),
    ],
)
def test_what_is_accepted_names_its_job(said: dict[str, Any], well: bool) -> None:
    """Otherwise it is no answer."""
    if well:
        reply = BustReply.model_validate({"cache_key": KEY, **said})
        assert reply.accepted is (said["status"] == "accepted")
    else:
        with pytest.raises(ValidationError):
            BustReply.model_validate({"cache_key": KEY, **said})


@pytest.mark.parametrize(
    ("asked", "echo", "field"),
    [
        ({}, {}, ""),
        ({}, {"kind": "key", "soft": False}, ""),
        ({"kind": "tag"}, {"kind": "tag"}, ""),
        ({"kind": "tag"}, {}, "kind"),
        ({"soft": True}, {}, "soft"),
        ({"namespace": "n"}, {"namespace": "m"}, "namespace"),
        ({"dry_run": True}, {}, "dry_run"),
        ({}, {"namespace": "n"}, "namespace"),
        ({"verify": True, "reason": "r", "settle": 1.0}, {}, ""),
    ],
)
def test_an_answer_repeats_what_was_asked(asked: dict[str, Any], echo: dict[str, Any], field: str) -> None:
    """Or it is to something else."""
    reply = BustReply.model_validate({"cache_key": KEY, "status": "success", **echo})
    assert reply.unechoed(bust_request("a", "direct", 6, **asked)) == field


def test_a_job_is_read_with_what_it_may_leave_out() -> None:
    """Later daemons may say more, and an older one less."""
    said = {"job": "j", "state": "running", "target": "a", "kind": "key", "strategy": "direct"}
    job = JobReply.model_validate({**said, "at": "2026-01-02T03:04:05Z", "moon": "full"})
    assert (job.progress.total, job.layers, job.who, job.ended) == (None, (), "anonymous", None)
    listed = JobsReply.model_validate_json(json.dumps({"jobs": [json.loads(job.model_dump_json())]}))
    assert listed.jobs == (job,)
    with pytest.raises(ValidationError):
        JobReply.model_validate({**said, "at": "2026-01-02T03:04:05Z", "state": "lost"})
