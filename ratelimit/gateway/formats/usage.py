"""Usage as engines report it in each format, and in the gateway's terms. Pure."""

from __future__ import annotations

import msgspec

from ratelimit.gateway.hold import Usage


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class WireUsage(msgspec.Struct):
    """OpenAI's chat and completions: ``prompt_tokens`` are all of the prompt's."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _PromptDetails | None = None

    def usage(self) -> Usage:
        """The same in the gateway's terms."""
        details = self.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details else 0
        return Usage(self.prompt_tokens, self.completion_tokens or 0, cached)


class ResponsesUsage(msgspec.Struct):
    """OpenAI's responses: ``input_tokens`` are all of the prompt's."""

    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _PromptDetails | None = None

    def usage(self) -> Usage:
        """The same in the gateway's terms."""
        details = self.input_tokens_details
        cached = (details.cached_tokens or 0) if details else 0
        return Usage(self.input_tokens, self.output_tokens, cached)


class MessagesUsage(msgspec.Struct):
    """Anthropic's: ``input_tokens`` are those of the prompt that the cache neither had nor took.

    vLLM leaves the cache's members out until the stream's end, and counts all of the prompt as input until then.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    def usage(self) -> Usage:
        """The same in the gateway's terms."""
        cached = self.cache_read_input_tokens or 0
        prompt = (self.input_tokens or 0) + cached + (self.cache_creation_input_tokens or 0)
        return Usage(prompt, self.output_tokens or 0, cached)
