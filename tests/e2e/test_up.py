"""`tidegate up` as a user sees it: faults, Ctrl-C, and one-line errors. Simulated workers, real processes."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.conftest import Up, free_ports, tidegate, wait_until

MODEL = "SmolLM2-135M-Instruct"
HELLO: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


def long_stream(up: Up, tokens: int) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    return up.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
    )


def kill(up: Up, part: str) -> None:
    os.kill(up.pid_of(part), signal.SIGKILL)


def ready_workers(up: Up) -> int:
    state = up.state()
    return sum(worker["state"] == "ready" for worker in state["workers"]) if state else 0


@pytest.fixture
def both_ready(sim_up: Up) -> Up:
    wait_until(lambda: ready_workers(sim_up) == 2, "what an earlier test killed is back")
    return sim_up


def test_killed_worker_comes_back_and_meanwhile_the_other_serves(both_ready: Up) -> None:
    up, before = both_ready, both_ready.pid_of("worker-1")
    starts = up.output.count("worker-1 is ready")
    kill(up, "worker-1")
    wait_until(lambda: "worker-1 died (killed by SIGKILL" in up.output, "up notices the death")
    assert up.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices
    wait_until(lambda: up.output.count("worker-1 is ready") > starts, "worker-1 comes back")
    assert up.pid_of("worker-1") != before
    wait_until(lambda: ready_workers(up) == 2, "the gateway has both again")


def test_request_without_a_token_moves_to_the_other_worker(both_ready: Up) -> None:
    up = both_ready
    with concurrent.futures.ThreadPoolExecutor() as threads:
        prompt = "a long prompt takes the engine a while to read " * 600
        answer = threads.submit(up.client().completions.create, model=MODEL, prompt=prompt, max_tokens=2)
        wait_until(lambda: busy_worker(up), "a worker has the request")
        kill(up, busy_worker(up))
        assert answer.result(timeout=60).choices[0].finish_reason == "length"
    wait_until(lambda: up.state()["leases"] == 0, "leases return to zero")


def busy_worker(up: Up) -> str:
    """Address of a worker that runs a request, or ""."""
    return next((str(worker["address"]) for worker in up.state()["workers"] if worker["leases"]), "")


def test_started_stream_of_a_killed_worker_ends_in_an_error_event(both_ready: Up) -> None:
    stream = long_stream(both_ready, 2000)
    chunks = iter(stream)
    for _ in range(3):
        next(chunks)
    kill(both_ready, stream.response.headers["x-tidegate-worker"])
    with pytest.raises(openai.APIError):
        list(chunks)
    wait_until(lambda: both_ready.state()["leases"] == 0, "leases return to zero")


def test_killed_gateway_comes_back_and_its_capture_is_sound(both_ready: Up) -> None:
    up = both_ready
    up.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    captures = set(up.captures.iterdir())
    wait_until(lambda: up.state()["capture"]["written"] > 0, "the request is captured")
    kill(up, "gateway")
    wait_until(lambda: up.output.count("gateway is ready") == 2, "the gateway comes back")
    wait_until(lambda: ready_workers(up) == 2, "the gateway has both workers again")
    assert up.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices
    for capture in captures:
        verdict = tidegate("capture", "verify", str(capture), cwd=up.folder)
        assert verdict.returncode == 0, verdict.stdout


def test_interrupt_lets_running_streams_finish(own_up: Up) -> None:
    stream = long_stream(own_up, 40)
    chunks = iter(stream)
    next(chunks)
    family = own_up.family()
    received: list[int] = []
    reader = threading.Thread(target=lambda: received.append(sum(1 for _ in chunks)))
    reader.start()
    assert own_up.stop() == 0
    reader.join()
    assert received[0] >= 40
    assert not [process for process in family if process.is_running()]


def test_second_interrupt_ends_streams_with_an_error_event_at_once(own_up: Up) -> None:
    with long_stream(own_up, 4000) as stream:
        chunks = iter(stream)
        next(chunks)
        own_up.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in own_up.output, "up drains")
        assert own_up.stop(timeout_s=10) == 0
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in chunks:
                pass


def test_killed_up_leaves_no_orphans(own_up: Up) -> None:
    family = own_up.family()
    own_up.process.kill()
    own_up.process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_simulated_engine_announces_itself(sim_up: Up) -> None:
    assert "SIMULATED ENGINE" in sim_up.output
    model = next(iter(sim_up.client().models.list()))
    assert (model.model_extra or {})["tidegate"]["simulated"] is True


def test_up_says_what_to_try_next(sim_up: Up) -> None:
    assert f"curl -N {sim_up.url}/v1/chat/completions" in sim_up.output
    assert "tidegate replay run" in sim_up.output
    assert "--speed 10" in sim_up.output


# ---------------------------------------------------------------- one line, exit 2, no traceback


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("tidegate: ")
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = tidegate("up", "--backend", "sim", "--port", str(port), cwd=tmp_path)
    assert_one_line(result, f"port {port}", "in use", "--port")


@pytest.mark.parametrize("command", ["up", "gateway", "engine"])
def test_unknown_key(tmp_path: Path, command: str) -> None:
    (tmp_path / "tide.toml").write_text(f"[{command}]\nprot = 1\n")
    result = tidegate(command, "--config", "tide.toml", cwd=tmp_path)
    assert_one_line(result, "tide.toml", "'prot'", "did you mean 'port'")


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--config", "missing.toml"),
        ("up", "--backend", "quantum"),
        ("up", "--port", "70000"),
        ("engine", "--backend", "sim", "--profile", "nope"),
        ("engine", "--backend", "sim", "--host", "203.0.113.7"),
        ("capture", "show", "missing"),
        ("capture", "verify", "missing"),
        ("replay", "run", "missing"),
        ("gateway", "--host", "203.0.113.7", "--port", "0", "--operator-port", "0"),
    ],
)
def test_mistake_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert_one_line(tidegate(*arguments, cwd=tmp_path))


def test_settings_come_from_the_environment_too(tmp_path: Path) -> None:
    result = tidegate("up", cwd=tmp_path, environ={"TIDEGATE__UP__WORKERS": "none"})
    assert_one_line(result, "TIDEGATE__UP__WORKERS")


def test_help_is_fast_and_lists_every_command(tmp_path: Path) -> None:
    result = tidegate("--help", cwd=tmp_path)
    assert result.returncode == 0
    for command in ("up", "demo", "gateway", "engine", "model", "capture", "replay", "workload", "version"):
        assert command in result.stdout


def test_gateway_waits_for_a_worker_that_is_not_there_yet(tmp_path: Path) -> None:
    port, operator_port, worker_port = free_ports(3)
    command = [sys.executable, "-m", "deploy", "gateway", "--port", str(port), "--operator-port", str(operator_port)]
    with subprocess.Popen(
        [*command, "--worker", f"127.0.0.1:{worker_port}"], stderr=subprocess.DEVNULL, cwd=tmp_path
    ) as process:
        try:
            status = wait_for_status(f"http://127.0.0.1:{operator_port}/ready")
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(model=MODEL, messages=HELLO)
        finally:
            process.terminate()
    assert status == 503
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert caught.value.response.headers["x-tidegate-reject-reason"] == "no_worker"


def wait_for_status(url: str) -> int:
    import urllib.error
    import urllib.request

    seen: list[int] = []

    def ask() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                seen.append(answer.status)
        except urllib.error.HTTPError as error:
            seen.append(error.code)
            error.close()
        except OSError:
            return False
        return True

    wait_until(ask, f"{url} answers")
    return seen[-1]
