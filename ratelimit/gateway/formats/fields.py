"""Which members of a request pass to an engine, by route. Only what is listed here does.

Listed are the request fields of the official SDKs (openai 3.52, anthropic 2.11), also those that vLLM ignores, and
those of vLLM 0.32's own that are a caller's to set: sampling, decoding and what goes into the prompt. Left out, and so
refused like any unknown member, are:

- what orders, shares or moves work inside the engine: ``request_id``, ``session_id``, ``kv_transfer_params``,
  ``ec_transfer_params``, ``vllm_xargs``, ``stream_interval``, ``routed_experts_prompt_start``, ``watermarking``;
- what brings a prompt that is not counted, or work out of proportion to it: ``prompt_embeds``, ``mm_payload``,
  ``return_mm_kwargs``, ``mm_processor_kwargs``, ``media_io_kwargs``, ``previous_input_messages``;
- ``chat_template``, which is a program that the engine would run;
- ``use_beam_search``, which computes a prefill for every token of every beam and reports none of that;
- ``include_reasoning``, which hides generated tokens: a stream that is left would have told nothing of them;
- what refers to something stored: nothing is.
"""

from __future__ import annotations

from typing import Literal

Route = Literal["chat", "completions", "responses", "messages", "count_tokens"]

#: What the gateway sets itself: a caller's own value is dropped.
OWNED = frozenset({"priority", "cache_salt"})


def _named(names: str) -> frozenset[str]:
    return frozenset(names.split())


_EVERYWHERE = OWNED | {"model"}
_SAMPLING = _named(
    "temperature top_p top_k min_p seed stop stop_token_ids logit_bias presence_penalty frequency_penalty "
    "repetition_penalty ignore_eos skip_special_tokens include_stop_str_in_output structured_outputs user"
)
_COMPLETION_SAMPLING = _SAMPLING | _named(
    "n best_of max_tokens min_tokens length_penalty bad_words allowed_token_ids logprobs logprob_token_ids "
    "prompt_logprobs echo stream stream_options repetition_detection thinking_token_budget response_format "
    "add_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side return_token_ids "
    "return_tokens_as_token_ids return_token_offsets"
)
_OPENAI_ACCOUNT = _named(
    "metadata moderation prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier service_tier "
    "store"
)
_TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_COUNTED_MESSAGES = _named(
    "messages system tools tool_choice thinking output_config chat_template_kwargs cache_control context_management "
    "speed user_profile_id workspace_id"
)

ALLOWED: dict[Route, frozenset[str]] = {
    "chat": _EVERYWHERE
    | _COMPLETION_SAMPLING
    | _OPENAI_ACCOUNT
    | _TOOLS
    | _named(
        "messages max_completion_tokens top_logprobs reasoning_effort audio function_call functions modalities "
        "prediction verbosity web_search_options chat_template_kwargs documents add_generation_prompt "
        "continue_final_message return_prompt_text"
    ),
    "completions": _EVERYWHERE | _COMPLETION_SAMPLING | {"prompt", "suffix"},
    "responses": _EVERYWHERE
    | _SAMPLING
    | _OPENAI_ACCOUNT
    | _TOOLS
    | _named(
        "access_programs background context_management image include input instructions max_output_tokens "
        "max_tool_calls previous_response_id prompt reasoning stream stream_options text top_logprobs truncation "
        "chat_template_kwargs"
    ),
    "messages": _EVERYWHERE
    | _COUNTED_MESSAGES
    | _named(
        "max_tokens stream stop_sequences temperature top_p top_k metadata service_tier container diagnostics "
        "inference_geo"
    ),
    "count_tokens": _EVERYWHERE | _COUNTED_MESSAGES,
}
