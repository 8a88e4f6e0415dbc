from __future__ import annotations

from statistics import correlation, fmean, quantiles

import pytest

from serving.capacity import RequestShape, WorkloadMix
from serving.mixes import CHAT_SAMPLE_SIZE, MIX_NAMES, SYNTHETIC_MEANS, UnknownMixError, load_mix, trace_shapes


def test_the_trace_is_whole() -> None:
    """All 19,366 requests are there, with the means that the trace is known for."""
    shapes = trace_shapes()

    assert len(shapes) == 19_366
    assert fmean(s.input_tokens for s in shapes) == pytest.approx(1154.7, abs=0.1)
    assert fmean(s.output_tokens for s in shapes) == pytest.approx(211.1, abs=0.1)


def test_chat_is_a_faithful_sample_of_the_trace() -> None:
    """Quantiles of both lengths, their correlation and the mean of their product stay within a few percent."""
    sample, trace = load_mix("chat").shapes, trace_shapes()

    assert len(sample) == CHAT_SAMPLE_SIZE
    for field in ("input_tokens", "output_tokens"):
        got, expected = _quantiles(sample, field), _quantiles(trace, field)
        assert got == pytest.approx(expected, rel=0.06)
    assert _correlation(sample) == pytest.approx(_correlation(trace), abs=0.02)
    products = [fmean(s.input_tokens * s.output_tokens for s in shapes) for shapes in (sample, trace)]
    assert products[0] == pytest.approx(products[1], rel=0.03)


@pytest.mark.parametrize("name", SYNTHETIC_MEANS)
def test_a_synthetic_mix_has_the_means_it_states(name: str) -> None:
    """The grids are centred on their means and spread on both sides of them."""
    mix = load_mix(name)

    assert (mix.mean_input_tokens, mix.mean_output_tokens) == pytest.approx(SYNTHETIC_MEANS[name], rel=0.01)
    assert min(s.input_tokens for s in mix.shapes) < 0.6 * mix.mean_input_tokens
    assert max(s.output_tokens for s in mix.shapes) > 1.4 * mix.mean_output_tokens


@pytest.mark.parametrize("name", MIX_NAMES)
def test_scaling_multiplies_lengths_and_keeps_at_least_one_token(name: str) -> None:
    """Each length is the whole one times the scale, rounded; however small the scale, a request stays a request."""
    whole, eighth, dust = load_mix(name), load_mix(name, 0.125), load_mix(name, 1e-9)

    for one, other in zip(whole.shapes, eighth.shapes, strict=True):
        assert other == RequestShape(max(1, round(one.input_tokens / 8)), max(1, round(one.output_tokens / 8)))
    assert set(dust.shapes) == {RequestShape(1, 1)}


def test_the_trace_scales_like_a_mix() -> None:
    """The load test divides the whole trace by 8 in its order of arrival."""
    assert trace_shapes(0.125)[0] == RequestShape(round(374 / 8), round(44 / 8))


def test_mixes_are_reproducible() -> None:
    """No seed, no clock: the same call gives the same mix."""
    assert load_mix("chat", 0.5) == load_mix("chat", 0.5)
    assert isinstance(load_mix("chat"), WorkloadMix)


def test_bad_arguments_are_explained() -> None:
    """An unknown name lists the known ones; a scale that is not positive is refused."""
    with pytest.raises(UnknownMixError, match="no workload mix 'chatty'; there are chat, decode-heavy"):
        load_mix("chatty")
    with pytest.raises(ValueError, match="scale of a mix is -1"):
        load_mix("chat", -1)
    with pytest.raises(ValueError, match="scale of a mix is nan"):
        trace_shapes(float("nan"))


def _quantiles(shapes: tuple[RequestShape, ...], field: str) -> list[float]:
    return quantiles([getattr(s, field) for s in shapes], n=20)[1:]


def _correlation(shapes: tuple[RequestShape, ...]) -> float:
    return correlation([s.input_tokens for s in shapes], [s.output_tokens for s in shapes])


def test_a_cached_share_is_of_every_prompt() -> None:
    """A part of each prompt, rounded down, is cached: never all of it, and only what is computed is a mean."""
    plain, cached = load_mix("chat"), load_mix("chat", cached_share=0.5)

    assert [s.cached_tokens for s in cached.shapes] == [s.input_tokens // 2 for s in plain.shapes]
    assert all(s.cached_tokens < s.input_tokens for s in load_mix("chat", 0.01, 0.999).shapes)
    assert cached.mean_input_tokens == pytest.approx(plain.mean_input_tokens / 2, rel=1e-3)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_cached_share_that_is_no_share_is_refused(share: float) -> None:
    """A share below 0, of all, or of nothing at all has no meaning."""
    with pytest.raises(ValueError, match="cached share of a mix"):
        load_mix("chat", cached_share=share)
