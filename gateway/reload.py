"""The configuration read again while the gateway serves: on SIGHUP, and when the file changes.

All or nothing: tenants, bands and workers are replaced together, and a file that does not parse changes nothing and
says why.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path

from gateway.fleet import Fleet
from gateway.members import read_workers
from gateway.pipeline import Pipeline
from gateway.settings import GatewaySettings
from gateway.tenants import TenantTable
from protos.core.errors import ConfigError

log = logging.getLogger("tidegate.gateway")

WATCH_SECONDS = 1.0


class Reload:
    """Runs until cancelled. `file` is None where all settings came from flags and environment."""

    def __init__(self, read: Callable[[], GatewaySettings], file: Path | None) -> None:
        self._read = read
        self._file = file
        self._seen = self._stamp()

    async def run(self, pipeline: Pipeline, fleet: Fleet) -> None:
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        while True:
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    await asked.wait()
            except TimeoutError:
                if self._stamp() == self._seen:
                    continue
            asked.clear()
            self._seen = self._stamp()
            self._apply(pipeline, fleet)

    def _apply(self, pipeline: Pipeline, fleet: Fleet) -> None:
        try:
            settings = self._read()
            tenants = TenantTable(settings.bands, settings.tenants)
            workers = read_workers(settings.workers)
            if pipeline.tenants.has_keys and not tenants.has_keys:
                raise ConfigError("gateway.tenants: the last API key is gone; stop the gateway to serve without keys")
            if len(tenants.bands) < len(pipeline.tenants.bands):
                raise ConfigError("gateway.bands: a band cannot be taken away while the gateway runs")
        except ConfigError as error:
            log.error("configuration not changed: %s", error)
            return
        pipeline.tenants = tenants
        fleet.configure(workers)
        log.info(
            "configuration read again: %d tenants, %d workers; other keys take effect at the next start",
            len(tenants.tenants),
            len(fleet.members.wanted),
        )

    def _stamp(self) -> tuple[int, int] | None:
        """(modified, inode) of the file: an editor that replaces it is seen, too."""
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
