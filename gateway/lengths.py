"""How long an answer will be, before it is: what a tenant's requests usually take."""

from __future__ import annotations

DEFAULT_TOKENS = 128.0
SMOOTHING = 0.05


class OutputLengths:
    """A moving average per tenant; the first request of a tenant is guessed at DEFAULT_TOKENS."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def predict(self, tenant: str, max_tokens: int | None, choices: int) -> int:
        """Output tokens of all choices together."""
        mean = self._means.get(tenant, DEFAULT_TOKENS)
        return choices * max(1, round(mean if max_tokens is None else min(mean, max_tokens)))

    def learn(self, tenant: str, tokens: int, choices: int) -> None:
        """A request has finished with `tokens` over all its choices."""
        mean = self._means.get(tenant, DEFAULT_TOKENS)
        self._means[tenant] = mean + SMOOTHING * (tokens / choices - mean)
