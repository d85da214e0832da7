"""The contract as a file: the daemon's routes as an OpenAPI 3.1 document, made of the same models that check them.

It decides only how the contract is written down. The document is served at /openapi.json, kept in
docs/reference/openapi.yaml, and the daemon is fuzzed against it. It is the same for every daemon of one version: what
depends on how a daemon was started (its token, its tiers, what it requires) stands there as what may happen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, final, get_args

from pydantic.json_schema import models_json_schema

from pybustcall.capabilities import SEMVERX, VERSION, advertised_digest
from pybustcall.models import (
    BINDING,
    MAX_TARGET_BYTES,
    STRATEGIES,
    AnnounceRequest,
    BindingCapabilities,
    BustReply,
    BustRequest,
    CapabilityDocument,
    DependenciesReply,
    DependencyReply,
    ForgetReply,
    ForgetRequest,
    HotSwapReply,
    HotSwapRequest,
    JobReply,
    JobsReply,
    JobState,
    Problem,
    RegisterReply,
    RegisterRequest,
    ResolveReply,
    ResolveRequest,
    StatusReply,
    StreamedBust,
    StreamedLive,
    StreamedReset,
    cache_key_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

__all__ = ["openapi_document"]

_MODEL: Final = "#/components/schemas/{model}"

_DIGEST: Final = "Bustcall-Capabilities"
_KEY: Final = "Idempotency-Key"
_KNOWN: Final = "If-None-Match"
_PLACE: Final = "Last-Event-ID"

# Parameters. Of the first four nothing is refused: what cannot be read counts as not said, so any text is well formed.
_ON_EVERY: Final = ("Bustcall-Binding", "Bustcall-Version", _DIGEST, "Bustcall-Timeout-Ms")
_PARAMETERS: Final[Mapping[str, tuple[str, dict[str, Any], str]]] = MappingProxyType(
    {
        "Bustcall-Binding": ("Who asks: it is shown in the fault history.", {"type": "string"}, BINDING),
        "Bustcall-Version": (
            "The client's version as SemverX. One that is not said, or cannot be read, meets no range but `*`.",
            {"type": "string"},
            SEMVERX,
        ),
        _DIGEST: (
            "The digest of the client's capability document, which it has sent to `POST /api/v1/capabilities`.",
            {"type": "string"},
            advertised_digest(),
        ),
        "Bustcall-Timeout-Ms": (
            "Whole milliseconds that the caller still has. What takes longer than half of that is answered as a job.",
            {"type": "string"},
            "4200",
        ),
        _KEY: (
            "One for each request, and the same for its repeats: these are answered alike, and not applied.",
            {"type": "string", "pattern": "^[!-~]{1,255}$"},
            "0b9fbd6e-5ad5-4b0c-a1c9-1a3c6f3a2b11",
        ),
        _KNOWN: (
            "The `ETag` of the document that the client has: if it is still in effect, the answer is 304.",
            {"type": "string"},
            f'"{advertised_digest()}"',
        ),
        _PLACE: (
            (
                "The id of the last event that was read: those after it come first. If they are no longer kept, or it"
                " is no id of this daemon's, a reset does."
            ),
            {"type": "string"},
            "7f3a9c0d5b1e2f48-1042",
        ),
    }
)

_TEXT: Final[dict[str, Any]] = {
    "type": "string", "minLength": 1, "maxLength": MAX_TARGET_BYTES, "pattern": "^[^\\u0000-\\u001f\\u007f-\\u009f]+$",
}  # fmt: skip

# Parameters of paths and queries: where it stands, what it says, its schema, and an example.
_PLACED: Final[Mapping[str, tuple[str, str, dict[str, Any], object]]] = MappingProxyType(
    {
        "job": ("path", "The name of a job.", {"type": "string"}, "0f5e1c9a6b7d4e3f8a9b0c1d2e3f4a5b"),
        "limit": (
            "query",
            "How many are told.",
            {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
            20,
        ),
        "before": (
            "query",
            "Those that are older than this job, which is the last of the page before.",
            {"type": "string"},
            "0f5e1c9a6b7d4e3f8a9b0c1d2e3f4a5b",
        ),
        "state": (
            "query",
            "Only those in this state.",
            {"type": "string", "enum": list(get_args(JobState))},
            "waiting",
        ),
        "namespace": (
            "query",
            "Whose events: `default` unless it is said.",
            {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$", "minLength": 1, "maxLength": 64},
            "default",
        ),
        "prefix": (
            "query",
            "Only what could concern a key that this prefix covers, or another one that is said, or one of the tags.",
            {"type": "array", "items": _TEXT, "maxItems": 100},
            ["products/"],
        ),
        "tag": (
            "query",
            "Only what could concern an entry with this tag, or another one that is said, or one of the prefixes.",
            {"type": "array", "items": _TEXT, "maxItems": 100},
            ["product:7"],
        ),
    }
)

# Headers of answers: what it says, its schema, and whether it is always there.
_HEADERS: Final[Mapping[str, tuple[str, dict[str, Any], bool]]] = MappingProxyType(
    {
        _DIGEST: (
            "The digest of the daemon's capability document that is in effect.",
            {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
            True,
        ),
        "ETag": (
            "The same digest, in quotes.",
            {"type": "string", "pattern": '^"sha256:[0-9a-f]{64}"$'},
            True,
        ),
        "Idempotency-Replayed": (
            "This is the answer to an earlier request with the same key; this one was not applied.",
            {"type": "string", "const": "true"},
            False,
        ),
        "Retry-After": ("Seconds after which to ask again.", {"type": "integer", "minimum": 0}, True),
        "Upgrade": ("What the client would have to speak.", {"type": "string", "const": "bustcall/1"}, True),
        "WWW-Authenticate": ("How to say the token.", {"type": "string", "const": "Bearer"}, True),
    }
)


@final
@dataclass(frozen=True, slots=True)
class _Refusal:
    """One refusal: its name in the document, when it is given, and what header goes with it."""

    name: str
    when: str
    header: str | None = None


_REFUSALS: Final[Mapping[int, _Refusal]] = MappingProxyType(
    {
        400: _Refusal(
            "BadRequest",
            "The request is not HTTP; or its body is not JSON, not UTF-8, or names a field twice; or it has an"
            " Idempotency-Key that cannot be one, which the problem's `field` names.",
        ),
        401: _Refusal("Unauthorized", "The token is missing or wrong.", "WWW-Authenticate"),
        403: _Refusal(
            "Forbidden",
            "The capability is private, and this token, or none, does not open it; or a page of another origin asks.",
        ),
        404: _Refusal(
            "NotFound",
            "There is no such job, any more or at all: `urn:bustcall:problem:no-such-job`. Jobs are each daemon's own.",
        ),
        408: _Refusal("RequestTimeout", "The body did not arrive in time."),
        409: _Refusal(
            "Conflict",
            "What is asked does not go with what is: another version is current, the dependency is in use, or the swap"
            " breaks a rule (`urn:bustcall:problem:swap-refused`, with every reason in `unmet`), and nothing was"
            " changed. Or the bust was cancelled as a job before its answer (`urn:bustcall:problem:cancelled`).",
        ),
        413: _Refusal("ContentTooLarge", "The body is larger than `limits.max_body_bytes`."),
        415: _Refusal("UnsupportedMediaType", "The body does not say that it is application/json."),
        417: _Refusal("ExpectationFailed", "`Expect` says something other than `100-continue`."),
        421: _Refusal("MisdirectedRequest", "The daemon does not answer for this Host."),
        422: _Refusal(
            "UnprocessableContent",
            "A field is missing, mistyped, out of range, or has a value that cannot be used; or the Idempotency-Key"
            " was used for another request; the problem's `field` names which. A spec that no known version meets is"
            " `urn:bustcall:problem:unresolved`.",
        ),
        426: _Refusal(
            "UpgradeRequired",
            "The client does not have what the daemon requires: `unmet` names it. The type is"
            " `urn:bustcall:problem:incompatible`.",
            "Upgrade",
        ),
        428: _Refusal(
            "PreconditionRequired",
            "The daemon requires capabilities and does not know the client's: send the capability document to"
            " `POST /api/v1/capabilities`, then repeat the request. The type is `urn:bustcall:problem:advertise`.",
        ),
        429: _Refusal("TooManyRequests", "As many readers with these credentials follow as may.", "Retry-After"),
        500: _Refusal("InternalServerError", "A cache or a file failed; `detail` tells what was done and what not."),
        503: _Refusal("ServiceUnavailable", "The daemon is stopping.", "Retry-After"),
        507: _Refusal("InsufficientStorage", "The registry, or the disk, is full. Nothing was changed."),
    }
)
_ANY_ROUTE: Final = (400, 401, 403, 417, 421, 500, 503)
_MEASURED: Final = (426, 428)  # where the daemon asks whether the client fits
_WITH_BODY: Final = (408, 413, 415, 422)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """One route: how it is called, what it is answered, and what an answer leads to.

    - `capability`: what it takes to ask for it
    - `example`: of a request; `answer`: of its answer
    - `refusals`: beyond those of every route, and of every route with a body
    - `measured`: whether the client must fit what the daemon requires
    - `placed`: its parameters in the path and the query
    - `accepted`: an example of its answer with 202, if it may have one
    - `keyed`: whether it takes an idempotency key; `tagged`: whether the answer has an entity tag
    - `streamed`: what the events of its answer say, by their names, if it is a stream
    - `links`: the operations that may follow: their parameters and bodies, by name
    """

    method: str
    path: str
    name: str
    capability: str
    summary: str
    reply: type[BaseModel] | dict[str, Any]
    answer: object
    request: type[BaseModel] | None = None
    example: object = None
    refusals: tuple[int, ...] = ()
    measured: bool = True
    placed: tuple[str, ...] = ()
    accepted: object = None
    keyed: bool = False
    tagged: bool = False
    streamed: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    links: Mapping[str, dict[str, Any]] = field(default_factory=dict)


_ASKED_NAME: Final = "$response.body#/name"
_DOCUMENT: Final[dict[str, Any]] = {
    "binding": "node",
    "version": "1.4.0",
    "semverx": "1.stable.4.stable.0.stable",
    "capabilities": ["cache.bust", "daemon.capabilities", "daemon.status"],
    "requires": {"semverx": ">=0.1.0-0", "capabilities": ["cache.bust"]},
}
_JOB: Final[dict[str, Any]] = {
    "job": "0f5e1c9a6b7d4e3f8a9b0c1d2e3f4a5b",
    "state": "waiting",
    "target": "product:7",
    "kind": "tag",
    "strategy": "dimensional",
    "soft": False,
    "who": "token",
    "binding": BINDING,
    "reason": "a price has changed",
    "daemon": "cache-1 127.0.0.1:8989",
    "at": "2026-03-02T08:15:39.723673826Z",
    "removed": 2,
    "attempts": 1,
    "progress": {"done": 2, "total": 2},
    "layers": [{"name": "redis", "ok": False, "removed": 0, "error": "it cannot be reached"}],
}
_STREAM: Final = (
    'id: 7f3a9c0d5b1e2f48-1041\nat: 81204.118\nevent: live\ndata: {"heartbeat":5.0}\n\n'
    "id: 7f3a9c0d5b1e2f48-1042\nevent: bust\n"
    'data: {"namespace":"default","kind":"tag","target":"product:7","soft":false,"strategy":"dimensional"}\n\n'
)
_SEE_JOB: Final[dict[str, Any]] = {
    "operationId": "job",
    "description": "How it stands, and what the audit knows of it.",
    "parameters": {"path.job": "$response.body#/job"},
}
_DEPENDENCY: Final = {"name": "pricing-model", "current": "2.0.0", "versions": ["1.9.0", "2.0.0", "2.1.0"]}


def _operations() -> tuple[_Operation, ...]:
    return (
        _Operation(
            method="post",
            path="/api/v1/bust",
            name="bust",
            capability="cache.bust",
            summary="Have the old value of a target dropped.",
            request=BustRequest,
            example={"target": "cdn/main.css", "strategy": "dimensional", "binding": "curl", "fault_tolerance": 6},
            reply=BustReply,
            answer={
                "status": "success",
                "cache_key": cache_key_of("cdn/main.css"),
                "delegate": "pybustcall-daemon",
                "fault_stage": 12,
                "execution_time_ms": 1,
                "removed": 2,
                "layers": [{"name": "files", "ok": True, "removed": 2, "settle": 1.0}],
                "job": _JOB["job"],
            },
            accepted={
                "status": "accepted",
                "cache_key": cache_key_of("product:7"),
                "delegate": "pybustcall-daemon",
                "fault_stage": 7,
                "execution_time_ms": 12,
                "kind": "tag",
                "removed": 2,
                "layers": [{"name": "redis", "ok": False, "removed": 2, "error": "it cannot be reached"}],
                "job": _JOB["job"],
            },
            refusals=(409, 507),
            keyed=True,
            links={
                "repeat": {
                    "operationId": "bust",
                    "description": "The same again: with the same key it is answered alike, and not applied.",
                    "parameters": {f"header.{_KEY}": f"$request.header.{_KEY}"},
                    "requestBody": "$request.body",
                },
                "see": {"operationId": "status", "description": "How the daemon is after it."},
                "job": _SEE_JOB,
            },
        ),
        _Operation(
            method="get",
            path="/api/v1/jobs",
            name="jobs",
            capability="cache.bust.jobs",
            summary="Tell the busts in the journal, the newest first.",
            reply=JobsReply,
            answer={"jobs": [_JOB]},
            placed=("limit", "before", "state"),
            refusals=(422,),
            links={
                "job": {**_SEE_JOB, "parameters": {"path.job": "$response.body#/jobs/0/job"}},
                "next": {
                    "operationId": "jobs",
                    "description": "What is older than the first of them.",
                    "parameters": {"query.before": "$response.body#/jobs/0/job"},
                },
            },
        ),
        _Operation(
            method="get",
            path="/api/v1/jobs/{job}",
            name="job",
            capability="cache.bust.jobs",
            summary="Tell how one bust stands.",
            reply=JobReply,
            answer=_JOB,
            placed=("job",),
            refusals=(404,),
            links={
                "cancel": {
                    "operationId": "cancel",
                    "description": "Do no more for it.",
                    "parameters": {"path.job": "$response.body#/job"},
                }
            },
        ),
        _Operation(
            method="delete",
            path="/api/v1/jobs/{job}",
            name="cancel",
            capability="cache.bust.jobs",
            summary="Do no more for a bust; what is removed stays removed, and what is over stays as it is.",
            reply=JobReply,
            answer={**_JOB, "state": "cancelled", "ended": "2026-03-02T08:16:02.000000000Z"},
            placed=("job",),
            refusals=(404,),
            links={"job": _SEE_JOB},
        ),
        _Operation(
            method="get",
            path="/api/v1/events",
            name="events",
            capability="events.stream",
            summary="Tell of every bust that is applied, as server-sent events, for as long as the reader likes.",
            reply={
                "type": "string",
                "description": (
                    "Events with an id, a name and data in JSON, whose schemas `x-bustcall-events` tells by the name."
                    " First comes what was missed, or `reset`; then `live`; then each `bust` as it is applied. A"
                    " comment and the newest id come when there was nothing to say for `heartbeat` seconds. `at` says"
                    " when the daemon had nothing more to tell, in seconds of a clock that is never set."
                ),
            },
            answer=_STREAM,
            placed=("namespace", "prefix", "tag"),
            refusals=(422, 429),
            streamed={"bust": StreamedBust, "reset": StreamedReset, "live": StreamedLive},
        ),
        _Operation(
            method="post",
            path="/api/v1/entries",
            name="register",
            capability="cache.register",
            summary="Tell what a cached entry was made of.",
            request=RegisterRequest,
            example={"key": "index.html", "depends_on": ["cdn/main.css", "pricing-model"]},
            reply=RegisterReply,
            answer={"status": "success", "cache_key": cache_key_of("index.html")},
            refusals=(507,),
            links={
                "bust": {
                    "operationId": "bust",
                    "description": "The entry has changed: have it dropped.",
                    "requestBody": {"target": "$request.body#/key"},
                },
            },
        ),
        _Operation(
            method="post",
            path="/api/v1/dependencies",
            name="announce",
            capability="cache.dependencies",
            summary="Tell that there is a cache dependency, in these versions.",
            request=AnnounceRequest,
            example={"name": "pricing-model", "versions": ["1.9.0", "2.0.0", "2.1.0"], "current": "2.0.0"},
            reply=DependencyReply,
            answer=_DEPENDENCY,
            refusals=(409, 507),
            links={
                "again": {
                    "operationId": "announce",
                    "description": "An announcement may be repeated.",
                    "requestBody": {
                        "name": _ASKED_NAME,
                        "versions": "$response.body#/versions",
                        "current": "$response.body#/current",
                    },
                },
                "depend": {
                    "operationId": "register",
                    "description": "An entry may depend on it.",
                    "requestBody": {"key": "index.html", "depends_on": [_ASKED_NAME]},
                },
                "bust": {
                    "operationId": "bust",
                    "description": "Drop what depends on it, without a swap.",
                    "requestBody": {"target": _ASKED_NAME},
                },
                "resolve": {
                    "operationId": "resolve",
                    "description": "Ask which version a range means.",
                    "requestBody": {"spec": "{$response.body#/name}@*"},
                },
                "swap": {
                    "operationId": "hotswap",
                    "description": "Replace it by one of its versions.",
                    "requestBody": {
                        "swaps": [
                            {
                                "name": _ASKED_NAME,
                                "from": "$response.body#/current",
                                "to": "$response.body#/versions/0",
                                "allow_experimental": True,
                                "validated": True,
                                "migrate": True,
                                "rollback": True,
                            }
                        ]
                    },
                },
                "list": {"operationId": "dependencies", "description": "It is among those that there are."},
                "forget": {
                    "operationId": "forget",
                    "description": "Have it forgotten, if nothing depends on it.",
                    "requestBody": {"name": _ASKED_NAME},
                },
            },
        ),
        _Operation(
            method="get",
            path="/api/v1/dependencies",
            name="dependencies",
            capability="cache.dependencies",
            summary="Tell the cache dependencies that there are.",
            reply=DependenciesReply,
            answer={"dependencies": [_DEPENDENCY]},
        ),
        _Operation(
            method="post",
            path="/api/v1/dependencies/forget",
            name="forget",
            capability="cache.dependencies",
            summary="Forget a cache dependency on which no entry depends.",
            request=ForgetRequest,
            example={"name": "vat-table"},
            reply=ForgetReply,
            answer={"status": "success", "name": "vat-table"},
            refusals=(409, 507),
            links={
                "again": {
                    "operationId": "forget",
                    "description": "What is not known is forgotten already.",
                    "requestBody": {"name": _ASKED_NAME},
                },
                "announce": {
                    "operationId": "announce",
                    "description": "It can be announced anew.",
                    "requestBody": {"name": _ASKED_NAME, "versions": ["1.0.0"]},
                },
            },
        ),
        _Operation(
            method="post",
            path="/api/v1/resolve",
            name="resolve",
            capability="semver.resolve",
            summary="Tell which known version of a cache dependency a spec means.",
            request=ResolveRequest,
            example={"spec": "pricing-model@^2.0.0"},
            reply=ResolveReply,
            answer={
                "spec": "pricing-model@^2.0.0",
                "resolved": "pricing-model@2.1.0",
                "version": "2.1.0",
                "state": "stable",
            },
            links={
                "again": {
                    "operationId": "resolve",
                    "description": "What a spec was resolved to is a spec itself.",
                    "requestBody": {"spec": "$response.body#/resolved"},
                }
            },
        ),
        _Operation(
            method="post",
            path="/api/v1/hotswap",
            name="hotswap",
            capability="cache.hotswap",
            summary="Replace cache dependencies, all or none, and bust what depends on them.",
            request=HotSwapRequest,
            example={"swaps": [{"name": "pricing-model", "from": "2.0.0", "to": "2.1.0"}]},
            reply=HotSwapReply,
            answer={
                "committed": True,
                "busted": 3,
                "fault_stage": 12,
                "swaps": [{"name": "pricing-model", "from": "2.0.0", "to": "2.1.0"}],
            },
            refusals=(409, 507),
            keyed=True,
            links={
                "repeat": {
                    "operationId": "hotswap",
                    "description": "The same again: with the same key it is answered alike, and not applied.",
                    "parameters": {f"header.{_KEY}": f"$request.header.{_KEY}"},
                    "requestBody": "$request.body",
                },
                "back": {
                    "operationId": "hotswap",
                    "description": "The other way round.",
                    "requestBody": {
                        "swaps": [
                            {
                                "name": "$response.body#/swaps/0/name",
                                "from": "$response.body#/swaps/0/to",
                                "to": "$response.body#/swaps/0/from",
                                "rollback": True,
                            }
                        ]
                    },
                },
                "resolve": {
                    "operationId": "resolve",
                    "description": "The version that was swapped in is known.",
                    "requestBody": {"spec": "{$response.body#/swaps/0/name}@{$response.body#/swaps/0/to}"},
                },
                "list": {"operationId": "dependencies", "description": "It is the current one."},
            },
        ),
        _Operation(
            method="get",
            path="/api/v1/status",
            name="status",
            capability="daemon.status",
            summary="Tell how the daemon is.",
            reply=StatusReply,
            answer={
                "daemon_pid": 8480,
                "bindings": {BINDING: {"status": "active", "version": VERSION}},
                "cache_size": "1.2MB",
                "fault_history": [
                    {
                        "timestamp": "2026-03-02T08:15:39.723673826Z",
                        "binding": "unknown",
                        "fault_stage": 4,
                        "message": "the body is not JSON: Expecting value (line 1, column 11)",
                    }
                ],
            },
            measured=False,
        ),
        _Operation(
            method="get",
            path="/api/v1/capabilities",
            name="capabilities",
            capability="daemon.capabilities",
            summary="Tell what the daemon can do.",
            reply=CapabilityDocument,
            answer=_DOCUMENT,
            measured=False,
            tagged=True,
            links={
                "again": {
                    "operationId": "capabilities",
                    "description": "Ask whether it is still so.",
                    "parameters": {f"header.{_KNOWN}": "$response.header.ETag"},
                }
            },
        ),
        _Operation(
            method="post",
            path="/api/v1/capabilities",
            name="advertise",
            capability="daemon.negotiate",
            summary="Tell what the client can do; the answer tells what the daemon can.",
            request=CapabilityDocument,
            example=_DOCUMENT,
            reply=CapabilityDocument,
            answer=_DOCUMENT,
            refusals=(426,),
            measured=False,
            tagged=True,
            links={
                "again": {
                    "operationId": "capabilities",
                    "description": "Ask whether it is still so.",
                    "parameters": {f"header.{_KNOWN}": "$response.header.ETag"},
                }
            },
        ),
        _Operation(
            method="get",
            path="/api/v1/bindings/capabilities",
            name="bindings",
            capability="daemon.capabilities",
            summary="Tell what the daemon can do, in the older form.",
            reply={"type": "object", "additionalProperties": {"$ref": _MODEL.format(model="BindingCapabilities")}},
            answer={
                BINDING: {
                    "binding": BINDING,
                    "capabilities": ["cache.bust", "daemon.capabilities", "daemon.status"],
                    "semverx": SEMVERX,
                    "stage": "experimental",
                    "p2p_enabled": False,
                }
            },
            measured=False,
        ),
    )


def openapi_document() -> dict[str, Any]:
    """Make the document: OpenAPI 3.1, plain JSON types, the same in every process of one version."""
    operations = _operations()
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _written(operation)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "bustcall daemon",
            "version": VERSION,
            "summary": "Drops old values from caches.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(operations),
            "parameters": {name: _parameter(name) for name in (*_PARAMETERS, *_PLACED)},
            "headers": {name: _header(name) for name in _HEADERS},
            "responses": {refusal.name: _refused(refusal) for refusal in _REFUSALS.values()},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": (
                        "Wanted by a daemon that was given a token, for each capability that its document's `access`"
                        " says to be protected or private. Without one, protected is open."
                    ),
                }
            },
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(document))  # nothing in it is there twice, as YAML would tell
    return plain


def _schemas(operations: tuple[_Operation, ...]) -> dict[str, Any]:
    # What is both, such as the capability document, is written as a reply: all of it is optional anyway.
    replies: list[type[BaseModel]] = [BindingCapabilities, Problem]
    replies += [operation.reply for operation in operations if not isinstance(operation.reply, dict)]
    replies += [model for operation in operations for model in operation.streamed.values()]
    asked = [operation.request for operation in operations if operation.request is not None]
    _, schemas = models_json_schema(
        [
            *((model, "validation") for model in asked if model not in replies),
            *((model, "serialization") for model in replies),
        ],
        ref_template=_MODEL,
    )
    found: dict[str, Any] = schemas["$defs"]
    found[BustRequest.__name__]["properties"]["strategy"]["enum"] = list(STRATEGIES)  # others may have other ones
    return found


def _written(operation: _Operation) -> dict[str, Any]:
    parameters = [*_ON_EVERY, *((_KEY,) if operation.keyed else ())]
    parameters += operation.placed
    parameters += [_KNOWN] if operation.tagged and operation.request is None else []
    parameters += [_PLACE] if operation.streamed else []
    refusals = {*_ANY_ROUTE, *operation.refusals, *(_MEASURED if operation.measured else ())}
    headers = [
        _DIGEST,
        *(("Idempotency-Replayed",) if operation.keyed else ()),
        *(("ETag",) if operation.tagged else ()),
    ]
    reply = operation.reply if isinstance(operation.reply, dict) else _model(operation.reply)
    done: dict[str, Any] = {
        "description": "Done.",
        "headers": _refer("headers", headers),
        "content": {
            "text/event-stream" if operation.streamed else "application/json": {
                "schema": reply,
                "example": operation.answer,
            }
        },
    }
    if operation.streamed:
        done["description"] = "It goes on until one side ends it."
        done["x-bustcall-events"] = {name: _model(model) for name, model in operation.streamed.items()}
    if operation.links:
        done["links"] = operation.links
    responses: dict[str, dict[str, Any]] = {"200": done}
    if operation.accepted is not None:
        told = {"application/json": {"schema": reply, "example": operation.accepted}}
        responses["202"] = {**done, "description": "It is in the journal, and goes on as a job.", "content": told}
    if _KNOWN in parameters:
        responses["304"] = {
            "description": "The client has the document that is in effect.",
            "headers": _refer("headers", headers),
        }
    written: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "x-bustcall-capability": operation.capability,
        "parameters": list(_refer("parameters", parameters).values()),
        "security": [{}, {"token": []}],
    }
    if operation.request is not None:
        refusals |= set(_WITH_BODY)
        content = {"schema": _model(operation.request), "example": operation.example}
        written["requestBody"] = {"required": True, "content": {"application/json": content}}
    for status in sorted(refusals):
        responses[str(status)] = {"$ref": f"#/components/responses/{_REFUSALS[status].name}"}
    return {**written, "responses": responses}


def _model(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _MODEL.format(model=model.__name__)}


def _refer(kind: str, names: list[str]) -> dict[str, dict[str, str]]:
    return {name: {"$ref": f"#/components/{kind}/{name}"} for name in names}


def _parameter(name: str) -> dict[str, Any]:
    if name in _PLACED:
        place, description, schema, example = _PLACED[name]
        return {"name": name, "in": place, "required": place == "path", "description": description, "schema": schema,
                "example": example}  # fmt: skip
    description, schema, example = _PARAMETERS[name]
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema,
            "example": example}  # fmt: skip


def _header(name: str) -> dict[str, Any]:
    description, schema, always = _HEADERS[name]
    return {"description": description, "required": always, "schema": schema}


def _refused(refusal: _Refusal) -> dict[str, Any]:
    headers = [_DIGEST, *([] if refusal.header is None else [refusal.header])]
    return {
        "description": refusal.when,
        "headers": _refer("headers", headers),
        "content": {"application/problem+json": {"schema": _model(Problem)}},
    }
