"""vLLM's processes do not outlive their worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from engine.backends import vllm_plugin

FOLLOWER = "from engine.backends.vllm_plugin import follow_worker; follow_worker(); print('up', flush=True); input()"


def test_process_is_killed_when_its_worker_is() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        environ = os.environ | {vllm_plugin.WORKER_PID: str(worker.pid)}
        with subprocess.Popen(
            [sys.executable, "-c", FOLLOWER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
        ) as follower:
            assert follower.stdout is not None
            assert follower.stdout.readline() == b"up\n"
            assert follower.poll() is None
            worker.kill()
            assert follower.wait(timeout=10) == -9


def test_ctrl_c_for_the_worker_is_not_for_its_engine() -> None:
    """A terminal sends it to all of its group."""
    worker = "import signal, subprocess, sys\n"
    worker += "signal.signal(signal.SIGINT, lambda *_: print('drains', flush=True))\n"
    worker += "engine = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE)\n"
    worker += "engine.wait()\n"
    environ = os.environ | {vllm_plugin.WORKER_PID: str(os.getpid())}
    with subprocess.Popen(
        [sys.executable, "-c", worker, FOLLOWER], stdout=subprocess.PIPE, env=environ, start_new_session=True
    ) as group:
        assert group.stdout is not None
        assert group.stdout.readline() == b"up\n"
        (engine,) = psutil.Process(group.pid).children()
        os.killpg(group.pid, signal.SIGINT)
        assert group.stdout.readline() == b"drains\n"
        assert engine.is_running()
        assert os.getpgid(engine.pid) != group.pid
        engine.kill()


def test_worker_itself_and_vllm_alone_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin.threading, "Thread", lambda **_: pytest.fail("it follows"))
    monkeypatch.delenv(vllm_plugin.WORKER_PID, raising=False)
    vllm_plugin.follow_worker()
    monkeypatch.setenv(vllm_plugin.WORKER_PID, str(os.getpid()))
    vllm_plugin.follow_worker()
