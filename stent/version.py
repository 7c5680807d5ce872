"""The version of this package, for code below the facade."""

from __future__ import annotations

__version__ = "0.1.0"
