"""What schemathesis checks beside its own: loaded by it, see test_fuzz.py."""

from __future__ import annotations

from typing import Any

import schemathesis

ACROSS_FIELDS = {"best_of", "max_tokens", "min_tokens", "stream_options", "top_logprobs"}
"""Fields whose rule is about another one, which no schema can say."""


@schemathesis.check
def accepts_what_fits(ctx: Any, response: Any, case: Any) -> None:
    """A request by the schema is refused only for what the schema cannot say."""
    if response.status_code == 400 and case.meta is not None and case.meta.generation.mode.is_positive:
        error = response.json()["error"]
        assert error["param"] in ACROSS_FIELDS or "got float" in error["message"], error
