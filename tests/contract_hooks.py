"""What schemathesis has to be told to make requests that the contract allows: texts of the three named formats.

Loaded by schemathesis itself, in the process that `test_contract` starts (see tests/schemathesis.toml).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import schemathesis
from hypothesis import strategies as st

__all__ = ["names", "specs", "versions"]

numbers = st.integers(0, 12) | st.integers(0, 2**53 - 1)
"""Of a version: most are small, so that versions meet."""
states = st.sampled_from(["stable", "legacy", "experimental"])
identifiers = st.sampled_from(["alpha", "rc", "legacy", "experimental", "x-y", "0a"]) | numbers.map(str)
numbered = st.tuples(numbers, numbers, numbers).map(lambda parts: ".".join(map(str, parts)))
suffixes = st.lists(identifiers, min_size=1, max_size=3).map(".".join)
six_parts = st.tuples(numbers, states, numbers, states, numbers, states).map(lambda parts: ".".join(map(str, parts)))
versions = (
    numbered
    | six_parts
    | st.tuples(numbered, suffixes).map("-".join)
    | st.tuples(numbered, suffixes).map("+".join)
    | numbered.map("v{}".format)
)
"""SemVer and SemverX versions (docs/reference/semverx.md)."""

EXAMPLE = "0f5e1c9a6b7d4e3f8a9b0c1d2e3f4a5b"
"""The job that the contract's examples name; there is none of that name."""

words = st.text(
    st.characters(
        min_codepoint=0x21, max_codepoint=0x24F, exclude_characters="@\x7f/\xad", exclude_categories=["C", "Z"]
    ),
    min_size=1,
    max_size=12,
)
names = words | st.tuples(words, words).map("@{0[0]}/{0[1]}".format)
"""Names of cache dependencies, some with a scope."""

ranges = (
    st.sampled_from(["*", "latest", "1.x", "^2", "~0.1", "2.stable.*.stable.*.stable"])
    | versions
    | st.tuples(st.sampled_from(["^", "~", ">=", "<", "="]), numbered).map("".join)
)
specs = names | st.tuples(names, ranges).map("@".join)
"""A name, or a name and a range."""

schemathesis.openapi.format("bustcall-name", names)
schemathesis.openapi.format("bustcall-spec", specs)
schemathesis.openapi.format("bustcall-version", versions)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Say what JSON Schema cannot.

    An integer has no fraction, not even .0; a key goes with one body; to bust everything is confirmed; and a page is
    told by a job that there is.
    """
    if isinstance(case.body, dict) and case.body.get("kind") == "all":
        case.body = {**case.body, "target": "*", "confirm": True}
    before = case.query.get("before") if case.query else None
    if before is not None and (before == EXAMPLE or not re.fullmatch("[0-9a-f]{32}", str(before))):
        del case.query["before"]
    case.body = whole(case.body)
    key = case.headers.get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch("[!-~]{1,255}", key):
        body = json.dumps(case.body, sort_keys=True, default=repr).encode()
        case.headers["Idempotency-Key"] = f"{key[:200]}-{hashlib.sha256(body).hexdigest()[:16]}"


def whole(value: object) -> Any:
    """Write 8.0 as 8, wherever it stands: to JSON Schema they are the same."""
    match value:
        case dict():
            return {key: whole(item) for key, item in value.items()}
        case list():
            return [whole(item) for item in value]
        case float() if value.is_integer():
            return int(value)
    return value
