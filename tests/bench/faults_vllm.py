"""`python -m tests.bench.faults_vllm`: a greedy answer of real vLLM is the same when its worker is lost in the middle.

Two workers with SmolLM2-135M-Instruct behind a gateway whose tenant resumes, in float32: bfloat16 rounds by what else
is computed, with a fault or without. The prompts are asked once undisturbed, then again while the busier worker is
killed (SIGKILL), or its engine suspended (SIGSTOP). Exit status 1 where a text or a usage differs, or nothing was
resumed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import psutil

from protos.core.capture import read_capture
from protos.core.record import RequestRecord
from tests.gateway.faults import RESUME, dechunk
from tests.gateway.processes import GatewayProcess, Process, http_request, wait_for

WORKERS = 2
LOADING_SECONDS = 300.0
FAULT_AFTER_SECONDS = 3.0
ENGINE = "[engine]\ndtype = 'float32'\nmax_model_len = 1024\nmax_num_seqs = 8\nkv_cache_gib = 0.3\n"
MODEL = "SmolLM2-135M-Instruct"
PROMPTS = (
    "Tell me about the sea.",
    "日本語で物語を書いてください。",
    "Count from one to fifty in words.",
    "Explain photosynthesis briefly.",
)


class Answer(msgspec.Struct, frozen=True):
    text: str
    usage: dict[str, int]
    ends: int
    """How often it ended well."""


class Worker(Process):
    """A real vLLM."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True)
        config = folder / "engine.toml"
        config.write_text(ENGINE)
        flags = ("--config", str(config), "--backend", "vllm", "--port", "0", "--name", name)
        super().__init__(folder, "engine", *flags, ready=rf"{name}: .* 127\.0\.0\.1:(\d+)")
        self.address = ""

    def wait_loaded(self) -> str:
        self.address = f"127.0.0.1:{self.wait_ready(LOADING_SECONDS)[1]}"
        return self.address

    def suspend_engine(self) -> None:
        for process in self._engine():
            process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """The engine first: a suspended one hears nothing else."""
        if self.process.poll() is None:
            for process in self._engine():
                process.kill()
        self.kill()

    def _engine(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.name().startswith("VLLM::")]


async def ask(port: int, prompt: str, tokens: int, request_id: str) -> Answer:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(http_request("/v1/chat/completions", body, f"X-Request-Id: {request_id}", "Connection: close"))
    data = dechunk((await reader.read()).partition(b"\r\n\r\n")[2])
    writer.close()
    events = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]
    chunks: list[Any] = [json.loads(event) for event in events if event != b"[DONE]"]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk.get("choices", ()))
    usage = next((chunk["usage"] for chunk in chunks if chunk.get("usage")), {})
    counts = {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")}
    return Answer(text, counts, events.count(b"[DONE]"))


async def ask_all(port: int, tokens: int, name: str) -> list[Answer]:
    return await asyncio.gather(*(ask(port, prompt, tokens, f"{name}-{i}") for i, prompt in enumerate(PROMPTS)))


async def disturb(gateway: GatewayProcess, workers: list[Worker], fault: str) -> None:
    await asyncio.sleep(FAULT_AFTER_SECONDS)
    busiest = max(gateway.state()["workers"], key=lambda worker: int(worker["leases"]))
    victim = next(worker for worker in workers if worker.address == busiest["address"])
    print(f"{fault}: {victim.address} with {busiest['leases']} requests", flush=True)
    if fault == "kill":
        victim.process.kill()
    else:
        victim.suspend_engine()


async def compare(gateway: GatewayProcess, workers: list[Worker], tokens: int, fault: str) -> tuple[bool, ...]:
    undisturbed = await ask_all(gateway.port, tokens, "undisturbed")
    disturbed, _ = await asyncio.gather(ask_all(gateway.port, tokens, fault), disturb(gateway, workers, fault))
    return tuple(before == after and after.ends == 1 for before, after in zip(undisturbed, disturbed, strict=True))


def show(record: RequestRecord, is_same: bool) -> None:
    tried = ", ".join(f"{attempt.output_tokens} tokens from {attempt.worker}" for attempt in record.attempts)
    same = "the same" if is_same else "ANOTHER answer"
    print(f"{record.request_id:<12}{same:<16}{tried}; longest pause {record.max_gap_ns / 1e9:.1f} s")


def run(folder: Path, tokens: int, fault: str) -> list[tuple[RequestRecord, bool]]:
    """The disturbed requests, and whether each had the answer of an undisturbed one."""
    with contextlib.ExitStack() as stack:
        workers = []
        for number in range(WORKERS):  # one after the other: loading takes all cores
            workers.append(Worker(folder / f"worker-{number}", f"worker-{number}"))
            stack.callback(workers[-1].end)
            print(f"{workers[-1].wait_loaded()} is ready", flush=True)
        addresses = [worker.address for worker in workers]
        gateway = GatewayProcess(folder / "gateway", *addresses, config=RESUME, capture_level="off")
        stack.callback(gateway.kill)
        gateway.start(WORKERS)
        same = asyncio.run(compare(gateway, workers, tokens, fault))
        wait_for(lambda: gateway.state()["capture"]["written"] == 2 * len(PROMPTS), "the records are on disk")
        records = {entry.record.request_id: entry.record for entry in read_capture(gateway.capture)}
    return [(records[f"{fault}-{number}"], same[number]) for number in range(len(PROMPTS))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.faults_vllm", description=__doc__)
    parser.add_argument("--fault", choices=("kill", "suspend"), default="kill")
    parser.add_argument("--tokens", type=int, default=120)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), asked.tokens, asked.fault)
    for record, is_same in results:
        show(record, is_same)
    holds = all(is_same for _, is_same in results) and any(len(record.attempts) > 1 for record, _ in results)
    print("resumed, and every answer the same" if holds else "NOT as promised")
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
