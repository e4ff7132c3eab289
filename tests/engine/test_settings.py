"""Settings of a worker, their profiles, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import profile
from engine.backends.sim import SimBackend
from engine.cli import load_settings
from engine.settings import DEFAULT_MODEL, EngineSettings
from protos.core.errors import ConfigError


def test_defaults_are_the_small_model_on_vllm() -> None:
    settings = load_settings(None, {}, {})
    assert (settings.backend, settings.model, settings.profile) == ("vllm", DEFAULT_MODEL, "")


def test_simulated_engine_always_has_a_profile() -> None:
    settings = load_settings(None, {}, {"backend": "sim"})
    assert settings.profile == profile.DEFAULT_SIM_PROFILE
    assert settings.sim.step_us > 0


def test_profile_loses_to_file_environment_and_flag(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_text("[engine]\nmax_num_seqs = 3\n[engine.sim]\ndecode_us = 5\n")
    settings = load_settings(
        file,
        {"TIDEGATE__ENGINE__SIM__STEP_US": "7"},
        {"profile": "qwen3-14b-a100", "max_model_len": 99},
    )
    assert (settings.backend, settings.model, settings.profile) == ("sim", "Qwen3-14B", "qwen3-14b-a100")
    assert (settings.max_num_seqs, settings.max_model_len) == (3, 99)
    assert (settings.sim.decode_us, settings.sim.step_us, settings.sim.prefill_token_us) == (5, 7, 172)


@pytest.mark.parametrize("name", profile.names())
async def test_every_profile_is_valid(name: str) -> None:
    settings = load_settings(None, {}, {"profile": name})
    assert settings.profile == name
    if settings.backend == "sim":
        assert (await SimBackend(settings).start()).simulated


def test_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'qwen3-14b-a100'"):
        load_settings(None, {}, {"profile": "qwen3-14b-a10"})


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_text("[engine]\nmax_num_seq = 3\n")
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        load_settings(file, {}, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", 65536),
        ("port", -1),
        ("drain_s", -1),
        ("max_model_len", 0),
        ("max_num_seqs", -1),
        ("max_num_batched_tokens", 0),
        ("tensor_parallel_size", 0),
        ("gpu_memory_utilization", 92),
        ("kv_cache_gib", 0),
        ("sim.step_us", -1),
        ("sim.kv_block_tokens", 0),
        ("sim.kv_blocks", 0),
    ],
)
def test_number_that_cannot_work_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"engine.{key}: expected"):
        load_settings(None, {}, {"backend": "sim", key: value})


async def test_cache_too_small_for_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_blocks"):
        await SimBackend(EngineSettings(backend="sim", max_model_len=2_000_000)).start()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (EngineSettings(), (DEFAULT_MODEL,)),
        (EngineSettings(model="Qwen/Qwen3-14B"), ("Qwen/Qwen3-14B",)),
        (EngineSettings(model="/models/mine/"), ("mine",)),
        (EngineSettings(model="x", served_model_name=["a", "b"]), ("a", "b")),
    ],
)
def test_clients_call_a_model_by_its_name(settings: EngineSettings, names: tuple[str, ...]) -> None:
    assert settings.names == names
