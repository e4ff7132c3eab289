"""Length distributions of published traces, as quantiles; `presets.json` holds them with source and licence."""

from __future__ import annotations

import difflib
import functools
import importlib.resources

import msgspec

from protos.core.errors import ConfigError


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    license: str
    attribution: str
    prompt_tokens: tuple[float, ...]
    """Quantiles at equal steps from the smallest to the largest."""
    output_tokens: tuple[float, ...]


@functools.cache
def presets() -> dict[str, Preset]:
    data = importlib.resources.files("replay").joinpath("presets.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, Preset])


def preset(name: str) -> Preset:
    """Raises ConfigError naming the nearest."""
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise ConfigError(f"--preset: no preset {name!r}; {hint}")
    return known[name]
