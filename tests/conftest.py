"""TIDEGATE_REQUIRE_VLLM=1: a run in which a real-vLLM test was skipped, or none was run, is a failed run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

# How fast examples are made and run says how busy the machine is.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("long", hypothesis.settings.get_profile("any-machine"), max_examples=3000)
hypothesis.settings.load_profile("any-machine")

REQUIRE_VLLM = os.environ.get("TIDEGATE_REQUIRE_VLLM") == "1"
_SKIPPED = pytest.StashKey[list[str]]()
_RAN = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SKIPPED], config.stash[_RAN] = [], []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[misc]
    if item.get_closest_marker("vllm") is not None:
        if report.skipped:
            item.config.stash[_SKIPPED].append(item.nodeid)
        elif report.when == "call":
            item.config.stash[_RAN].append(item.nodeid)
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if REQUIRE_VLLM and vllm_verdict(session.config) is not None:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    verdict = vllm_verdict(config)
    if verdict is not None:
        terminalreporter.write_line(verdict, red=REQUIRE_VLLM, yellow=not REQUIRE_VLLM, bold=True)


def vllm_verdict(config: pytest.Config) -> str | None:
    """None when real vLLM was tested, else what is missing."""
    skipped, ran = config.stash[_SKIPPED], config.stash[_RAN]
    if skipped:
        return f"{len(skipped)} tests with a real vLLM were skipped"
    return None if ran else "no test with a real vLLM was run"
