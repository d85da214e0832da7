"""What each side can do: pybustcall's own advertisement, and what a daemon said of itself.

The advertisement is capabilities.json, of which there is one source: the file at the project's root, which the wheel
carries inside the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from packaging.version import Version

from pybustcall.models import BindingCapabilities, CapabilityDocument

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SEMVERX", "VERSION", "DaemonCapabilities", "advertisement", "semverx_of"]

VERSION: Final = version("pybustcall")
"""This package's version, as PEP 440 writes it."""


def semverx_of(text: str) -> str:
    """Write a PEP 440 version as SemverX: `MAJOR.state.MINOR.state.PATCH.state`.

    A pre-release or development version is experimental in all three parts, any other is stable.
    """
    parsed = Version(text)
    state = "experimental" if parsed.is_prerelease else "stable"
    return ".".join(f"{part}.{state}" for part in (parsed.major, parsed.minor, parsed.micro))


SEMVERX: Final = semverx_of(VERSION)
"""This package's version as SemverX, which every request carries."""


@cache
def advertisement() -> CapabilityDocument:
    """Read pybustcall's own capability document."""
    packaged = files("pybustcall") / "capabilities.json"
    source = Path(__file__).parent.parent / "capabilities.json"  # a checkout, where the package is not built
    text = packaged.read_bytes() if packaged.is_file() else source.read_bytes()
    return CapabilityDocument.model_validate_json(text)


@final
@dataclass(frozen=True, slots=True)
class DaemonCapabilities:
    """What a daemon said it can do.

    - `daemon`: its URL
    - `document`: its capability document, if it serves /api/v1/capabilities
    - `bindings`: what it serves at /api/v1/bindings/capabilities instead
    """

    daemon: str
    document: CapabilityDocument | None = None
    bindings: Mapping[str, BindingCapabilities] = field(default_factory=dict)

    @property
    def base_only(self) -> bool:
        """Whether the daemon advertises nothing: it is served with the base protocol alone."""
        return self.document is None

    @property
    def names(self) -> frozenset[str]:
        """The names of all capabilities advertised."""
        if self.document is not None:
            return frozenset(self.document.capabilities)
        return frozenset(name for binding in self.bindings.values() for name in binding.capabilities)
