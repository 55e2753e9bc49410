"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util


def require(what: str, *packages: str) -> None:
    """Raises ValueError, with what to type, when one of `packages` (names of imports) is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise ValueError(f"{what} needs the package{plural} {' and '.join(missing)}: pip install {' '.join(missing)}")
