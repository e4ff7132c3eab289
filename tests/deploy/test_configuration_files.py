"""The files for containers, clusters and dashboards agree with the code and with each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deploy.cli import app
from engine.settings import EngineSettings
from gateway.members import read_workers
from gateway.metrics import Metrics, StateCollector
from gateway.settings import GatewaySettings, Limits
from protos.core.clock import SYSTEM_CLOCK
from protos.core.journal import JournalStats

DEPLOY = Path(__file__).parents[2] / "deploy"
OBSERVABILITY = DEPLOY / "observability"
YAML_FILES = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")])


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def kubernetes() -> dict[tuple[str, str], Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "tidegate.yaml").read_text())
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def compose() -> Any:
    return load(DEPLOY / "compose.yaml")["services"]


def containers() -> Iterator[dict[str, Any]]:
    for (kind, _), document in kubernetes().items():
        if kind in ("Deployment", "StatefulSet"):
            pod = document["spec"]["template"]["spec"]
            yield from (*pod.get("initContainers", ()), *pod["containers"])


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert list(yaml.safe_load_all(path.read_text()))


def images() -> list[str]:
    return [service["image"] for service in compose().values()] + [container["image"] for container in containers()]


def test_images_are_pinned() -> None:
    for image in images():
        tag = image.rpartition(":")[2]
        assert "/" not in tag, f"{image} has no tag"
        assert tag != "latest"


def command_lines() -> list[list[str]]:
    ours = [service["command"] for service in compose().values() if service["image"].startswith("tidegate:")]
    return ours + [container["args"] for container in containers()]


def test_container_command_lines_use_flags_that_exist() -> None:
    import typer.main

    root = typer.main.get_command(app)
    for line in command_lines():
        command = root.commands[line[0]]  # type: ignore[attr-defined]
        if line[0] == "model":
            command = command.commands[line[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        flags = {argument.partition("=")[0] for argument in line if argument.startswith("--")}
        assert flags <= known, f"{line}: {flags - known}"


def test_ports_are_one_set() -> None:
    settings = GatewaySettings()
    gateway = compose()["gateway"]["command"]
    assert f"--port={settings.port}" in gateway
    assert f"--operator-port={settings.operator_port}" in gateway
    assert "--port=9101" in compose()["worker"]["command"]
    targets = [
        job["static_configs"][0]["targets"][0] for job in load(OBSERVABILITY / "prometheus.yaml")["scrape_configs"]
    ]
    assert targets == [f"gateway:{settings.operator_port}", "collector:8889"]
    collector = load(OBSERVABILITY / "collector.yaml")
    assert collector["exporters"]["prometheus"]["endpoint"].endswith(":8889")
    assert collector["exporters"]["otlp_grpc"]["endpoint"] == "jaeger:4317"
    assert load(OBSERVABILITY / "jaeger.yaml")["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    service = kubernetes()["Service", "tidegate-gateway"]
    assert service["spec"]["ports"][0]["port"] == settings.port


def test_exemplars_lead_to_the_traces() -> None:
    assert "--enable-feature=exemplar-storage" in compose()["prometheus"]["command"]
    sources = load(OBSERVABILITY / "grafana" / "datasources" / "prometheus.yaml")["datasources"]
    (destination,) = sources[0]["jsonData"]["exemplarTraceIdDestinations"]
    assert destination == {"name": "trace_id", "datasourceUid": "jaeger"}
    assert "jaeger" in {source["uid"] for source in sources}
    panels = json.loads((OBSERVABILITY / "grafana" / "dashboards" / "tidegate.json").read_text())["panels"]
    with_exemplars = {panel["title"] for panel in panels for target in panel["targets"] if target.get("exemplar")}
    assert with_exemplars == {"TTFT", "TPOT"}


def test_pipelines_name_components_that_are_configured() -> None:
    for name in ("collector.yaml", "jaeger.yaml"):
        config = load(OBSERVABILITY / name)
        connectors = set(config.get("connectors", {}))
        for pipeline in config["service"]["pipelines"].values():
            assert set(pipeline["receivers"]) <= set(config["receivers"]) | connectors
            assert set(pipeline.get("processors", ())) <= set(config["processors"])
            assert set(pipeline["exporters"]) <= set(config["exporters"]) | connectors
        assert set(config["service"].get("extensions", ())) <= set(config.get("extensions", {}))


def test_worker_that_is_stopped_finishes_whatever_a_gateway_lets_run() -> None:
    """Else a rolling restart of workers breaks long answers off."""
    assert EngineSettings().drain_s >= Limits().total_s


def test_containers_outlive_a_drain() -> None:
    for name, drain_s in (("gateway", Limits().drain_s), ("worker", EngineSettings().drain_s)):
        assert int(compose()[name]["stop_grace_period"].removesuffix("s")) > drain_s


def test_pods_outlive_a_drain() -> None:
    for kind, name, drain_s in (
        ("Deployment", "tidegate-gateway", Limits().drain_s),
        ("StatefulSet", "tidegate-worker", EngineSettings().drain_s),
    ):
        pod = kubernetes()[kind, name]["spec"]["template"]["spec"]
        waits_s = [
            container["lifecycle"]["preStop"]["sleep"]["seconds"]
            for container in pod["containers"]
            if "lifecycle" in container
        ]
        assert pod["terminationGracePeriodSeconds"] > drain_s + sum(waits_s)
        assert pod["enableServiceLinks"] is False
        for container in pod["containers"]:
            assert "readinessProbe" in container
            assert "livenessProbe" in container


def test_clusters_gateway_knows_every_worker() -> None:
    objects = kubernetes()
    service = objects["Service", objects["StatefulSet", "tidegate-worker"]["spec"]["serviceName"]]
    assert service["spec"]["clusterIP"] == "None"
    args = objects["Deployment", "tidegate-gateway"]["spec"]["template"]["spec"]["containers"][0]["args"]
    (workers,) = (argument.removeprefix("--worker=") for argument in args if argument.startswith("--worker="))
    port = service["spec"]["ports"][0]["port"]
    assert read_workers([workers]).names == (f"{service['metadata']['name']}:{port}",)


def expressions() -> Iterator[str]:
    for group in load(OBSERVABILITY / "alerts.yaml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    dashboard = json.loads((OBSERVABILITY / "grafana" / "dashboards" / "tidegate.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])


SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def metric_names() -> set[str]:
    """Every series name that a gateway with a capture serves."""
    nothing = SimpleNamespace(queued=0, queued_bytes=0, ledger=(), sessions={}, depths=list)
    capture = JournalStats(written=0, dropped=0, queued=0, last_error=None)
    metrics = Metrics()
    pipes = (lambda: capture, lambda: (0, 0))
    state = StateCollector(nothing, nothing, *pipes, SYSTEM_CLOCK, metrics.tenant_names)  # type: ignore[arg-type]
    families = [*metrics.registry.collect(), *state.collect()]
    return {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, ())}


def test_alerts_and_dashboard_use_metrics_that_exist() -> None:
    known = metric_names()
    for expression in expressions():
        used = set(re.findall(r"tidegate_\w+", expression))
        assert used, expression
        assert used <= known, f"{expression}: {used - known}"
