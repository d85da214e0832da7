"""The wire models: the vocabulary that client and daemon both speak (docs/reference/protocol.md).

This module decides what is well formed: which targets may be named, which replies are replies at all. It sends and
receives nothing. Requests are strict, since they are ours to get right; replies ignore fields that they do not know,
since daemons of other languages and later versions have more to say.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from pybustcall.errors import InvalidRequest

__all__ = [
    "BINDING",
    "DEFAULT_STRATEGY",
    "DEFAULT_TOLERANCE",
    "MAX_TARGET_BYTES",
    "STRATEGIES",
    "BindingCapabilities",
    "BindingStatus",
    "BustReply",
    "BustRequest",
    "CapabilityDocument",
    "CapabilityLimits",
    "DaemonStatus",
    "FaultRecord",
    "FaultToleranceRange",
    "Problem",
    "RegisterReply",
    "RegisterRequest",
    "Requirements",
    "StatusReply",
    "Timestamp",
    "bust_request",
    "cache_key_of",
    "check_strategy",
    "check_target",
    "explain",
    "redact",
]

BINDING: Final = "pybustcall"
DEFAULT_STRATEGY: Final = "dimensional"
DEFAULT_TOLERANCE: Final = 6
STRATEGIES: Final = ("direct", "dimensional", "hybrid")
"""What the reference daemon supports. The client sends any strategy verbatim."""
MAX_TARGET_BYTES: Final = 8 * 1024

_MAX_STRATEGY_BYTES: Final = 128
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def check_target(target: object) -> str:
    """Return the target if it can be sent: 1 byte to 8 KiB of UTF-8 without control characters.

    Raises `InvalidRequest` (field "target") otherwise; its text never repeats the target.
    """
    return _check_text(target, "target", MAX_TARGET_BYTES)


def check_strategy(strategy: object) -> str:
    """Return the strategy if it can be sent: 1 to 128 bytes of text. Whether it is known is the daemon's to say."""
    return _check_text(strategy, "strategy", _MAX_STRATEGY_BYTES)


def _check_text(text: object, field: str, most: int) -> str:
    def refuse(why: str) -> InvalidRequest:
        target = text if field == "target" and isinstance(text, str) else None
        return InvalidRequest(f"{field} {why}; nothing was sent", field=field, target=target)

    if not isinstance(text, str):
        raise refuse(f"must be a string, not {type(text).__name__}")
    if not text:
        raise refuse("is empty")
    if found := _SURROGATE.search(text):
        raise refuse(f"has a lone surrogate at character {found.start()}, which UTF-8 cannot say")
    if found := _CONTROL.search(text):
        raise refuse(f"has the control character U+{ord(found.group()):04X} at character {found.start()}")
    if (size := len(text.encode())) > most:
        raise refuse(f"has {size} bytes, which is more than {most}")
    return text


def cache_key_of(target: str) -> str:
    """Tell the cache key that a daemon answers for this target: "sha256:" and the hex SHA-256 of its UTF-8 bytes."""
    return "sha256:" + hashlib.sha256(target.encode()).hexdigest()


_REDACTION_KEY: Final = secrets.token_bytes(16)


def redact(target: str) -> str:
    """Shorten a target for logs: its first segment, and 8 hex digits of a hash keyed anew in each process.

    Equal targets look equal within a process, so that lines can be matched; nobody can test a guess from outside.
    A segment ends at "/", ":", "?" or "#", and is itself left out where it is the whole target.
    """
    digest = hmac.new(_REDACTION_KEY, target.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:8]
    head = re.match(r"[A-Za-z0-9._-]{1,32}(?=[/:?#])", target)
    return f"{head.group()}/…{digest}" if head else f"…{digest}"


