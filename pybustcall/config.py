"""Settings from the environment (BUSTCALL_*) and from a TOML table, checked with precise errors.

This module decides what a settings document may hold and says exactly what is wrong with one: which file or variable,
which key, what was expected, what was found. What a setting means is decided where it is used; its value is checked
there once more, so that arguments get the same errors. Nothing else in the client reads the environment.
"""

from __future__ import annotations

import json
import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar, final

from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr, ValidationError, field_validator

from pybustcall.errors import ConfigurationError
from pybustcall.models import DEFAULT_TOLERANCE
from pybustcall.outbox import Outbox  # noqa: TC001 - pydantic reads it
from pybustcall.policies import Breaker, Budget, Failback, Hedge, Pool, Probes, Retry
from pybustcall.semverx import SemverXRange
from pybustcall.topology import DEFAULT_URL

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ENVIRONMENT", "Settings", "settings_from_env", "settings_from_toml"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class TLSTable(_Table):
    """Table `tls`: PEM files; see `pybustcall.TLS`."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    key_password: SecretStr | None = None


class RequiresTable(_Table):
    """Table `requires`: what a daemon must be able to do, and which versions it may have; see `Requirements`."""

    semverx: str = "*"
    capabilities: tuple[str, ...] = ()

    @field_validator("semverx")
    @classmethod
    def _is_range(cls, value: str) -> str:
        SemverXRange.parse(value)
        return value


def _as_float(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


_Seconds = Annotated[float, BeforeValidator(_as_float)]


def _off(value: object) -> object:
    """Take `false` for None: TOML and the environment have no other word for a policy that is switched off."""
    return None if value is False or value in ("off", "false") else value


_Policy = TypeVar("_Policy")
_Switchable = Annotated[_Policy | None, BeforeValidator(_off)]


@final
class Settings(_Table):
    """Every setting of a client that a document can hold; the names are those of `BustcallClient`'s arguments."""

    url: str = DEFAULT_URL
    peers: tuple[str, ...] = ()
    token: SecretStr | None = None
    tls: TLSTable | None = None
    timeout: _Seconds = 5.0
    fault_tolerance: int = DEFAULT_TOLERANCE
    delivery: Literal["first", "quorum", "all"] = "first"
    retry: _Switchable[Retry] = Retry()
    hedge: _Switchable[Hedge] = Hedge()
    breaker: _Switchable[Breaker] = Breaker()
    budget: _Switchable[Budget] = Budget()
    probes: _Switchable[Probes] = Probes()
    failback: _Switchable[Failback] = Failback()
    requires: RequiresTable | None = None
    outbox: str | Outbox | None = None
    client_id: str | None = None
    pool: Pool = Pool()
    max_reply_bytes: int | None = None
    trust_env: bool = False
    allow_insecure_token: bool = False
    reveal_targets: bool = False
    disabled: bool = False


ENVIRONMENT: Final[Mapping[str, tuple[str, ...]]] = {
    "BUSTCALL_URL": ("url",),
    "BUSTCALL_PEERS": ("peers",),
    "BUSTCALL_TOKEN": ("token",),
    "BUSTCALL_TIMEOUT": ("timeout",),
    "BUSTCALL_FAULT_TOLERANCE": ("fault_tolerance",),
    "BUSTCALL_RETRY_ATTEMPTS": ("retry", "attempts"),
    "BUSTCALL_DELIVERY": ("delivery",),
    "BUSTCALL_OUTBOX": ("outbox",),
    "BUSTCALL_PROBES": ("probes",),
    "BUSTCALL_REQUIRES_SEMVERX": ("requires", "semverx"),
    "BUSTCALL_REQUIRES_CAPABILITIES": ("requires", "capabilities"),
    "BUSTCALL_CLIENT_ID": ("client_id",),
    "BUSTCALL_TLS_CA": ("tls", "ca"),
    "BUSTCALL_TLS_CERT": ("tls", "cert"),
    "BUSTCALL_TLS_KEY": ("tls", "key"),
    "BUSTCALL_TLS_KEY_PASSWORD": ("tls", "key_password"),
    "BUSTCALL_MAX_REPLY_BYTES": ("max_reply_bytes",),
    "BUSTCALL_TRUST_ENV": ("trust_env",),
    "BUSTCALL_ALLOW_INSECURE_TOKEN": ("allow_insecure_token",),
    "BUSTCALL_REVEAL_TARGETS": ("reveal_targets",),
    "BUSTCALL_DISABLED": ("disabled",),
}
"""Which variable sets which setting. An empty one is unset."""

_LISTS: Final = frozenset({("peers",), ("requires", "capabilities")})
"""Those that are separated by commas or spaces."""

_PREFIX: Final = "BUSTCALL_"


def settings_from_env(environ: Mapping[str, str] | None = None) -> Settings:
    """Read settings from BUSTCALL_* variables; raise `ConfigurationError` for an unusable or misspelt one.

    Variables that resemble none of ours are left alone: Kubernetes makes a BUSTCALL_PORT of a service named bustcall.
    """
    environ = os.environ if environ is None else environ
    document: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(_PREFIX) or not value.strip():
            continue
        place = ENVIRONMENT.get(variable)
        if place is None:
            _refuse_misspelling(variable)
            continue
        table = document
        for name in place[:-1]:
            table = table.setdefault(name, {})
        table[place[-1]] = value.replace(",", " ").split() if place in _LISTS else value.strip()
    names = {place[:depth]: variable for variable, place in ENVIRONMENT.items() for depth in (1, 2)}
    return _check(document, lambda place: names[place[:2]], lax=True)


def _refuse_misspelling(variable: str) -> None:
    known = {name.removeprefix(_PREFIX): name for name in ENVIRONMENT}
    if alike := get_close_matches(variable.removeprefix(_PREFIX), known, n=1, cutoff=0.75):
        raise ConfigurationError(f"{variable} is no setting; did you mean {known[alike[0]]}?", setting=variable)


def settings_from_toml(path: str | os.PathLike[str], table: str = "pybustcall") -> Settings:
    """Read settings from one table of a TOML file; raise `ConfigurationError` naming file, key and what was expected.

    `table` is dotted, such as "tool.pybustcall" in a pyproject.toml.
    """
    name = os.fspath(path)
    try:
        document: Any = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{name}: cannot be read ({error.strerror})", setting="path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name}: is not TOML ({error})", setting="path") from error
    for part in table.split("."):
        document = document.get(part) if isinstance(document, dict) else None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{name}: has no table [{table}]", setting=table)
    return _check(document, lambda place: f"{name}: {table}.{'.'.join(place)}", lax=False)


def _check(document: dict[str, Any], naming: Any, *, lax: bool) -> Settings:
    try:
        if lax:  # an environment has only strings
            return Settings.model_validate(document, strict=False)
        # By way of JSON, whose lists and objects strict validation takes for tuples and dataclasses.
        return Settings.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = tuple(str(part) for part in first["loc"])
        key = naming(place)
        secret = {"token", "key_password"} & set(place)
        if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            raise ConfigurationError(f"{key} is no setting", setting=".".join(place)) from None
        expected = (
            first["msg"]
            .removeprefix("Value error, ")
            .replace("Input should be", "expected")
            .replace("valid array", "list")
        )
        found = "" if secret or first["type"] == "value_error" else f", found {first['input']!r}"
        raise ConfigurationError(f"{key}: {expected}{found}", setting=".".join(place)) from None
