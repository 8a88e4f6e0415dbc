"""Prompts of known length: words that are one token each, and what the chat template adds around them.

Every prompt is its own random sequence of words, so that no prefix cache shortens the work that was planned.
"""

from __future__ import annotations

from random import Random

import msgspec

from serving.engine.tiny_model import WORDS


class PromptSizeError(RuntimeError):
    """The engine's tokenizer does not count these prompts as planned; says what it counted."""


class Template(msgspec.Struct, frozen=True):
    """Tokens that the chat template adds to a prompt of words."""

    tokens: int

    @property
    def least_input_tokens(self) -> int:
        """The shortest prompt: the template around one word."""
        return self.tokens + 1


def words(count: int, salt: str) -> str:
    """That many one-token words; another salt gives another sequence."""
    return "".join(f" {word}" for word in Random(salt).choices(WORDS, k=count))  # noqa: S311 - filler, not secrets


def measured_template(short: tuple[int, int], long: tuple[int, int]) -> Template:
    """From two (words, prompt tokens counted by the engine): what is not words is the template.

    Raises ``PromptSizeError`` unless one more word is one more token.
    """
    (few, few_tokens), (many, many_tokens) = short, long
    if many_tokens - few_tokens != many - few:
        raise PromptSizeError(
            f"the engine counts {few_tokens} tokens for {few} words and {many_tokens} for {many}; the load needs a "
            "tokenizer for which each of these words is one token, as that of the tiny model"
        )
    return Template(few_tokens - few)


def chat_body(model: str, content: str, output_tokens: int) -> bytes:
    """A streamed chat completion that generates exactly ``output_tokens``."""
    return msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
