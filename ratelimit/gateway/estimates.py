"""What requests usually need, learned from those that were settled: output per caller, tokens per byte. Pure.

**Output.** Per key and model, the 90th percentile of one answer's tokens, over about the last ``MEMORY`` answers. The
pool's expected output stands for ``PRIOR_WEIGHT`` answers that never fade, so a key that is new is expected to need
just that, and one or two odd answers do not matter. No caller's answers say anything of another's.

**It cannot be trained into a burst.** Answers that a caller's maximum, its leaving or a fault cut short would teach it
to expect too little, so only answers that ended by themselves teach it downwards; any answer teaches it upwards. While
fewer than ``PRIOR_WEIGHT × 9`` answers were small it does not move down at all: the prior alone is a tenth of all. And
it never falls below a ``FLOOR_SHARE`` of the prior. A bucket then lets through at most 1/FLOOR_SHARE times as many
answers at once as an untrained key's, whatever they turn out to need; the overrun is charged, and waited for. (A
quarter: answers that are half of the usual are common and should be held as they are; below a quarter there is little
to win, since the prompt's share of a request's cost stays.)

**Prompts.** Tokens per byte, per key and model too, from the profile's and within ``RATIO_BOUNDS`` of it: the engine's
report replaces the estimate with a request's first chunk.

**Deltas.** Tokens per delta of a stream that tells its usage only at its end, per key and model, from the streams that
were read to their end. One that had more counts at once, one that had fewer a little: cheap streams that were read
do not make dear ones cheap that are left.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from math import ceil, log
from typing import TypeVar

import msgspec

_Learned = TypeVar("_Learned")

PERCENTILE = 0.9
#: Answers that the prior stands for.
PRIOR_WEIGHT = 20.0
#: Answers after which an older one counts 1/e as much as the newest.
MEMORY = 300
FLOOR_SHARE = 0.25
#: The largest of the pool's tokens per byte, and the smallest, that may be learned.
RATIO_BOUNDS = (0.5, 2.0)
#: What one request moves the tokens per byte by, as a share of its difference.
RATIO_STEP = 1 / 64
#: The most tokens per delta that may be learned, and how many deltas a stream needs to teach them.
MOST_PER_DELTA, FEWEST_DELTAS = 32.0, 8
#: What a text's bytes tell of its tokens is at most this many times too much.
TEXT_ERROR = 2.0
#: A shorter prompt is mostly the chat template's own tokens.
SHORTEST_PROMPT_BYTES = 64
#: Keys × models that are remembered, some 800 bytes each; the one that was idle longest is forgotten first.
MOST_REMEMBERED = 20_000

#: Answers are counted by length, in buckets each a fifth longer than the one before.
_GROWTH = 1.2
_BUCKETS = 96
#: Beyond it the counts are scaled down again: they are kept in single precision.
_LARGEST_COUNT = 1e4
_TOPS = tuple(ceil(_GROWTH**i) for i in range(_BUCKETS))


class Expected(msgspec.Struct, frozen=True):
    """What a request is expected to need: prompt tokens for each byte, output tokens for each choice."""

    tokens_per_byte: float
    output_tokens: int


class TextRates(msgspec.Struct, frozen=True):
    """What a text that came tells of its tokens; ``tokens_per_delta`` is ``None`` where nothing was learned."""

    tokens_per_byte: float
    tokens_per_delta: float | None = None

    def tokens(self, deltas: int, text_bytes: int) -> int:
        """The tokens of a text that came in so many deltas: at least one for each, at the upper side."""
        by_text = text_bytes * self.tokens_per_byte
        if self.tokens_per_delta is None:
            return max(deltas, ceil(by_text))
        return max(deltas, ceil(deltas * self.tokens_per_delta), ceil(by_text / TEXT_ERROR))


def _bucket_of(tokens: int) -> int:
    """The first bucket whose top is not below ``tokens``; the last holds all that are longer."""
    index = min(_BUCKETS - 1, max(0, int(log(max(1, tokens), _GROWTH))))
    while index < _BUCKETS - 1 and _TOPS[index] < tokens:
        index += 1
    return index


class Outputs:
    """The lengths of one caller's answers: counts that fade, in buckets of growing width."""

    __slots__ = ("_counts", "_found", "_longest", "_newest", "_total")

    def __init__(self) -> None:
        self._counts = array("f", bytes(4 * _BUCKETS))
        self._newest = 1.0  # what the newest answer counts; it grows, so that the older ones fade beside it
        self._total = 0.0
        self._longest = 0  # no bucket above it was ever used
        self._found: tuple[int, int] | None = None

    def p90(self, prior: int) -> int:
        """The length that a tenth of the answers exceed, where ``prior`` counts as ``PRIOR_WEIGHT`` of them."""
        if self._found is None or self._found[0] != prior:
            self._found = prior, self._p90(prior)
        return self._found[1]

    def _p90(self, prior: int) -> int:
        at_prior, prior_weight = _bucket_of(prior), PRIOR_WEIGHT * self._newest
        allowed = (1 - PERCENTILE) * (self._total + prior_weight)
        index, above = max(self._longest, at_prior) + 1, 0.0
        while above <= allowed and index > 0:
            index -= 1
            above += self._counts[index] + (prior_weight if index == at_prior else 0.0)
        found = prior if index == at_prior else _TOPS[index]
        return max(found, ceil(prior * FLOOR_SHARE), 1)

    def note(self, tokens: int) -> None:
        """An answer was this long."""
        bucket = _bucket_of(tokens)
        self._newest *= 1 + 1 / MEMORY
        self._counts[bucket] += self._newest
        self._total += self._newest
        self._longest = max(self._longest, bucket)
        self._found = None
        if self._newest > _LARGEST_COUNT:
            self._counts = array("f", (count / self._newest for count in self._counts))
            self._total /= self._newest
            self._newest = 1.0


