"""The rest of an answer that another worker began, token for token as if it had never moved.

To vLLM the tokens made so far are part of the prompt; to the client they are output. So the text is made here, by
vLLM's own detokenizer, which is fed with them first: half a character, or the start of what may become a stop string,
that the lost worker held back comes out with what follows. Stop strings are found here too, for the same reason.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any


class Continuation:
    """`params` are the sampling parameters of the whole request; vLLM itself gets those of the rest."""

    def __init__(
        self, engine: Any, params: Any, prompt_token_ids: Sequence[int], resumed_token_ids: Sequence[int]
    ) -> None:
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        params.update_from_generation_config(
            engine.input_processor.generation_config_fields, engine.renderer.get_eos_token_id()
        )
        self._detokenizer = IncrementalDetokenizer.from_new_request(
            engine.get_tokenizer(),
            types.SimpleNamespace(
                request_id="resumed",
                prompt_token_ids=list(prompt_token_ids),
                prompt_embeds=None,
                sampling_params=params,
            ),
        )
        self.reason = self._end_of(params, list(resumed_token_ids))
        """Why the answer ends; None while it goes on. Set from the start where only the word of its end was lost."""

    def _end_of(self, params: Any, token_ids: list[int]) -> str | None:
        is_stopped = token_ids[-1] == params.eos_token_id or token_ids[-1] in (params.stop_token_ids or ())
        stop = self._detokenizer.update(token_ids, is_stopped)
        self._detokenizer.get_next_output_text(False, True)  # the client has it
        if is_stopped or stop is not None:
            return "stop"
        return "length" if len(token_ids) >= params.max_tokens else None

    def translate(self, completion: Any) -> None:
        """Give one step's output its text, and its end where that is a stop string."""
        before = self._detokenizer.num_output_tokens()
        stop = self._detokenizer.update(list(completion.token_ids), completion.finish_reason == "stop")
        if stop is not None:
            completion.finish_reason = "stop"
            completion.token_ids = completion.token_ids[: self._detokenizer.num_output_tokens() - before]
        self.reason = completion.finish_reason
        completion.text = self._detokenizer.get_next_output_text(self.reason is not None, True)
