"""Names of spans, attributes, headers and metrics: what dashboards, tests and clients rely on, in one place.

Attributes follow the OpenTelemetry semantic conventions for HTTP and GenAI where they have one; the rest is
`tidegate.*`.
"""

from __future__ import annotations

GATEWAY_SERVICE = "tidegate-gateway"
ENGINE_SERVICE = "tidegate-engine"

# Headers
REQUEST_ID = "x-request-id"
TIMING = "x-tidegate-timing"
REPLAY_OF = "x-tidegate-replay-of"
SESSION = "x-tidegate-session"
REJECT_REASON = "x-tidegate-reject-reason"
WORKER = "x-tidegate-worker"
TENANT = "x-tidegate-tenant"
PRIORITY = "x-tidegate-priority"
TTFT_MS = "x-tidegate-ttft-ms"
DEADLINE_MS = "x-tidegate-deadline-ms"
TRACEPARENT = "traceparent"

# Engine spans, by the record's phase
ENGINE_SPANS = {"engine_input": "input", "engine_queue": "queue", "prefill": "prefill", "decode": "decode"}