@final
@dataclass(frozen=True, slots=True, order=True)
class Timestamp:
    """An instant in UTC with nanoseconds, of which `datetime` alone would lose the last three digits.

    `instant` has whole microseconds; `nanosecond` is 0 to 999 beyond them.
    """

    instant: datetime
    nanosecond: int = 0

    @classmethod
    def parse(cls, text: object) -> Timestamp:
        """Read an RFC 3339 date and time with 0 to 9 digits of fraction; raise ValueError for anything else."""
        found = _RFC3339.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError("a timestamp is an RFC 3339 date and time with a zone and at most 9 digits of fraction")
        digits = (found["fraction"] or "").ljust(9, "0")
        zone = "+00:00" if found["zone"] in "Zz" else found["zone"]
        leap = found["time"].endswith("60")  # RFC 3339 allows a leap second; here it is the second after
        clock = f"{found['time'][:-2]}59" if leap else found["time"]
        try:
            instant = datetime.fromisoformat(f"{found['date']}T{clock}{zone}") + timedelta(seconds=int(leap))
            instant = instant.astimezone(UTC)
        except OverflowError:
            raise ValueError("a timestamp lies in the years 1 to 9999, in UTC too") from None
        return cls(instant.replace(microsecond=int(digits[:6])), int(digits[6:]))

    @classmethod
    def of_nanoseconds(cls, nanoseconds: int) -> Timestamp:
        """Make a timestamp of nanoseconds since the Unix epoch, such as `time.time_ns()` tells."""
        seconds, rest = divmod(nanoseconds, 1_000_000_000)
        instant = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
        return cls(instant, rest % 1000)

    def __str__(self) -> str:
        return f"{self.instant:%Y-%m-%dT%H:%M:%S.%f}{self.nanosecond:03d}Z"


_RFC3339 = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?P<time>[0-9]{2}:[0-9]{2}:[0-9]{2})"
    r"(?:\.(?P<fraction>[0-9]{1,9}))?(?P<zone>[Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def _to_timestamp(value: object) -> Timestamp:
    return value if isinstance(value, Timestamp) else Timestamp.parse(value)


_WireTimestamp = Annotated[
    Timestamp,
    PlainValidator(_to_timestamp),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", hide_input_in_errors=True)


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", hide_input_in_errors=True)


def _valid_target(value: str) -> str:
    try:
        return check_target(value)
    except InvalidRequest as error:
        raise ValueError(str(error).removesuffix("; nothing was sent")) from None


Target = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_TARGET_BYTES,
        description="1 byte to 8 KiB of UTF-8, without control characters or lone surrogates",
    ),
]


class BustRequest(_Request):
    """POST /api/v1/bust: drop the old value of `target`."""

    target: Target
    strategy: Annotated[str, Field(min_length=1, max_length=_MAX_STRATEGY_BYTES)] = DEFAULT_STRATEGY
    binding: Annotated[str, Field(min_length=1, max_length=128)] = BINDING
    fault_tolerance: Annotated[int, Field(ge=0, le=12)] = DEFAULT_TOLERANCE

    _target = field_validator("target")(_valid_target)

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, redact(value) if name == "target" else value


def bust_request(target: object, strategy: object, fault_tolerance: int) -> BustRequest:
    """Make a request of checked values; raise `InvalidRequest` before anything is sent if one cannot be sent."""
    return BustRequest.model_construct(
        target=check_target(target),
        strategy=check_strategy(strategy),
        binding=BINDING,
        fault_tolerance=fault_tolerance,
    )


