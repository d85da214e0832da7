"""The daemons in `node/` and `lua/`, and the clients in those languages that the documentation shows.

How a command is found and what it needs is decided here; processes are started and ended as everywhere.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.interop import PeerProcess, require, start_peer, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["CLIENTS", "FOLLOWER", "PEERS", "lua", "node", "start_lua_peer", "start_node_peer"]

_HERE = Path(__file__).parent
_CLIENTS = _HERE.parent.parent / "docs" / "how-to" / "clients"
_OLDEST_NODE = 18


@cache
def node() -> str:
    """Return the path of Node.js; without one that is new enough skip the test, or fail it in CI."""
    hint = f"apt install nodejs (Node.js {_OLDEST_NODE} or newer)"
    path = require("node", hint)
    version = subprocess.run([path, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    if int(version.removeprefix("v").partition(".")[0]) < _OLDEST_NODE:
        unavailable(f"node is {version.strip()}: {hint}")
    return path


@cache
def lua() -> str:
    """Return the path of Lua 5.4; without it or its two libraries skip the test, or fail it in CI."""
    hint = "apt install lua5.4 lua-socket lua-cjson"
    path = require("lua5.4", hint)
    if subprocess.run([path, "-e", 'require "socket"; require "cjson"'], capture_output=True, check=False).returncode:
        unavailable(f"Lua lacks LuaSocket or lua-cjson: {hint}")
    return path


PEERS: Final[Mapping[str, Callable[[], list[str]]]] = {
    "node": lambda: [node(), str(_HERE / "node" / "peer.mjs")],
    "lua": lambda: [lua(), str(_HERE / "lua" / "peer.lua")],
}
"""The commands that start each daemon; options may follow."""

CLIENTS: Final[Mapping[str, Callable[[], list[str]]]] = {
    "node": lambda: [node(), str(_CLIENTS / "bust.mjs")],
    "lua": lambda: [lua(), str(_CLIENTS / "bust.lua")],
}
"""The commands of the documentation's clients; targets follow."""

FOLLOWER: Final[Callable[[], list[str]]] = lambda: [node(), str(_CLIENTS / "follow.mjs")]  # noqa: E731 - as the others
"""The command of the documentation's client that follows events; prefixes may follow."""


def start_node_peer(*options: str) -> PeerProcess:
    """Start the Node.js daemon on a free port."""
    return start_peer([*PEERS["node"](), "--port", "0", *options])


def start_lua_peer(*options: str) -> PeerProcess:
    """Start the Lua daemon on a free port."""
    return start_peer([*PEERS["lua"](), "--port", "0", *options])
