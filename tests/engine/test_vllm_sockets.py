"""The folder of vLLM's sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from engine.backends.vllm_sockets import FOLDER, VllmSockets


def test_folder_goes_with_what_is_left_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    sockets = VllmSockets()
    sockets.open()
    folder = Path(os.environ[FOLDER])
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "4cc95860-b984-474b-926f-4a02f556dd99"))
    sockets.close()
    sockets.close()
    assert not folder.exists()
    assert FOLDER not in os.environ


def test_folder_of_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    sockets = VllmSockets()
    sockets.open()
    sockets.close()
    assert os.environ[FOLDER] == str(tmp_path)
    assert tmp_path.exists()
