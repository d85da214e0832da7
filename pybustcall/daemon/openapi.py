"""The contract as a file: the daemon's routes as an OpenAPI 3.1 document, made of the same models that check them.

It decides only how the contract is written down. The document is served at /openapi.json, kept in
docs/reference/openapi.yaml, and the daemon is fuzzed against it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pydantic.json_schema import models_json_schema

from pybustcall.capabilities import VERSION
from pybustcall.models import (
    BindingCapabilities,
    BustReply,
    BustRequest,
    CapabilityDocument,
    Problem,
    RegisterReply,
    RegisterRequest,
    StatusReply,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import BaseModel

__all__ = ["openapi_document"]

_REFERENCE: Final = "#/components/schemas/{model}"
_ANY_ROUTE: Final = (401, 403, 421, 500, 503)
_WITH_BODY: Final = (400, 408, 413, 415, 422)
_WHY: Final = {
    400: "The body is not JSON, or not UTF-8.",
    401: "The token is missing or wrong.",
    403: "Pages of other origins may not call a daemon.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    421: "The daemon does not answer for this Host.",
    422: "A field is missing, mistyped or out of range; the problem names it.",
    500: "The cache failed; the problem tells what was removed.",
    503: "The daemon is stopping.",
    507: "The registry is full.",
}
_WHY_KEYED: Final = {
    400: "The body is not JSON, or not UTF-8; or the Idempotency-Key cannot be one, which the problem names.",
    422: (
        "A field is missing, mistyped or out of range, or the Idempotency-Key was used for another request; the problem"
        " names which."
    ),
}
_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": (
        "One for each request, and the same for its repeats: for 10 minutes they are answered alike, and not applied."
    ),
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}
_REPLAYED: Final = {
    "Idempotency-Replayed": {
        "description": "This is the answer to an earlier request with the same key; this one was not applied.",
        "schema": {"type": "string", "const": "true"},
    }
}


def openapi_document() -> dict[str, Any]:
    """Make the document: OpenAPI 3.1, plain JSON types, the same in every process of one version."""
    models: tuple[type[BaseModel], ...] = (BustRequest, RegisterRequest)
    replies: tuple[type[BaseModel], ...] = (
        BustReply,
        StatusReply,
        CapabilityDocument,
        BindingCapabilities,
        RegisterReply,
        Problem,
    )
    _, schemas = models_json_schema(
        [*((model, "validation") for model in models), *((model, "serialization") for model in replies)],
        ref_template=_REFERENCE,
    )
    bindings = {"type": "object", "additionalProperties": _refer(BindingCapabilities)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bustcall daemon",
            "version": VERSION,
            "summary": "Drops old values from caches.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": {
            "/api/v1/bust": {
                "post": _keyed(
                    _operation("bust", "Have the old value of a target dropped.", _refer(BustReply), BustRequest)
                )
            },
            "/api/v1/entries": {
                "post": _operation(
                    "register", "Tell what a cached entry was made of.", _refer(RegisterReply), RegisterRequest, 507
                )
            },
            "/api/v1/status": {"get": _operation("status", "Tell how the daemon is.", _refer(StatusReply))},
            "/api/v1/capabilities": {
                "get": _operation(
                    "capabilities", "Tell what the daemon can do.", _refer(CapabilityDocument), open_=True
                )
            },
            "/api/v1/bindings/capabilities": {
                "get": _operation("bindings", "Tell the same in the older form.", bindings, open_=True)
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _refer(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _operation(
    name: str,
    summary: str,
    reply: dict[str, Any],
    request: type[BaseModel] | None = None,
    *more: int,
    open_: bool = False,
) -> dict[str, Any]:
    refusals = (*_ANY_ROUTE, *(_WITH_BODY if request is not None else ()), *more)
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _answer("Done.", "application/json", reply), **_refusals(refusals, open_=open_)},
        "security": [{}] if open_ else [{}, {"token": []}],
    }
    if request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _refer(request)}}}
    return operation


def _keyed(operation: dict[str, Any]) -> dict[str, Any]:
    """Add to an operation that it takes an idempotency key."""
    responses = {
        status: {**response, "description": _WHY_KEYED.get(int(status), response["description"])}
        for status, response in operation["responses"].items()
    }
    responses["200"] = {**responses["200"], "headers": _REPLAYED}
    return {**operation, "parameters": [_KEY], "responses": responses}


def _refusals(statuses: Iterable[int], *, open_: bool) -> dict[str, Any]:
    return {
        str(status): _answer(_WHY[status], "application/problem+json", _refer(Problem))
        for status in sorted(statuses)
        if not (open_ and status == 401)
    }


def _answer(description: str, content_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {content_type: {"schema": schema}}}