class Estimates:
    """What one gateway has learned."""

    def __init__(self, most_remembered: int = MOST_REMEMBERED) -> None:
        self._most_remembered = most_remembered
        self._outputs: OrderedDict[tuple[str, str], Outputs] = OrderedDict()
        self._ratios: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._per_delta: OrderedDict[tuple[str, str], float] = OrderedDict()

    def expected(self, key_id: str, model: str, prior_output: int, tokens_per_byte: float) -> Expected:
        """What this caller's next request is expected to need; the last two are the pool's own."""
        outputs = self._outputs.get((key_id, model))
        output = max(1, prior_output) if outputs is None else outputs.p90(prior_output)
        ratio = self._ratios.get((key_id, model), tokens_per_byte)
        return Expected(_within(ratio, tokens_per_byte), output)

    def note_output(self, key_id: str, model: str, tokens: int, prior_output: int, ended: bool) -> None:
        """One answer was this long; ``ended`` if it ended by itself, and so says how little is enough."""
        caller = (key_id, model)
        outputs = self._outputs.get(caller) or Outputs()
        if not ended and tokens <= outputs.p90(prior_output):
            return
        self._remember(self._outputs, caller, outputs)
        outputs.note(tokens)

    def note_prompt(self, key_id: str, model: str, prompt_bytes: int, tokens: int, tokens_per_byte: float) -> None:
        """A caller's prompt of so many bytes was this long; the last is the pool's own ratio."""
        if prompt_bytes < SHORTEST_PROMPT_BYTES:
            return
        caller = (key_id, model)
        known = self._ratios.get(caller, tokens_per_byte)
        seen = _within(max(0, tokens) / prompt_bytes, tokens_per_byte)
        self._remember(self._ratios, caller, known + RATIO_STEP * (seen - known))

    def text_rates(self, key_id: str, model: str, tokens_per_byte: float) -> TextRates:
        """What this caller's streams tell of their tokens before they tell them; the last is the pool's own ratio."""
        return TextRates(tokens_per_byte, self._per_delta.get((key_id, model)))

    def note_deltas(self, key_id: str, model: str, deltas: int, tokens: int) -> None:
        """A stream that was read to its end told this many tokens, in so many deltas."""
        if deltas < FEWEST_DELTAS:
            return
        seen = min(max(1.0, tokens / deltas), MOST_PER_DELTA)
        known = self._per_delta.get((key_id, model), seen)
        self._remember(self._per_delta, (key_id, model), max(seen, known + RATIO_STEP * (seen - known)))

    def _remember(
        self, learned: OrderedDict[tuple[str, str], _Learned], caller: tuple[str, str], what: _Learned
    ) -> None:
        learned[caller] = what
        learned.move_to_end(caller)
        if len(learned) > self._most_remembered:
            learned.popitem(last=False)


def _within(ratio: float, tokens_per_byte: float) -> float:
    low, high = RATIO_BOUNDS
    return min(max(ratio, low * tokens_per_byte), high * tokens_per_byte)
