from __future__ import annotations

from deploy.load import parse, phrases

TEXT = """\
# TYPE tidegate_leases gauge
tidegate_leases 3
# TYPE tidegate_queue_requests gauge
tidegate_queue_requests 2
# TYPE tidegate_requests counter
tidegate_requests_total{endpoint="chat",model="m",outcome="finished",status="200",reason=""} %d
tidegate_requests_total{endpoint="chat",model="m",outcome="failed",status="500",reason=""} 99
# TYPE tidegate_tokens counter
tidegate_tokens_total{model="m",kind="prompt"} 5000
tidegate_tokens_total{model="m",kind="output"} %d
# TYPE tidegate_worker_running gauge
tidegate_worker_running{worker="127.0.0.1:9101"} 3
# TYPE tidegate_worker_waiting gauge
tidegate_worker_waiting{worker="127.0.0.1:9101"} 1
# TYPE tidegate_worker_kv_blocks_used gauge
tidegate_worker_kv_blocks_used{worker="127.0.0.1:9101"} 25
# TYPE tidegate_worker_kv_blocks_total gauge
tidegate_worker_kv_blocks_total{worker="127.0.0.1:9101"} 100
"""
NAMES = {"127.0.0.1:9101": "worker-1"}


def test_rates_are_of_finished_requests_and_output_tokens() -> None:
    before, now = parse(TEXT % (10, 100), 1.0), parse(TEXT % (14, 500), 3.0)
    assert phrases(before, now, NAMES) == {
        "gateway": "3 running, 2 queued, 2.0 req/s, 200 tok/s",
        "worker-1": "3 running, 1 waiting, KV 25%",
    }


def test_restarted_gateway_has_no_negative_rate() -> None:
    before, now = parse(TEXT % (10, 100), 1.0), parse(TEXT % (0, 0), 2.0)
    assert "0.0 req/s, 0 tok/s" in phrases(before, now, NAMES)["gateway"]


def test_silent_gateway_says_nothing() -> None:
    assert phrases(None, parse("", 1.0), NAMES) == {}
