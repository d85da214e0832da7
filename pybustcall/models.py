"""The wire models: the vocabulary that client and daemon both speak (docs/reference/protocol.md).

This module decides what is well formed: which targets may be named, which replies are replies at all. It sends and
receives nothing. Requests are strict, since they are ours to get right; replies ignore fields that they do not know,
since daemons of other languages and later versions have more to say.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, final, get_args

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
    "DEFAULT_NAMESPACE",
    "DEFAULT_STRATEGY",
    "DEFAULT_TOLERANCE",
    "EVERYTHING",
    "KINDS",
    "MAX_LISTED",
    "MAX_REASON",
    "MAX_SETTLE",
    "MAX_SWAPS",
    "MAX_TARGET_BYTES",
    "OVER",
    "STRATEGIES",
    "Access",
    "AnnounceRequest",
    "BindingCapabilities",
    "BindingStatus",
    "BustReply",
    "BustRequest",
    "CapabilityDocument",
    "CapabilityLimits",
    "DaemonStatus",
    "DependenciesReply",
    "DependencyReply",
    "FaultRecord",
    "FaultToleranceRange",
    "ForgetReply",
    "ForgetRequest",
    "HotSwapReply",
    "HotSwapRequest",
    "JobReply",
    "JobState",
    "JobsReply",
    "Kind",
    "LayerReply",
    "Problem",
    "Progress",
    "RegisterReply",
    "RegisterRequest",
    "Requirements",
    "ResolveReply",
    "ResolveRequest",
    "StatusReply",
    "StreamedBust",
    "StreamedLive",
    "StreamedReset",
    "SwapItem",
    "Swapped",
    "Timestamp",
    "bust_request",
    "cache_key_of",
    "check_maker",
    "check_namespace",
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
MAX_LISTED: Final = 256
"""How many versions one announcement may name, and how many dependencies one registration."""
MAX_SWAPS: Final = 64
"""How many dependencies one hot swap may replace."""

Kind = Literal["key", "prefix", "tag", "all"]
"""What a target names: one key, every key in that branch, every entry with that tag, or everything there is."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
DEFAULT_NAMESPACE: Final = "default"
"""Whose entries our daemon takes to be meant where nothing is said."""
EVERYTHING: Final = "*"
"""The target of a bust of the kind "all"."""
MAX_SETTLE: Final = 3600.0
"""Seconds that a second bust may be put off at most."""
MAX_REASON: Final = 256
"""Characters of the reason for a bust."""

Access = Literal["public", "protected", "private"]
"""Who may use a capability: anybody, whoever has the token, or nobody but the operator."""

_MAX_STRATEGY_BYTES: Final = 128
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def check_maker(function: object, field: str) -> None:
    """Refuse what cannot be called to make a value, such as the value itself, or a coroutine of an async function."""
    if callable(function):
        return
    what = f"{type(function).__name__}; lambda: value makes what is there already"
    if inspect.isawaitable(function):
        what = "what calling it returned; name it without calling it, or write lambda: f(...)"
    if inspect.iscoroutine(function):
        function.close()  # or Python would complain of that, too
    raise InvalidRequest(f"{field} must be a function without arguments, async or plain, not {what}", field=field)


def check_target(target: object, field: str = "target") -> str:
    """Return the target if it can be sent: 1 byte to 8 KiB of UTF-8 without control characters.

    Raises `InvalidRequest` otherwise, which names the `field`; its text never repeats the target.
    """
    return _check_text(target, field, MAX_TARGET_BYTES)


def check_strategy(strategy: object) -> str:
    """Return the strategy if it can be sent: 1 to 128 bytes of text. Whether it is known is the daemon's to say."""
    return _check_text(strategy, "strategy", _MAX_STRATEGY_BYTES)


