"""Workers for the tests: in this process with a simulated engine, or as processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.backends.sim import SimBackend
from engine.model import pull
from engine.settings import DEFAULT_MODEL, EngineSettings
from tests.engine.adapter import make_adapter
from tests.engine.peer import Running, running_worker

CONTEXT_TOKENS = 512
REQUIRE_VLLM = os.environ.get("TIDEGATE_REQUIRE_VLLM") == "1"
STEP_LOG = "steps.jsonl"
ADAPTER = "ebb"
SETTINGS = f"""
dtype = "float32"
max_model_len = {CONTEXT_TOKENS}
max_num_seqs = 16
max_num_batched_tokens = 512
kv_cache_gib = 0.5

[engine.sim]
step_ms = 2
"""
"""float32: greedy answers are compared, and bfloat16 rounds by what else is in the batch."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None and not REQUIRE_VLLM:
        for item in items:
            if item.get_closest_marker("vllm") is not None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def vllm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def sim_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sim")


@pytest.fixture(scope="session")
def vllm_address(vllm_folder: Path) -> Iterator[str]:
    """A worker with the default model and an adapter of it on real vLLM, started once."""
    pull(DEFAULT_MODEL, lambda *_: None)
    adapter = make_adapter(vllm_folder / "adapter")
    with worker_process(vllm_folder, "vllm", "--lora", f"{ADAPTER}={adapter}") as address:
        yield address


@pytest.fixture(scope="session")
def sim_address(sim_folder: Path) -> Iterator[str]:
    with worker_process(sim_folder, "sim", "--profile", "instant", "--lora", f"{ADAPTER}=simulated") as address:
        yield address


@pytest.fixture(params=["sim", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(300)])])
def address(request: pytest.FixtureRequest) -> str:
    """The same promises hold for both engines."""
    return str(request.getfixturevalue(f"{request.param}_address"))


@pytest.fixture
def step_log_path(request: pytest.FixtureRequest, address: str) -> Path:
    """Where the engine behind `address` logs its steps."""
    folder: Path = request.getfixturevalue(f"{request.node.callspec.params['address']}_folder")
    return folder / STEP_LOG


@contextmanager
def worker_process(folder: Path, backend: str, *arguments: str) -> Iterator[str]:
    """HOST:PORT of a worker process, once it says that it is ready."""
    config = folder / "tidegate.toml"
    config.write_text(f'[engine]\nstep_log = "{folder / STEP_LOG}"\n{SETTINGS}')
    command = [
        sys.executable,
        "-m",
        "deploy",
        "engine",
        "--backend",
        backend,
        "--port",
        "0",
        "--config",
        str(config),
        *arguments,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if "worker-1: " in line:
                    break
            else:
                pytest.fail(f"the {backend} worker did not start:\n{''.join(said)}")
            # What it says from now on must not fill the pipe.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield line.strip().rsplit(", ", 1)[1]
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
async def worker() -> AsyncIterator[Running]:
    """A worker in this process; its simulated engine makes a step of all sequences every 2 ms."""
    settings = EngineSettings(backend="sim", port=0, profile="test", max_num_seqs=64, drain_s=5.0)
    async with running_worker(settings, SimBackend(settings)) as running:
        yield running
