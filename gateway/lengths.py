"""How long prompts and answers are, before anybody has counted: what workers said of earlier ones."""

from __future__ import annotations

import msgspec

from gateway.fit import StepFit
from protos.core.contract import Sampling

DEFAULT_TOKENS = 128.0
SMOOTHING = 0.05
BYTES_PER_TOKEN = 4
"""Of prompts, while a model's are not known."""


class AnswerLength(msgspec.Struct, frozen=True, gc=False):
    """What is known of an answer before it comes."""

    tokens: float
    """Of each sequence."""
    sequences: int = 1
    is_exact: bool = False
    """It makes so many, and does not end before; else that is what such answers have in the mean."""


def has_fixed_output(sampling: Sampling) -> bool:
    """Does the answer end at its limit of tokens, and nowhere before?"""
    return sampling.ignore_eos and sampling.max_tokens is not None and not (sampling.stop or sampling.stop_token_ids)


class OutputLengths:
    """A mean per tenant, in the end a moving one; the first request of a tenant is guessed at DEFAULT_TOKENS."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        """Of the next answer."""

    def predict(self, tenant: str, max_tokens: int | None, choices: int, *, is_fixed: bool = False) -> int:
        """Output tokens of all choices together; `is_fixed` where they end at `max_tokens` and not before."""
        if is_fixed and max_tokens is not None:
            return choices * max_tokens
        mean = self._means.get(tenant, DEFAULT_TOKENS)
        return choices * max(1, round(mean if max_tokens is None else min(mean, max_tokens)))

    def learn(self, tenant: str, tokens: int, choices: int) -> None:
        """A request has finished with `tokens` over all its choices."""
        mean = self._means.get(tenant, DEFAULT_TOKENS)
        weight = self._weights.get(tenant, 0.5)  # the guess counts as one answer
        self._means[tenant] = mean + weight * (tokens / choices - mean)
        self._weights[tenant] = max(SMOOTHING, weight / (1 + weight))


class PromptLengths:
    """Tokens of a prompt of so many bytes, by model: what its chat template adds, and what a byte does."""

    def __init__(self) -> None:
        self._fits: dict[str, StepFit] = {}

    def predict(self, model: str, size_bytes: int) -> int:
        """At least 1."""
        fit = self._fits.get(model)
        if fit is None or not fit.is_warm:
            return size_bytes // BYTES_PER_TOKEN + 1
        return max(1, round(fit.extrapolate(size_bytes, 0)))

    def learn(self, model: str, size_bytes: int, tokens: int) -> None:
        """A worker has counted them."""
        self._fits.setdefault(model, StepFit()).add(size_bytes, 0, tokens)