def check_namespace(namespace: object) -> str:
    """Return the namespace if it can be sent: 1 to 64 ASCII letters, digits, `.`, `_` and `-`, beginning with no mark.

    It is never empty: a namespace that was forgotten must not reach everybody's entries. Raises `InvalidRequest`.
    """
    if isinstance(namespace, str) and _NAMESPACE.fullmatch(namespace):
        return namespace
    found = "empty" if namespace == "" else "not so" if isinstance(namespace, str) else type(namespace).__name__
    raise InvalidRequest(
        "namespace must be 1 to 64 ASCII letters, digits, dots, dashes and underscores, beginning with a letter or a"
        f" digit; it is {found}; nothing was sent",
        field="namespace",
    )


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
        json_schema_extra={"pattern": r"^[^\u0000-\u001f\u007f-\u009f]+$"},
    ),
]


Namespace = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="whose entries are meant: tenants of one cache never reach each other's",
    ),
]


def _without_controls(schema: dict[str, Any]) -> None:
    """Say in the schema of an optional text which characters it has."""
    for one in schema.get("anyOf", [schema]):
        if one.get("type") == "string":
            one["pattern"] = r"^[^\u0000-\u001f\u007f-\u009f]+$"


class BustRequest(_Request):
    """POST /api/v1/bust: drop the old value of `target`.

    The first four fields are the base. Each of the others takes a capability of the daemon, and is left out on the wire
    where it has its default, so that a daemon of the base is asked exactly what it knows.
    """

    target: Target
    strategy: Annotated[str, Field(min_length=1, max_length=_MAX_STRATEGY_BYTES)] = DEFAULT_STRATEGY
    binding: Annotated[str, Field(min_length=1, max_length=128)] = BINDING
    fault_tolerance: Annotated[int, Field(ge=0, le=12)] = DEFAULT_TOLERANCE
    kind: Annotated[
        Kind,
        Field(
            description="what the target names: one key, every key in that branch, every entry with that tag, or, with"
            ' `confirm` and the target "*", everything'
        ),
    ] = "key"
    soft: Annotated[
        bool, Field(description="mark as stale instead of removing: servable while one reader makes it anew")
    ] = False
    namespace: Namespace | None = None
    confirm: Annotated[bool, Field(description='must be true for the kind "all"')] = False
    dry_run: Annotated[bool, Field(description="tell what would be removed, and remove nothing")] = False
    verify: Annotated[bool, Field(description="read back that nothing of it is left")] = False
    settle: Annotated[
        float | None,
        Field(
            ge=0,
            le=MAX_SETTLE,
            allow_inf_nan=False,
            description="seconds after which it is busted again, against fills in flight; 0 is never; by default each"
            " layer's own",
        ),
    ] = None
    reason: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=MAX_REASON,
            description="why, for the audit; without control characters or lone surrogates",
            json_schema_extra=_without_controls,
        ),
    ] = None

    _target = field_validator("target")(_valid_target)

    @field_validator("reason")
    @classmethod
    def _valid_reason(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                _check_text(value, "reason", 4 * MAX_REASON)
            except InvalidRequest as error:
                raise ValueError(str(error).removesuffix("; nothing was sent")) from None
        return value

    @model_validator(mode="after")
    def _everything_is_meant(self) -> BustRequest:
        if self.kind == "all" and not (self.confirm and self.target == EVERYTHING):
            raise ValueError('a bust of the kind "all" has the target "*" and confirm true')
        return self

    def wire(self) -> bytes:
        """Write it as it is sent: the base fields, and those of the others that say more than their defaults."""
        said = {"target", "strategy", "binding", "fault_tolerance"}
        said |= {name for name, default in _EXTENSIONS.items() if getattr(self, name) != default}
        return self.model_dump_json(include=said).encode()

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, redact(value) if name == "target" else value


_EXTENSIONS: Final = {
    name: field.default
    for name, field in BustRequest.model_fields.items()
    if name not in {"target", "strategy", "binding", "fault_tolerance"}
}


def bust_request(
    target: object,
    strategy: object,
    fault_tolerance: int,
    *,
    kind: object = "key",
    soft: object = False,
    namespace: object = None,
    confirm: object = False,
    dry_run: object = False,
    verify: object = False,
    settle: object = None,
    reason: object = None,
) -> BustRequest:
    """Make a request of checked values; raise `InvalidRequest` before anything is sent if one cannot be sent."""
    checked = check_target(target)
    flags: dict[str, Any] = {"soft": soft, "confirm": confirm, "dry_run": dry_run, "verify": verify}
    for name, value in flags.items():
        if type(value) is not bool:
            raise InvalidRequest(f"{name} must be true or false, not {value!r}; nothing was sent", field=name)
    if kind not in KINDS:
        raise InvalidRequest(f"kind must be one of {', '.join(KINDS)}, not {kind!r}; nothing was sent", field="kind")
    if kind == "all" and (checked != EVERYTHING or not confirm):
        lack = "confirm=True" if checked == EVERYTHING else f'the target "{EVERYTHING}", and confirm=True'
        raise InvalidRequest(
            f'a bust of the kind "all" drops everything, and wants {lack}; nothing was sent', field="confirm"
        )
    if settle is not None and (
        isinstance(settle, bool) or not isinstance(settle, int | float) or not 0 <= settle <= MAX_SETTLE
    ):
        raise InvalidRequest(
            f"settle must be 0 to {MAX_SETTLE:g} seconds, or None, not {settle!r}; nothing was sent", field="settle"
        )
    return BustRequest.model_construct(
        target=checked,
        strategy=check_strategy(strategy),
        binding=BINDING,
        fault_tolerance=fault_tolerance,
        kind=kind,
        namespace=None if namespace is None else check_namespace(namespace),
        settle=None if settle is None else float(settle),
        reason=None if reason is None else _check_reason(reason),
        **flags,
    )


def _check_reason(reason: object) -> str:
    text = _check_text(reason, "reason", 4 * MAX_REASON)
    if len(text) > MAX_REASON:
        raise InvalidRequest(f"reason has more than {MAX_REASON} characters; nothing was sent", field="reason")
    return text


class LayerReply(_Reply):
    """What one layer of a daemon did with a bust.

    - `ok`: whether it is applied there; one that is not is tried again if the whole answer says "accepted"
    - `removed`: how many entries went, or were marked stale; of a dry run, how many would
    - `settle`: seconds from the answer to its second bust there, if there is one
    - `waits`: whether it is busted, or again if it is `ok`, once the layers that come before it are; it has not failed
    """

    name: str
    ok: bool
    removed: Annotated[int, Field(ge=0)] = 0
    error: str | None = None
    settle: float | None = None
    waits: bool | None = None


class BustReply(_Reply):
    """What a daemon answers to a bust, in either dialect: `status: "success"` or `success: true`.

    `fault_stage` is what the daemon reports; `server.rs` merely echoes the request's `fault_tolerance` there. A byte
    beyond the scale, which that daemon does not check, says nothing, and is read as none. `removed` is how many entries
    went, where a daemon says so; `matched` how many a dry run covers.

    With 202 the `status` is "accepted": it is in the daemon's journal as `job`, and not applied everywhere yet.
    `kind`, `namespace`, `soft` and `dry_run` repeat what was asked where that is not the default.
    """

    cache_key: Annotated[str, Field(min_length=1)]
    delegate: str | None = None
    fault_stage: Annotated[int, Field(ge=0, le=12)] | None = None
    execution_time_ms: Annotated[int, Field(ge=0)] | None = None
    removed: Annotated[int, Field(ge=0)] | None = None
    status: str | None = None
    success: bool | None = None
    kind: str | None = None
    namespace: str | None = None
    soft: bool | None = None
    dry_run: bool | None = None
    matched: Annotated[int, Field(ge=0)] | None = None
    verified: bool | None = None
    layers: tuple[LayerReply, ...] = Field(default=(), strict=False)
    job: str | None = None

    @field_validator("fault_stage", mode="before")
    @classmethod
    def _on_the_scale(cls, value: object) -> object:
        return None if type(value) is int and 12 < value <= 255 else value

    @model_validator(mode="after")
    def _is_success(self) -> BustReply:
        said = [word == "success" for word in (self.status,) if word is not None and not self.accepted]
        said += [word for word in (self.success,) if word is not None]
        if not self.accepted and (not said or not all(said)):
            raise ValueError('a 200 answer must say status "success" or success true')
        if self.accepted and (self.job is None or not all(said)):
            raise ValueError('an answer with the status "accepted" must name its job')
        return self

    @property
    def accepted(self) -> bool:
        """Whether it is in the daemon's journal, and not applied everywhere yet."""
        return self.status == "accepted"

    def answers(self, target: str) -> bool:
        """Tell whether this reply belongs to `target`; one that does not name a SHA-256 cannot be told apart."""
        return not self.cache_key.startswith("sha256:") or self.cache_key == cache_key_of(target)

    def unechoed(self, request: BustRequest) -> str:
        """Tell which field of the request this reply does not repeat, though it must; an empty text if none.

        A daemon that does not know a field ignores it, and busts something else than was asked.
        """
        asked = {name: getattr(request, name) for name in ("kind", "namespace", "soft", "dry_run")}
        return next((name for name, value in asked.items() if (getattr(self, name) or _EXTENSIONS[name]) != value), "")


JobState = Literal["waiting", "running", "settling", "done", "cancelled", "failed"]
OVER: Final[frozenset[JobState]] = frozenset({"done", "cancelled", "failed"})
"""The states in which a job stays: nothing more is done for it."""


class Progress(_Reply):
    """How far a job came: `done` entries of about `total`, in all layers together; `total` is None while unknown."""

    done: Annotated[int, Field(ge=0)] = 0
    total: Annotated[int, Field(ge=0)] | None = None


class JobReply(_Reply):
    """GET /api/v1/jobs/{job}: a bust in the daemon's journal, under way or over; this is the audit, too.

    - `state`: waiting (for a layer that failed), running, settling (applied; the second bust is to come), done,
      cancelled, or failed (refused for good)
    - `who`: anonymous, token or operator; `binding` and `reason` are what the client said
    - `daemon`: through which it came; `at`, `ended`: when
    - `removed`: the effect, in all layers together; `layers` tells each
    """

    job: str
    state: JobState
    target: str
    kind: Kind
    strategy: str
    soft: bool = False
    namespace: str | None = None
    who: str = "anonymous"
    binding: str = "unknown"
    reason: str | None = None
    daemon: str = ""
    at: _WireTimestamp
    ended: _WireTimestamp | None = None
    removed: Annotated[int, Field(ge=0)] = 0
    attempts: Annotated[int, Field(ge=0)] = 0
    progress: Progress = Progress()
    layers: tuple[LayerReply, ...] = Field(default=(), strict=False)


class JobsReply(_Reply):
    """GET /api/v1/jobs: the newest first."""

    jobs: tuple[JobReply, ...] = Field(default=(), strict=False)


class StreamedBust(_Reply):
    """GET /api/v1/events: what an event `bust` says in its data."""

    namespace: str
    kind: Kind
    target: str
    soft: bool = False
    strategy: str = DEFAULT_STRATEGY
    also: Annotated[
        tuple[str, ...],
        Field(
            strict=False,
            description="further keys that went: what bears the tag, or depends on what was named; and, unless the"
            " strategy is direct, the variants of every key",
        ),
    ] = ()


class StreamedReset(_Reply):
    """GET /api/v1/events: what an event `reset` says. Something was missed: the reader must forget all it holds."""

    reason: str


class StreamedLive(_Reply):
    """GET /api/v1/events: what an event `live` says. All that was missed has been told.

    - `heartbeat`: seconds after which the stream says something, even if there is nothing to say
    """

    heartbeat: float


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
    """What one side does with fault tolerance, on the scale from 0 (worst) to 12 (a clean success)."""

    max_stage: Annotated[int, Field(description="the highest fault_tolerance that it takes")] = 12
    default_stage: Annotated[int, Field(description="the fault_tolerance of a request that says none")] = (
        DEFAULT_TOLERANCE
    )
    p2p_fallback: Annotated[
        bool, Field(description="whether it asks its peers where it cannot do something itself")
    ] = False


class Requirements(_Reply):
    """What one side requires of the other: a range of SemverX versions, and capabilities."""

    semverx: Annotated[
        str, Field(description="the SemverX versions that the other side may have; `*` is any, also one not told")
    ] = "*"
    capabilities: tuple[str, ...] = Field(
        default=(), strict=False, description="the names that the other side's capabilities must have"
    )


class CapabilityLimits(_Reply):
    """How much one side takes at once. What is not said is not limited, as far as is known."""

    max_batch: Annotated[int | None, Field(description="busts in one request")] = None
    max_target_bytes: Annotated[int | None, Field(description="bytes of UTF-8 of one target")] = None
    max_body_bytes: Annotated[int | None, Field(description="bytes of the body of one request")] = None


class CapabilityDocument(_Reply):
    """What one side can do, and what it requires of the other.

    A daemon serves its document at GET /api/v1/capabilities; a client sends its own to POST /api/v1/capabilities.
    Fields that are not listed here are ignored.
    """

    binding: Annotated[str, Field(description="who speaks: the name of the implementation, such as pybustcall or node")]
    version: Annotated[str | None, Field(description="its version as its own language writes it, for people")] = None
    semverx: Annotated[
        str | None,
        Field(description="its version as SemVer or SemverX, by which requirements go; without one, only `*` is met"),
    ] = None
    capabilities: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="the names of all that it can do and may be used, such as cache.bust; what is not here is not used",
    )
    endpoints: dict[str, str] = Field(
        default_factory=dict,
        description="the path of each capability that has one; they are told for people, and are the same everywhere",
    )
    supported_strategies: tuple[str, ...] = Field(
        default=(), strict=False, description="the strategies of a bust that it knows, such as dimensional"
    )
    fault_tolerance: Annotated[FaultToleranceRange, Field(description="what it does with fault tolerance")] = (
        FaultToleranceRange()
    )
    requires: Annotated[Requirements, Field(description="what it requires of the other side")] = Requirements()
    limits: Annotated[CapabilityLimits, Field(description="how much it takes at once")] = CapabilityLimits()
    access: dict[str, Access] = Field(
        default_factory=dict,
        description=(
            "who may use a capability: public is anybody, protected whoever has the token, private nobody but the"
            " operator; one that is private and not among the capabilities can be used by nobody at all"
        ),
    )