class BustReply(_Reply):
    """What a daemon answers to a bust, in either dialect: `status: "success"` or `success: true`.

    `fault_stage` is what the daemon reports; `server.rs` merely echoes the request's `fault_tolerance` there. `removed`
    is how many entries went, where a daemon says so.
    """

    cache_key: Annotated[str, Field(min_length=1)]
    delegate: str | None = None
    fault_stage: Annotated[int, Field(ge=0, le=12)] | None = None
    execution_time_ms: Annotated[int, Field(ge=0)] | None = None
    removed: Annotated[int, Field(ge=0)] | None = None
    status: str | None = None
    success: bool | None = None

    @model_validator(mode="after")
    def _is_success(self) -> BustReply:
        said = [word == "success" for word in (self.status,) if word is not None]
        said += [word for word in (self.success,) if word is not None]
        if not said or not all(said):
            raise ValueError('a 200 answer must say status "success" or success true')
        return self

    def answers(self, target: str) -> bool:
        """Tell whether this reply belongs to `target`; one that does not name a SHA-256 cannot be told apart."""
        return not self.cache_key.startswith("sha256:") or self.cache_key == cache_key_of(target)


class BindingStatus(_Reply):
    """One language binding that a daemon knows of."""

    status: str
    version: str | None = None


class FaultRecord(_Reply):
    """One line of a fault history. The existing daemon keeps stages beyond 12 there, so any integer is read."""

    timestamp: _WireTimestamp
    binding: str
    fault_stage: int
    message: str


class StatusReply(_Reply):
    """GET /api/v1/status."""

    daemon_pid: int
    bindings: dict[str, BindingStatus] = Field(default_factory=dict)
    cache_size: str
    fault_history: tuple[FaultRecord, ...] = Field(default=(), strict=False)


class DaemonStatus(StatusReply):
    """A status and whose it is: `daemon` is the URL of the daemon that answered."""

    daemon: str


class FaultToleranceRange(_Reply):
    """What a daemon does with fault tolerance."""

    max_stage: int = 12
    default_stage: int = DEFAULT_TOLERANCE
    p2p_fallback: bool = False


class Requirements(_Reply):
    """What one side requires of the other: a range of SemverX versions, and capabilities."""

    semverx: str = "*"
    capabilities: tuple[str, ...] = Field(default=(), strict=False)


class CapabilityLimits(_Reply):
    """How much a daemon takes at once."""

    max_batch: int | None = None
    max_target_bytes: int | None = None
    max_body_bytes: int | None = None


class CapabilityDocument(_Reply):
    """What one side can do (GET /api/v1/capabilities; capabilities.json is pybustcall's own)."""

    binding: str
    version: str | None = None
    semverx: str | None = None
    capabilities: tuple[str, ...] = Field(default=(), strict=False)
    endpoints: dict[str, str] = Field(default_factory=dict)
    supported_strategies: tuple[str, ...] = Field(default=(), strict=False)
    fault_tolerance: FaultToleranceRange = FaultToleranceRange()
    requires: Requirements = Requirements()
    limits: CapabilityLimits = CapabilityLimits()
    access: dict[str, Literal["public", "protected", "private"]] = Field(default_factory=dict)


class BindingCapabilities(_Reply):
    """One entry of GET /api/v1/bindings/capabilities, as the existing daemon gives it."""

    binding: str
    capabilities: tuple[str, ...] = Field(default=(), strict=False)
    semverx: str | None = None
    stage: int | str | None = None
    p2p_enabled: bool = False


class RegisterRequest(_Request):
    """POST /api/v1/entries: a cache holds `key`, which was made of what `depends_on` names."""

    key: Target
    depends_on: Annotated[tuple[Target, ...], Field(max_length=256, strict=False)] = ()

    _key = field_validator("key")(_valid_target)

    @field_validator("depends_on")
    @classmethod
    def _valid_dependencies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_valid_target(target) for target in value)


class RegisterReply(_Reply):
    """What a daemon answers to a registration."""

    status: Literal["success"] = "success"
    cache_key: str


class Problem(_Reply):
    """RFC 9457, application/problem+json: why a daemon of ours refused. `field` names what to mend."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = None
    supported: tuple[str, ...] | None = Field(default=None, strict=False)


def explain(error: ValidationError) -> tuple[str | None, str]:
    """Tell the first thing wrong with a document: (the field's name or None, one sentence without its value)."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    return field, first["msg"].removeprefix("Value error, ")
