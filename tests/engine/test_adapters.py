"""LoRA adapters in the settings, and what is said about wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.adapters import largest_rank, read_flag
from engine.cli import load_settings
from protos.core.errors import ConfigError


def test_adapters_are_names_of_the_model_after_its_own() -> None:
    settings = load_settings(None, {}, {"served_model_name": ["tide"], "lora": read_flag(["a=/x", "b=y=z"])})
    assert settings.names == ("tide", "a", "b")
    assert settings.lora == {"a": "/x", "b": "y=z"}


def test_wrong_adapters_are_explained(tmp_path: Path) -> None:
    for flag in ("a", "=x", "a="):
        with pytest.raises(ConfigError, match="NAME=PATH"):
            read_flag([flag])
    with pytest.raises(ConfigError, match="'tide' is the name of the model"):
        load_settings(None, {}, {"served_model_name": ["tide"], "lora": {"tide": "x"}})
    with pytest.raises(ConfigError, match=r"engine\.lora\.a: .*adapter_config\.json: No such file"):
        largest_rank({"a": str(tmp_path)})


def test_rank_is_the_next_that_vllm_takes(tmp_path: Path) -> None:
    for rank, expected in ((4, 8), (16, 16), (17, 32)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"}))
        assert largest_rank({"a": str(tmp_path)}) == expected
    (tmp_path / "adapter_config.json").write_text('{"r": 4096}')
    with pytest.raises(ConfigError, match="4096"):
        largest_rank({"a": str(tmp_path)})