class BindingCapabilities(_Reply):
    """One entry of GET /api/v1/bindings/capabilities, as the existing daemon gives it."""

    binding: str
    capabilities: tuple[str, ...] = Field(default=(), strict=False)
    semverx: str | None = None
    stage: int | str | None = None
    p2p_enabled: bool = False


class RegisterRequest(_Request):
    """POST /api/v1/entries: a cache holds `key`, which was made of what `depends_on` names, and has these `tags`.

    With `ttl`, in seconds, the entry ends by itself, as it does in the cache.
    """

    key: Target
    depends_on: Annotated[tuple[Target, ...], Field(max_length=MAX_LISTED, strict=False)] = ()
    tags: Annotated[tuple[Target, ...], Field(max_length=MAX_LISTED, strict=False)] = ()
    namespace: Namespace | None = None
    ttl: Annotated[float | None, Field(gt=0, le=10_000_000_000, allow_inf_nan=False)] = None

    _key = field_validator("key")(_valid_target)

    @field_validator("depends_on", "tags")
    @classmethod
    def _valid_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_valid_target(target) for target in value)


class RegisterReply(_Reply):
    """What a daemon answers to a registration."""

    status: Literal["success"] = "success"
    cache_key: str


Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="a cache dependency's name, such as pricing-model or @scope/name: at most 256 bytes of UTF-8",
        json_schema_extra={"format": "bustcall-name"},
    ),
]
Version = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="a SemVer or SemverX version, such as 1.2.3 or 1.stable.2.stable.3.legacy",
        json_schema_extra={"format": "bustcall-version"},
    ),
]


