"""LoRA adapters: other names of the model, each with small weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from protos.core.errors import ConfigError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`."""


class _AdapterConfig(msgspec.Struct):
    """Of adapter_config.json, as peft writes it."""

    r: int


def read_flag(values: list[str]) -> dict[str, str] | None:
    """`NAME=PATH` of each --lora; None where there is none. Raises ConfigError."""
    adapters = {}
    for value in values:
        name, is_pair, path = value.partition("=")
        if not (name and is_pair and path):
            raise ConfigError(f"--lora {value}: must be NAME=PATH")
        adapters[name] = path
    return adapters or None


def largest_rank(adapters: Mapping[str, str]) -> int:
    """The smallest rank that vLLM takes and all adapters fit. Raises ConfigError."""
    needed = max(_rank(name, path) for name, path in adapters.items())
    fitting = [rank for rank in RANKS if rank >= needed]
    if not fitting:
        raise ConfigError(f"engine.lora: an adapter of rank {needed} is larger than vLLM's largest, {RANKS[-1]}")
    return fitting[0]


def _rank(name: str, path: str) -> int:
    file = Path(path).expanduser() / "adapter_config.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=_AdapterConfig).r
    except (OSError, msgspec.MsgspecError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"engine.lora.{name}: {file}: {reason}; an adapter is a folder that peft saved") from None
