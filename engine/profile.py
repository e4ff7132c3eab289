"""Ready-made settings by name: the TOML files of engine/profiles."""

from __future__ import annotations

import difflib
from pathlib import Path

from protos.core.errors import ConfigError

DIRECTORY = Path(__file__).parent / "profiles"
DEFAULT_SIM_PROFILE = "smollm2-cpu"


def names() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.toml"))


def find(name: str) -> Path:
    """The file of a profile. Raises ConfigError naming the nearest ones."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"unknown profile '{name}'; {hint}")
    return DIRECTORY / f"{name}.toml"