class AnnounceRequest(_Request):
    """POST /api/v1/dependencies: there is a cache dependency of this name, in these versions.

    `current` is the version in use; without it the first announcement takes the best of `versions`, and later ones
    leave it as it is. Only a hot swap changes it.
    """

    name: Name
    versions: Annotated[tuple[Version, ...], Field(min_length=1, max_length=MAX_LISTED, strict=False)]
    current: Version | None = None


class DependencyReply(_Reply):
    """One cache dependency: the version in use, and all that are known, in ascending order."""

    name: str
    current: str
    versions: tuple[str, ...] = Field(default=(), strict=False)


class DependenciesReply(_Reply):
    """GET /api/v1/dependencies: all of them, by name."""

    dependencies: tuple[DependencyReply, ...] = Field(default=(), strict=False)


class ResolveRequest(_Request):
    """POST /api/v1/resolve: tell which known version of a cache dependency `name@range` means."""

    spec: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1300,
            description="name@range, such as pricing-model@^2.0.0",
            json_schema_extra={"format": "bustcall-spec"},
        ),
    ]


class ResolveReply(_Reply):
    """What a spec was resolved to. `resolved` is name@version, `state` the version's: stable, legacy, experimental."""

    spec: str
    resolved: str
    version: str
    state: Literal["stable", "legacy", "experimental"]


