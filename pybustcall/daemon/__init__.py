"""The reference daemon: an independent reading of the wire, with a cache behind it.

It imports the vocabulary only (errors, models, keys, faults, topology, capabilities), never a module of the client, so
that the two check each other. `app` answers, in the words of `replies`, `access` lets in, `reading` reads, `serving`
listens and drains, `connections` keeps the connections in bounds. `engine` decides what a bust removes, `jobs` when,
`journal` keeps it, `index` knows what depends on what, `backends` hold the caches themselves. `dependencies` decides
what may replace what, `swaps` does it, `registry` keeps both over restarts. `idempotency` remembers what was answered,
`history` faults, `database` minds the files. `settings`, `configuration` and `checking` say how it is set up, `openapi`
writes the contract down.
"""

from __future__ import annotations

try:
    import sortedcontainers as _sortedcontainers  # noqa: F401 - asked here, so that its absence is told clearly
except ImportError as error:
    raise ImportError("the daemon needs an extra: pip install 'pybustcall[daemon]'") from error

from pybustcall.daemon.app import DaemonSettings, check_settings, create_app
from pybustcall.daemon.backends import Backend, BackendFailure, RefusedKey
from pybustcall.daemon.backends.files import FilesBackend
from pybustcall.daemon.backends.memory import MemoryBackend
from pybustcall.daemon.engine import Engine, IndexFull, Layer, Removal, Unsupported
from pybustcall.daemon.history import FaultHistory
from pybustcall.daemon.idempotency import Idempotency, KeyReused
from pybustcall.daemon.index import Index, Indexes, TooManyNamespaces
from pybustcall.daemon.jobs import Jobs
from pybustcall.daemon.journal import Journal, JournalFailure
from pybustcall.daemon.registry import Registry
from pybustcall.daemon.serving import serve
from pybustcall.daemon.swaps import Swaps

__all__ = [
    "Backend",
    "BackendFailure",
    "DaemonSettings",
    "Engine",
    "FaultHistory",
    "FilesBackend",
    "Idempotency",
    "Index",
    "IndexFull",
    "Indexes",
    "Jobs",
    "Journal",
    "JournalFailure",
    "KeyReused",
    "Layer",
    "MemoryBackend",
    "RefusedKey",
    "Registry",
    "Removal",
    "Swaps",
    "TooManyNamespaces",
    "Unsupported",
    "check_settings",
    "create_app",
    "serve",
]
