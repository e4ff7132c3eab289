"""LoRA adapters: what is said about wrong ones, and that they answer under their own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.adapters import largest_rank, read_flag
from engine.backends.sim import SimBackend
from engine.cli import load_settings
from engine.model import pull
from engine.settings import DEFAULT_MODEL, EngineSettings
from protos.core.contract import FailureKind, TextPrompt, TokenPrompt
from protos.core.errors import ConfigError
from tests.engine.adapter import make_adapter
from tests.engine.conftest import worker_process
from tests.engine.peer import Answer, connect, running_worker, submit

PROMPT = TokenPrompt(tuple(range(1000, 1200)))


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


async def ask(address: str, *models: str) -> list[Answer]:
    """The same prompt of each model, one after another."""
    answers = []
    async with connect(address) as peer:
        for slot, model in enumerate(models, 1):
            answers += await peer.ask(
                submit(slot, PROMPT, model=model, max_tokens=12, temperature=0.0, ignore_eos=True)
            )
    return answers


def check(base: Answer, adapter: Answer, again: Answer) -> None:
    """An adapter has its own answers and its own part of the prefix cache."""
    assert base.token_ids != adapter.token_ids == again.token_ids
    assert adapter.finished is not None
    assert again.finished is not None
    assert adapter.finished.cached_tokens == 0 < again.finished.cached_tokens


async def test_simulated_engine_answers_differently_by_adapter() -> None:
    settings = EngineSettings(backend="sim", port=0, model="tide", lora={"ebb": "anywhere"})
    async with running_worker(settings, SimBackend(settings)) as running:
        async with connect(running.address) as peer:
            welcome = peer.frames[0].welcome
            assert welcome is not None
            assert (welcome.model.names, welcome.model.adapters) == (("tide", "ebb"), ("ebb",))
        check(*await ask(running.address, "tide", "ebb", "ebb"))
        async with connect(running.address) as peer:
            (unknown,) = await peer.ask(submit(1, TextPrompt("hi"), model="flood"))
        assert unknown.failed is not None
        assert unknown.failed.kind is FailureKind.UNKNOWN_MODEL


@pytest.mark.vllm
@pytest.mark.timeout(300)
async def test_vllm_answers_with_the_adapter(tmp_path: Path) -> None:
    pull(DEFAULT_MODEL, lambda *_: None)
    adapter = make_adapter(tmp_path / "adapter")
    with worker_process(tmp_path, "vllm", "--lora", f"ebb={adapter}") as address:
        check(*await ask(address, DEFAULT_MODEL, "ebb", "ebb"))
