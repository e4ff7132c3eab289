from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import up
from deploy.plan import choose_backend, plan
from deploy.settings import UpSettings
from engine.settings import DEFAULT_MODEL
from protos.core.errors import ConfigError


def flag(arguments: tuple[str, ...], name: str) -> list[str]:
    return [arguments[index + 1] for index, argument in enumerate(arguments) if argument == name]


def test_gateway_is_told_of_every_worker() -> None:
    gateway, *workers = plan(UpSettings(workers=3, worker_port=9500), "sim", None)
    assert [worker.address for worker in workers] == ["127.0.0.1:9500", "127.0.0.1:9501", "127.0.0.1:9502"]
    assert flag(gateway.arguments, "--worker") == [worker.address for worker in workers]
    assert all(flag(worker.arguments, "--backend") == ["sim"] for worker in workers)


def test_every_part_reads_the_same_settings_file() -> None:
    for part in plan(UpSettings(), "sim", Path("tide.toml")):
        assert flag(part.arguments, "--config") == ["tide.toml"]


def test_workers_leave_the_processor_to_the_gateway() -> None:
    gateway, *workers = plan(UpSettings(workers=2), "sim", None)
    assert all(worker.niceness > gateway.niceness == 0 for worker in workers)


def test_capture_and_traces_are_the_gateways() -> None:
    gateway, worker = plan(UpSettings(capture_level="full", otlp_endpoint="http://127.0.0.1:4317"), "sim", None)
    assert flag(gateway.arguments, "--capture-level") == ["full"]
    assert flag(gateway.arguments, "--otlp-endpoint") == ["http://127.0.0.1:4317"]
    assert "--otlp-endpoint" not in worker.arguments


@pytest.mark.parametrize(
    ("wanted", "configured", "has_vllm", "chosen"),
    [
        ("auto", "vllm", True, "vllm"),
        ("auto", "vllm", False, "sim"),
        ("auto", "sim", True, "sim"),
        ("sim", "vllm", True, "sim"),
        ("vllm", "sim", True, "vllm"),
    ],
)
def test_auto_prefers_real_tokens(wanted: str, configured: str, has_vllm: bool, chosen: str) -> None:
    assert choose_backend(wanted, configured, has_vllm) == chosen


def test_asking_for_a_missing_vllm_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="make clean install"):
        choose_backend("vllm", "vllm", has_vllm=False)


def test_port_in_use_is_named_with_the_flag_that_changes_it(unused_tcp_port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = UpSettings(port=taken.getsockname()[1], operator_port=unused_tcp_port)
        with pytest.raises(ConfigError, match=rf"port {settings.port} .* gateway, is in use.*--port"):
            up.check_ports(plan(settings, "sim", None), settings)


def test_two_parts_on_one_port_are_refused(unused_tcp_port_factory: Callable[[], int]) -> None:
    port, operator_port = unused_tcp_port_factory(), unused_tcp_port_factory()
    settings = UpSettings(port=port, worker_port=port, operator_port=operator_port)
    with pytest.raises(ConfigError, match=f"worker-1 and gateway both want port {port}"):
        up.check_ports(plan(settings, "sim", None), settings)


def test_address_of_another_machine_is_not_called_in_use(unused_tcp_port: int) -> None:
    settings = UpSettings(host="192.0.2.1", port=1, operator_port=unused_tcp_port)
    with pytest.raises(ConfigError, match=r"gateway cannot listen on port 1 of 192\.0\.2\.1 .*--host") as refused:
        up.check_ports(plan(settings, "sim", None), settings)
    assert "in use" not in str(refused.value)


def test_workers_beyond_the_last_port_are_refused(unused_tcp_port_factory: Callable[[], int]) -> None:
    port, operator_port = unused_tcp_port_factory(), unused_tcp_port_factory()
    settings = UpSettings(workers=2, worker_port=65535, port=port, operator_port=operator_port)
    with pytest.raises(ConfigError, match=r"port 65536, wanted for worker-2, .*--worker-port"):
        up.check_ports(plan(settings, "sim", None), settings)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8000/"), ("::1", "http://[::1]:8000/"), ("::", "http://[::1]:8000/")],
)
def test_what_to_try_next_can_be_tried(host: str, url: str) -> None:
    assert f" {url}v1/chat/completions" in up.next_steps(UpSettings(host=host), "m")


@pytest.mark.parametrize(("status", "raised"), [(130, KeyboardInterrupt), (2, ConfigError)])
def test_interrupt_while_the_model_is_fetched_is_no_failure(
    status: int, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path))
    monkeypatch.setattr(up, "TIDEGATE", (sys.executable, "-c", f"raise SystemExit({status})"))
    with pytest.raises(raised):
        up.ensure_model(DEFAULT_MODEL)


def test_log_folder_that_cannot_be_is_refused_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match="--log-dir"):
        up.make_log_folder(tmp_path / "taken")


def test_unknown_key_names_its_neighbour(tmp_path: Path) -> None:
    config = tmp_path / "tide.toml"
    config.write_text("[up]\nworker = 2\n")
    with pytest.raises(ConfigError, match="did you mean 'workers'"):
        up.load_settings(config, {})


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "tide.toml"
    config.write_text("[up]\nworkers = 2\nport = 8100\n")
    settings = up.load_settings(config, {"port": 8200, "workers": None})
    assert (settings.workers, settings.port) == (2, 8200)
