"""How a run is doing, in one line: redrawn on a terminal, printed every few seconds elsewhere."""

from __future__ import annotations

import asyncio

from rich.console import Console

from replay.result import Fate, Result

TERMINAL_SECONDS = 0.25
PLAIN_SECONDS = 5.0


class Progress:
    """Counts since the start. Owned by the driver, which alone writes to it."""

    def __init__(self, planned: int) -> None:
        self.planned = planned
        self.sent = 0
        self.ended = 0
        self.errors = 0
        self.output_tokens = 0
        self.max_lag_ns = 0
        self._ttft_ns = 0
        self._ttft_count = 0

    def add_sent(self, lag_ns: int) -> None:
        self.sent += 1
        self.max_lag_ns = max(self.max_lag_ns, lag_ns)

    def add_result(self, result: Result) -> None:
        self.ended += 1
        self.errors += result.fate in (Fate.FAILED, Fate.REJECTED)
        self.output_tokens += result.output_tokens or 0
        if result.ttft_ns is not None:
            self._ttft_ns += result.ttft_ns
            self._ttft_count += 1

    def line(self, elapsed_s: float) -> str:
        ttft = f"{self._ttft_ns / self._ttft_count / 1e6:.0f} ms" if self._ttft_count else "-"
        rate = self.output_tokens / elapsed_s if elapsed_s else 0.0
        return (
            f"{elapsed_s:6.1f} s  sent {self.sent}/{self.planned}  running {self.sent - self.ended}  "
            f"errors {self.errors}  mean TTFT {ttft}  {rate:,.0f} tokens/s  max lag {self.max_lag_ns / 1e6:.1f} ms"
        )


async def show(progress: Progress, console: Console) -> None:
    """Until cancelled."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    if not console.is_terminal:
        while True:
            await asyncio.sleep(PLAIN_SECONDS)
            console.print(progress.line(loop.time() - start), highlight=False, soft_wrap=True)
    with console.status(progress.line(0.0), spinner="dots", refresh_per_second=1 / TERMINAL_SECONDS) as status:
        while True:
            await asyncio.sleep(TERMINAL_SECONDS)
            status.update(progress.line(loop.time() - start))
