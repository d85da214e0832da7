"""The conformance suite: what any daemon must do so that this client can rely on it, checked from outside.

Each check sends requests of the base protocol, or of an extension that the daemon advertises, and says whether the
answers are right. It decides nothing about how a daemon does it, in which language, or with which cache; every daemon
that passes can serve busts.

Keys and dependencies are new ones in each check, so that the suite can be run again, and by several at once. At the end
what was announced is forgotten, as far as the daemon forgets.
"""

from pybustcall.testing.conformance.checking import Check, Verdict
from pybustcall.testing.conformance.suite import CHECKS, check_daemon

__all__ = ["CHECKS", "Check", "Verdict", "check_daemon"]