class ForgetRequest(_Request):
    """POST /api/v1/dependencies/forget: nothing goes by the cache dependency of this name any more."""

    name: Name


class ForgetReply(_Reply):
    """What a daemon answers when it knows no cache dependency of this name, any more or at all."""

    status: Literal["success"] = "success"
    name: str


def _as_sent(swaps: object) -> object:
    """Leave `from_` out of swaps as they were sent: it is what Python calls `from`, and no field of the wire."""
    if not isinstance(swaps, list | tuple):
        return swaps
    return [{name: it[name] for name in it if name != "from_"} if isinstance(it, dict) else it for it in swaps]


class SwapItem(_Request):
    """One dependency of a hot swap. `from`, if given, must be its current version; the rest opts in to a rule each."""

    model_config = ConfigDict(populate_by_name=True)

    name: Name
    to: Version
    from_: Version | None = Field(default=None, alias="from")
    allow_experimental: bool = False
    validated: bool = False
    migrate: bool = False
    rollback: bool = False


class HotSwapRequest(_Request):
    """POST /api/v1/hotswap: replace cache dependencies, all or none, and bust what depends on them."""

    swaps: Annotated[tuple[SwapItem, ...], Field(min_length=1, max_length=MAX_SWAPS, strict=False)]

    _swaps = field_validator("swaps", mode="before")(_as_sent)


class Swapped(_Reply):
    """One dependency that a hot swap replaced."""

    model_config = ConfigDict(populate_by_name=True)

    name: str
    from_: str = Field(alias="from")
    to: str


class HotSwapReply(_Reply):
    """What a hot swap came to: `busted` is how many entries that depended on the swapped went."""

    committed: bool
    busted: Annotated[int, Field(ge=0)] = 0
    fault_stage: Annotated[int, Field(ge=0, le=12)] = 12
    swaps: tuple[Swapped, ...] = Field(default=(), strict=False)

    _swaps = field_validator("swaps", mode="before")(_as_sent)


class Problem(_Reply):
    """RFC 9457, application/problem+json: why a daemon of ours refused.

    `field` names what to mend; `unmet` tells, one sentence each, which requirements or rules are not met.
    """

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = None
    supported: tuple[str, ...] | None = Field(default=None, strict=False)
    unmet: tuple[str, ...] | None = Field(default=None, strict=False)


def explain(error: ValidationError) -> tuple[str | None, str]:
    """Tell the first thing wrong with a document: (the field's name or None, one sentence without its value)."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    return field, first["msg"].removeprefix("Value error, ")
