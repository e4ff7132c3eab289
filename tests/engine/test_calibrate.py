"""A simulated engine that is fitted to a log: which coefficients, how far off, and what is said about bad logs."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine import calibrate, calibrate_fit, step_log
from engine.calibrate_check import simulate
from engine.calibrate_workload import arrivals, levels, wide_lengths
from engine.sim.parameters import SimParameters, Work
from engine.sim.simulator import Limits, Simulator
from engine.step_log import EngineFacts, LoggedRequest, LoggedStep, StepLog, StepLogWriter
from protos.core.errors import ConfigError

REAL = SimParameters(
    step_us=20_000, prefill_token_us=300, prefill_pair_ns=150, decode_us=700, kv_token_ns=900, kv_blocks=400
)
LIMITS = Limits(max_sequences=16, max_batch_tokens=512)
FACTS = EngineFacts(
    backend="vllm",
    model="m",
    context_tokens=2048,
    max_sequences=LIMITS.max_sequences,
    max_batch_tokens=LIMITS.max_batch_tokens,
    kv_blocks=REAL.kv_blocks,
    kv_block_tokens=REAL.kv_block_tokens,
)


def a_log(seed: int = 1, seconds: float = 60, parameters: SimParameters = REAL) -> StepLog:
    """What an engine that takes exactly as long as `parameters` say would log."""
    draw = random.Random(seed)
    sim: Simulator[int] = Simulator(parameters, LIMITS)
    log = StepLog(FACTS, [], [])
    waiting = list(arrivals(draw, FACTS.context_tokens, 600, seconds))[::-1]
    now_ns = 0
    while waiting or sim.running_count or sim.waiting_count:
        while waiting and waiting[-1].at_s * 1e9 <= now_ns:
            arrival = waiting.pop()
            sim.submit(
                0,
                prompt_tokens=arrival.lengths.prompt_tokens,
                output_tokens=arrival.lengths.output_tokens,
                now_ns=int(arrival.at_s * 1e9),
            )
        step = sim.step(now_ns)
        if step is None:
            now_ns = int(waiting[-1].at_s * 1e9) + 1
            continue
        log.steps.append(LoggedStep(start_ns=now_ns, duration_ns=step.ended_ns - now_ns, work=step.work))
        log.requests += [
            LoggedRequest(
                arrived_ns=sequence.queued_ns,
                scheduled_ns=sequence.scheduled_ns,
                first_token_ns=sequence.first_token_ns,
                ended_ns=sequence.last_token_ns,
                prompt_tokens=sequence.prompt_tokens,
                output_tokens=sequence.generated,
                cached_tokens=0,
                preemptions=sequence.preemptions,
                priority=0,
                is_cancelled=False,
                blocks=[],
            )
            for sequence in step.finished
        ]
        now_ns = step.ended_ns
    return log


def disturbed(steps: list[LoggedStep]) -> list[LoggedStep]:
    """With 10% noise, and every 50th step held up by something else for a second."""
    draw = random.Random(2)
    return [
        msgspec.structs.replace(
            step,
            duration_ns=int(step.duration_ns * draw.uniform(0.9, 1.1)) + (10**9 if number % 50 == 0 else 0),
        )
        for number, step in enumerate(steps)
    ]


def coefficients(parameters: SimParameters) -> list[float]:
    return [getattr(parameters, name) for name in calibrate_fit.COEFFICIENTS]


def test_coefficients_of_an_exact_log_are_found() -> None:
    fitted = calibrate_fit.fit(a_log().steps, SimParameters())
    assert coefficients(fitted) == pytest.approx(coefficients(REAL), rel=1e-3)


def test_noise_and_outliers_hardly_move_the_fit() -> None:
    steps = a_log().steps
    fitted = calibrate_fit.fit(disturbed(steps), SimParameters())
    assert calibrate_fit.step_error(steps, fitted) < 0.02


def test_coefficients_are_never_negative() -> None:
    steps = [
        LoggedStep(start_ns=0, duration_ns=1_000_000 - 5_000 * decodes, work=Work(0, 0, decodes, 40 * decodes))
        for decodes in range(1, 60)
    ]
    fitted = calibrate_fit.fit(steps, SimParameters())
    assert min(coefficients(fitted)) == 0
    assert fitted.step_us == pytest.approx(850, rel=0.02), "the mean, where no slope is allowed"


def test_what_the_steps_say_nothing_about_is_zero() -> None:
    steps = [step for step in a_log().steps if not step.work.prefill_tokens]
    fitted = calibrate_fit.fit(steps, SimParameters())
    assert (fitted.prefill_token_us, fitted.prefill_pair_ns) == (0, 0)
    assert fitted.decode_us == pytest.approx(REAL.decode_us, rel=1e-3)


def test_simulated_latencies_of_an_exact_log_are_the_logged_ones() -> None:
    result = calibrate.calibrate(calibrate.split(a_log(), 0.3))
    assert result.step_error < 1e-3
    assert result.ttft.mape < 0.01
    assert result.end_to_end.mape < 0.01
    assert len(result.ttft.measured_ms) > 20


def test_error_of_a_held_out_log_of_a_slower_engine_is_seen() -> None:
    slower = msgspec.structs.replace(REAL, step_us=2 * REAL.step_us)
    result = calibrate.calibrate(calibrate.join(a_log(), a_log(seed=2, parameters=slower)))
    assert result.step_error > 0.3
    assert result.end_to_end.mean_error() < -0.3
    assert result.end_to_end.mape > 0.3


def test_held_out_steps_and_requests_are_not_fitted_to() -> None:
    log = a_log()
    sample = calibrate.split(log, 0.25)
    assert len(sample.steps) + len(sample.held_out_steps) == len(log.steps)
    assert max(step.start_ns for step in sample.steps) < sample.held_out_ns
    assert min(step.start_ns for step in sample.held_out_steps) >= sample.held_out_ns
    checked = len(calibrate.calibrate(sample).ttft.measured_ms)
    assert checked == sum(request.arrived_ns >= sample.held_out_ns for request in log.requests)


def test_requests_that_share_blocks_are_simulated_as_cached() -> None:
    (request, *_) = a_log().requests
    first = msgspec.structs.replace(request, prompt_tokens=160, blocks=list(range(10)), arrived_ns=0)
    second = msgspec.structs.replace(first, arrived_ns=10**12)
    assert [sequence.cached_tokens for sequence in simulate([second, first], REAL, LIMITS)] == [0, 144]


def test_profile_is_a_working_engine(tmp_path: Path) -> None:
    from engine.cli import load_settings

    flat = msgspec.structs.replace(REAL, kv_token_ns=0)
    result = calibrate.calibrate(calibrate.split(a_log(parameters=flat), 0.3))
    assert result.parameters.kv_token_ns == 0
    file = tmp_path / "profile.toml"
    file.write_text(calibrate.profile(result))
    settings = load_settings(file, {}, {})
    assert settings.backend == "sim"
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (16, 512)
    assert coefficients(settings.sim) == pytest.approx(coefficients(result.parameters), rel=1e-4)


def test_workload_reaches_from_one_user_to_all_that_the_engine_runs() -> None:
    assert levels(1) == [1]
    assert levels(16) == [1, 2, 4, 8, 16]
    assert levels(20) == [1, 2, 4, 8, 16, 20]


def test_workload_stays_within_the_context() -> None:
    draw = random.Random(1)
    asked = [wide_lengths(draw, 512) for _ in range(500)]
    asked += [arrival.lengths for arrival in arrivals(draw, 512, 10_000, 20)]
    assert len(asked) > 1000
    assert max(lengths.prompt_tokens for lengths in asked) <= 256
    assert max(lengths.output_tokens for lengths in asked) <= 128
    assert min(min(lengths.prompt_tokens, lengths.output_tokens) for lengths in asked) >= 1


# ---------------------------------------------------------------- logs


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_full_disk_ends_the_log_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    writer = StepLogWriter(Path("/dev/full"))
    for _ in range(3):
        writer.write(FACTS)
    assert [record.getMessage() for record in caplog.records] == [
        "the step log /dev/full ends here: No space left on device"
    ]


def write(path: Path, log: StepLog) -> None:
    writer = StepLogWriter(path)
    writer.write(log.engine, *log.steps, *log.requests)
    writer.close()


def test_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    log = a_log(seconds=5)
    write(tmp_path / "log", log)
    assert step_log.read(tmp_path / "log") == log


def test_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    log = a_log(seconds=5)
    write(tmp_path / "log", log)
    data = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(data[:-9])
    assert step_log.read(tmp_path / "log") == StepLog(log.engine, log.steps, log.requests[:-1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the step log is empty"),
        (b"\x00\xff\n", "line 1 is not of a step log"),
        (b'{"is":"step","start_ns":1,"duration_ns":1,"work":{}}\n', "line 1 is not of a step log"),
        (msgspec.json.encode(a_log(seconds=1).steps[0]) + b"\n", "does not begin with the engine"),
    ],
)
def test_garbled_log_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        step_log.read(tmp_path / "log")
    assert "\n" not in str(error.value)


def test_too_short_and_foreign_logs_are_refused() -> None:
    log = a_log(seconds=5)
    with pytest.raises(ConfigError, match="no steps"):
        calibrate.split(StepLog(FACTS, [], []), 0.3)
    with pytest.raises(ConfigError, match="3 steps to fit to are too few"):
        calibrate.calibrate(calibrate.join(StepLog(FACTS, log.steps[:3], []), log))
    with pytest.raises(ConfigError, match="no request"):
        calibrate.calibrate(calibrate.join(log, StepLog(FACTS, log.steps, [])))
    with pytest.raises(ConfigError, match="different engines"):
        calibrate.join(log, StepLog(msgspec.structs.replace(FACTS, model="other"), log.steps, log.requests))


def test_command_drives_an_engine_and_writes_its_profile(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text(
        "[engine]\nmax_num_seqs = 4\nmax_model_len = 1024\n[engine.sim]\nstep_us = 3000\nprefill_token_us = 40\n"
        "decode_us = 500\nkv_token_ns = 0\n"
    )
    ran = command(tmp_path, "--run", "--backend", "sim", "--config", "tidegate.toml", "--seconds", "3", "-o", "p.toml")
    assert ran.returncode == 0, ran.stderr
    assert "step time          off by 0.0%" in ran.stdout
    assert "decode_us              500.000" in ran.stdout
    assert "decode_us = 500\n" in (tmp_path / "p.toml").read_text()


def test_command_refuses_an_empty_log_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"")
    ran = command(tmp_path, "log")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("tidegate: log: the step log is empty")
    assert ran.stderr.count("\n") == 1


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy", "engine", "calibrate", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
