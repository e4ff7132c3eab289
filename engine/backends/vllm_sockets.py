"""Where vLLM's processes meet: a folder of our own, since vLLM leaves its sockets behind."""

from __future__ import annotations

import os
import tempfile

FOLDER = "VLLM_RPC_BASE_PATH"


class VllmSockets:
    """The folder, from `open` to `close`. Whoever sets one in the environment keeps it."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def open(self) -> None:
        """Before vLLM makes an engine."""
        if FOLDER not in os.environ:
            self._folder = tempfile.TemporaryDirectory(prefix="tidegate-")
            os.environ[FOLDER] = self._folder.name

    def close(self) -> None:
        """The engine's processes are gone."""
        if self._folder is not None:
            del os.environ[FOLDER]
            self._folder.cleanup()
            self._folder = None
