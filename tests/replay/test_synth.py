from __future__ import annotations

import itertools
import statistics

import pytest

from protos.core.errors import ConfigError
from replay.presets import presets
from replay.scale import Shape, compress, measure
from replay.synth import SynthSettings, synthesize, weibull_shape
from replay.workload import SyntheticBody, Workload, WorkloadFacts, WorkloadRequest


def shape(**settings: object) -> Shape:
    values: dict[str, object] = {"rate": 50.0, "duration_s": 200.0}
    return measure(synthesize(SynthSettings(**values | settings)).requests)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arrivals", "gap_cv"),
    [
        ("poisson", 1.0),
        ("constant", 0.0),
        ("gamma:2", 2.0),
        ("gamma:0.5", 0.5),
        ("weibull:2", 2.0),
        ("weibull:0.5", 0.5),
    ],
)
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(arrivals: str, gap_cv: float) -> None:
    found = shape(arrivals=arrivals)
    assert found.rate == pytest.approx(50, rel=0.1)
    assert found.gap_cv == pytest.approx(gap_cv, rel=0.15, abs=0.01)


def test_poisson_arrivals_are_not_dispersed() -> None:
    assert shape().dispersion["1 s"] == pytest.approx(1.0, abs=0.3)


def test_weibull_of_variation_one_is_exponential() -> None:
    assert weibull_shape(1.0) == pytest.approx(1.0)


def test_same_seed_makes_the_same_workload() -> None:
    settings = SynthSettings(rate=5, duration_s=20, seed=3)
    assert synthesize(settings) == synthesize(settings)
    assert synthesize(settings).requests != synthesize(SynthSettings(rate=5, duration_s=20, seed=4)).requests


@pytest.mark.parametrize("name", sorted(presets()))
def test_lengths_follow_the_preset(name: str) -> None:
    preset = presets()[name]
    assert preset.attribution
    assert list(preset.prompt_tokens) == sorted(preset.prompt_tokens)
    assert list(preset.output_tokens) == sorted(preset.output_tokens)
    requests = synthesize(SynthSettings(rate=100, duration_s=50, preset=name)).requests
    prompts = [each.body.prompt_tokens for each in requests if isinstance(each.body, SyntheticBody)]
    assert preset.prompt_tokens[8] <= statistics.median(prompts) <= preset.prompt_tokens[12]
    assert preset.prompt_tokens[0] <= min(prompts) <= max(prompts) <= preset.prompt_tokens[-1]


def test_lengths_can_be_cut() -> None:
    found = shape(max_prompt_tokens=100, max_output_tokens=10)
    assert (found.prompt_tokens[-1], found.output_tokens[-1]) == (100, 10)


@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 0.0},
        {"duration_s": -1.0},
        {"rate": float("nan")},
        {"rate": 1e9},
        {"arrivals": "uniform"},
        {"arrivals": "gamma"},
        {"arrivals": "gamma:0"},
        {"arrivals": "poisson:2"},
        {"preset": "azure"},
    ],
)
def test_settings_that_make_no_workload_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        shape(**settings)


# ---------------------------------------------------------------- scale


def chain(*at_s: float) -> Workload:
    requests = [
        WorkloadRequest(
            at_ns=int(moment * 1e9), session="s", body=SyntheticBody(4, ("a",), 4), after=index - 1 if index else None
        )
        for index, moment in enumerate(at_s)
    ]
    return Workload(WorkloadFacts(kind="synth", source="test"), requests)


def test_compress_divides_the_start_of_chains_only() -> None:
    scaled = compress(chain(10.0, 12.0, 17.0), 10.0).requests
    assert [each.at_ns for each in scaled] == [1_000_000_000, 3_000_000_000, 8_000_000_000]


def test_compress_keeps_burstiness_and_lengths() -> None:
    workload = synthesize(SynthSettings(rate=5, duration_s=100, arrivals="gamma:2"))
    source, scaled = measure(workload.requests), measure(compress(workload, 10.0).requests)
    assert scaled.rate == pytest.approx(10 * source.rate)
    assert scaled.gap_cv == pytest.approx(source.gap_cv)
    assert scaled.prompt_tokens == source.prompt_tokens


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf"), float("nan"), 1e-300])
def test_speed_that_makes_no_sense_is_refused(speed: float) -> None:
    with pytest.raises(ConfigError, match="--speed"):
        compress(chain(0.0), speed)


def test_shape_of_nothing_and_of_one_request() -> None:
    assert measure([]).requests == 0
    one = measure(chain(3.0).requests)
    assert (one.rate, one.gap_cv, one.peak_rate) == (0.0, None, 1.0)


def test_shared_prefix_is_measured_in_tokens() -> None:
    bodies = [SyntheticBody(25, ("a", "b", "c"), 10), SyntheticBody(25, ("a", "b", "d"), 10)]
    requests = [WorkloadRequest(at_ns=index, session="s", body=body) for index, body in enumerate(bodies)]
    assert measure(requests).prefix_share == pytest.approx(20 / 50)


def test_shape_of_years_without_traffic_is_measured_at_once() -> None:
    """Three hundred years have 10^11 windows of 0.1 s, of which two have a send."""
    shape = measure(chain(0.0, 1e10).requests)
    assert (shape.duration_s, shape.peak_rate) == (1e10, 1.0)
    assert shape.dispersion["0.1 s"] == 1.0


def test_dispersion_is_variance_over_mean_of_the_whole_windows() -> None:
    shape = measure(chain(0.0, 0.5, 2.5, 4.5).requests)
    assert shape.dispersion == {"0.1 s": pytest.approx(14 / 15, abs=1e-3), "1 s": pytest.approx(0.917, abs=1e-3)}


def test_dispersion_of_a_burst_is_high() -> None:
    moments = list(itertools.chain.from_iterable([second] * (50 if second % 5 == 0 else 1) for second in range(30)))
    requests = [WorkloadRequest(at_ns=int(m * 1e9), session="s", body=SyntheticBody(4, ("a",), 4)) for m in moments]
    assert measure(requests).dispersion["1 s"] > 20
