"""The page of the reference that tells every setting of the configuration file, made from the model that reads it.

This module decides only how the page reads. What may stand in the file, and what each key means, is `configuration`'s.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from pybustcall.daemon.configuration import (
    Document,
    FilesLayer,
    MemcachedLayer,
    MemoryLayer,
    RedisLayer,
    SqliteLayer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

__all__ = ["EXAMPLE", "settings_page"]

EXAMPLE: Final = """\
[listen]
host = "0.0.0.0"                        # beyond loopback, so that a token is needed
port = 8989
# socket = "/run/bustcall/daemon.sock"  # instead of host and port
allowed_hosts = ["bust.internal"]

[access]                                # no token stands in this file
token_file = "secrets/token"            # or the variable BUSTCALL_TOKEN
operator_token_file = "secrets/operator"
tenants = { shop = "secrets/shop" }     # a token that opens this namespace only
tiers = { "daemon.status" = "public", "cache.hotswap" = "private" }

[requires]                              # of clients
semverx = ">=0.1"
capabilities = ["cache.bust"]

[limits]
max_body_bytes = 65536
max_connections = 1000
max_entries = 1_000_000
read_timeout = 10                       # seconds, as all times here
answer_within = 1
drain = 10

[files]
state = "state.db"                      # idempotency keys
registry = "registry.db"                # entries and dependencies
register = "entries.json"               # {"index.html": ["products/7.html"]}

[journal]
path = "journal.db"
retention = 604800
most = 100_000

[namespaces]
allowed = ["default", "shop"]
most = 1000                             # if any are allowed

[events]                                # for those who follow what is busted
kept = 10_000
readers = 500                           # with one token
heartbeat = 5

[[layers]]                              # the innermost is busted first
name = "redis"
number = 0
backend = "redis"
url_env = "REDIS_URL"                   # the URL has a password
# url_file = "secrets/redis-url"        # likewise
# url = "redis://cache.internal/0"      # a URL without one
prefix = "shop"
# foreign = "pages:{namespace}:{key}"   # keys that another program stores
timeout = 1
connect_timeout = 1
connections = 16
fences = 10_000

[[layers]]
name = "pages"
number = 1
backend = "files"
root = "pages/{namespace}"
settle = 2                              # busted again after 2 seconds
"""
"""A file with every key, those that exclude one another in comments."""

_HEAD: Final = """\
# The daemon's settings

`pybustcall daemon --config bustcall.toml` reads one TOML file, which says everything that the options say, and more.
No key is needed. What an option says on the command line stands instead of what the file says of the same; layers are
in the file only, and `--root` or `--backend` together with them are refused. Paths are relative to the directory of the
file.

`pybustcall daemon --config bustcall.toml --check` tells all that is wrong, one finding a line (with `--json` an object
a line), and changes nothing: what stands in the file, whether roots and tokens are there, whether the daemon could keep
its files where it should, and whether each cache answers; the file of an `sqlite` layer is looked at, and not opened.
What cannot be read of the file is left out of the rest. It ends with 0 if all is in order, with 4 otherwise. That the
address is free is not asked, since the daemon that runs now has it.

```text
bustcall.toml: listen.port: expected a whole number, found "8989"
bustcall.toml: layers.0.root: the root '/srv/pages' does not exist; make it, or name another
bustcall.toml: layers.1.root: warning: the layer thumbs knows the namespace default only: busts in others (shop) \
are refused, at all layers; put {namespace} into its root
```

A warning is what a daemon serves with all the same: files that know no namespaces where `namespaces.allowed` names
some, a Redis server that may evict what entries are found by, or one that does not tell of its restarts. The last line,
if all is in order, names the layers, and what the daemon will not advertise, since one of them cannot do it:

```text
bustcall.toml: in order: 2 layers: redis (0), pages (1); not advertised: cache.bust.soft (lacked by pages)
```

**No secret stands in the file.** A token is in a file of its own (`token_file`), or in the environment; so is a Redis
URL with a password (`url_file`, `url_env`). A file that is named wins over `BUSTCALL_TOKEN`.
"""

_LAYERS: Final = """\
## `[[layers]]`

Each cache is a table of its own. The lowest number is the innermost and busted first; layers of one number are busted
together. Why, and what happens when one fails, is told in [the engine](../explanation/engine.md). Without any there is
one layer in memory. A Redis server that does not answer does not keep the daemon from starting; a directory that is
missing does.
"""


def settings_page() -> str:
    """Write the page, in Markdown."""
    schema = Document.model_json_schema()
    parts = [_HEAD]
    for name in Document.model_fields:
        if name != "layers":
            table = _resolved(schema["properties"][name], schema)
            parts.append(f"## `[{name}]`\n\n{table['description']}\n\n{_rows(table)}")
    parts.append(_LAYERS)
    parts += [_kind(table) for table in (MemoryLayer, FilesLayer, RedisLayer, SqliteLayer, MemcachedLayer)]
    parts.append(f"## All of it\n\n```toml\n{EXAMPLE}```\n")
    return "\n".join(parts)


def _kind(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    name = schema["properties"]["backend"]["const"]
    return f'### `backend = "{name}"`\n\n{schema["description"]}\n\n{_rows(schema)}'


def _rows(table: dict[str, Any]) -> str:
    needed = table.get("required", ())
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in table["properties"].items():
        default = "needed" if name in needed else _default(field.get("default"))
        lines.append(f"| `{name}` | {_type(field)} | {default} | {field['description']} |")
    return "\n".join([*lines, ""])


def _default(value: object) -> str:
    if value is None:
        return ""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return f"`{json.dumps(number)}`"


def _type(field: dict[str, Any]) -> str:
    """Say in words which values a key may have."""
    found = next((kind for kind in field.get("anyOf", ()) if kind.get("type") != "null"), field)
    match found["type"]:
        case "integer" | "number" as kind:
            return ", ".join([{"integer": "whole number", "number": "number"}[kind], *_bounds(found)])
        case "array":
            return "list of strings"
        case "object":
            return "table of strings"
        case _:
            return "string"


def _bounds(found: dict[str, Any]) -> Iterator[str]:
    least, most, above = found.get("minimum"), found.get("maximum"), found.get("exclusiveMinimum")
    if least is not None and most is not None:
        yield f"{least:g} to {most:g}"
    elif least is not None:
        yield f"{least:g} or more"
    else:
        yield f"above {above:g}"
        if most is not None:
            yield f"at most {most:g}"


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference within the schema."""
    found: dict[str, Any] = schema["$defs"][part["$ref"].rpartition("/")[2]]
    return found
