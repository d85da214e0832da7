"""For tests of code that busts: a fake daemon with a fault plan, a faulty proxy, and a conformance suite."""

from __future__ import annotations

from pybustcall.testing.conformance import CHECKS, Check, Verdict, check_daemon
from pybustcall.testing.fake_daemon import Answer, FakeDaemon
from pybustcall.testing.proxy import FaultyProxy, Trouble

__all__ = ["CHECKS", "Answer", "Check", "FakeDaemon", "FaultyProxy", "Trouble", "Verdict", "check_daemon"]
