"""Chat users for Locust: each streams an answer, reads it, and asks again.

    locust -f tests/bench/locustfile.py --headless --users 16 --spawn-rate 4 --run-time 30s --host http://127.0.0.1:8000

`TIDEGATE_BENCH_MODEL` names the model; without it the first of /v1/models. An answer is a success when the stream ended
with [DONE] and held neither an error event nor an empty answer. Its time is that of the whole answer; the time to its
first token is a row of its own.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from locust import HttpUser, between, task

QUESTIONS = (
    "What is the capital of France?",
    "Name three rivers that flow into the North Sea.",
    "Why does the sea have tides? Answer in two sentences.",
    "Write a haiku about a gate.",
    "What does a lock keeper do all day?",
)
MAX_TOKENS = 32


class ChatUser(HttpUser):
    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        self.model = os.environ.get("TIDEGATE_BENCH_MODEL") or self.client.get("/v1/models").json()["data"][0]["id"]

    @task
    def chat(self) -> None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "max_tokens": MAX_TOKENS,
            "stream": True,
        }
        started_s = time.perf_counter()
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}: {response.text[:200]}")
                return
            failure = self._read(response.iter_lines(), started_s)
            response.request_meta["response_time"] = (time.perf_counter() - started_s) * 1e3
            if failure:
                response.failure(failure)
            else:
                response.success()

    def _read(self, lines: Iterator[bytes], started_s: float) -> str:
        """Reads a stream to its end; what was wrong with it, or nothing."""
        has_content = is_done = False
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                is_done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return f"error event: {event['error']}"
            if not has_content and any(choice["delta"].get("content") for choice in event["choices"]):
                has_content = True
                self._record_first_token((time.perf_counter() - started_s) * 1e3)
        return "" if is_done and has_content else f"[DONE] seen: {is_done}, content seen: {has_content}"

    def _record_first_token(self, elapsed_ms: float) -> None:
        fields: dict[str, Any] = {"response_length": 0, "exception": None, "context": {}}
        name = "/v1/chat/completions, first token"
        self.environment.events.request.fire(request_type="SSE", name=name, response_time=elapsed_ms, **fields)
