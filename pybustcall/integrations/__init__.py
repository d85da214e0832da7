"""What applications use of other libraries' caches, one module for each. None is loaded unless it is imported."""

from __future__ import annotations

__all__: list[str] = []
