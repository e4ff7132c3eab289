"""Which settled requests become traces: a pure decision, made after the end is known."""

from __future__ import annotations

import collections

from protos.core.record import Outcome, RequestRecord

WINDOW = 512
REFRESH = 64


class TailSampler:
    """Keeps what somebody will look for, and a fraction of the rest; never more than `keep_per_s`.

    Kept for a reason: anything that did not finish, was retried or preempted, or took longer than the rolling 95th
    percentile. Whole traces only: the fraction is decided on the trace id, so that all gateways agree.
    """

    def __init__(self, keep_ratio: float, keep_per_s: float) -> None:
        self._threshold = int(keep_ratio * 2**64)
        self._keep_per_s = keep_per_s
        self._most_tokens = max(1.0, keep_per_s)
        self._tokens = self._most_tokens
        self._filled_ns = 0
        self._totals_ns: collections.deque[int] = collections.deque(maxlen=WINDOW)
        self._seen = 0
        self._slow_ns: int | None = None

    def is_kept(self, record: RequestRecord, now_ns: int) -> bool:
        is_slow = self._is_slow(record.total_ns)
        if not record.is_sampled or not (is_slow or self._has_reason(record) or self._is_drawn(record)):
            return False
        return self._take_token(now_ns)

    def _has_reason(self, record: RequestRecord) -> bool:
        return record.outcome is not Outcome.FINISHED or len(record.attempts) > 1 or record.preemptions > 0

    def _is_drawn(self, record: RequestRecord) -> bool:
        return int(record.trace_id[16:], 16) < self._threshold

    def _is_slow(self, total_ns: int) -> bool:
        self._totals_ns.append(total_ns)
        self._seen += 1
        if self._seen % REFRESH == 0:
            self._slow_ns = sorted(self._totals_ns)[len(self._totals_ns) * 95 // 100]
        return self._slow_ns is not None and total_ns > self._slow_ns

    def _take_token(self, now_ns: int) -> bool:
        if self._filled_ns:
            elapsed_s = (now_ns - self._filled_ns) / 1e9
            self._tokens = min(self._most_tokens, self._tokens + elapsed_s * self._keep_per_s)
        self._filled_ns = now_ns
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
