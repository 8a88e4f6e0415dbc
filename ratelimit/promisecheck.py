"""What can be wrong with a promise: bounds that no load meets, mixes that do not fit, amounts that contradict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from math import floor, log10
from typing import TYPE_CHECKING, get_args

from ratelimit.finding import Finding
from ratelimit.policy import LimitName
from ratelimit.yamlfile import Where
from serving.mixes import MIX_NAMES
from serving.operating import extrapolation_note
from serving.profile import Profile, ProfileError, load_profile

if TYPE_CHECKING:
    from ratelimit.config import MixConfig, PoolConfig, SloConfig, TierConfig


def hopeless_slo(where: Where, profile: Profile, slo: SloConfig) -> Iterator[Finding]:
    """A bound that an empty step exceeds already, which no load can meet; on a surface, wherever it is shortest."""
    factors = [point.factor for point in profile.surface.points] if profile.surface else [1.0]
    base_ms = profile.step_time.base_s * min(factors) * 1000
    for field in ("ttft_ms", "tpot_ms"):
        bound_ms = getattr(slo, field)
        if base_ms >= bound_ms:
            hint = f"; bounds are in milliseconds: for {bound_ms:g} s write {bound_ms * 1000:g}"
            yield Finding(
                (*where, "slo", field),
                f"{bound_ms:g} ms cannot be met: an empty step of {profile.name} takes {base_ms:.3g} ms"
                f"{hint if base_ms < bound_ms * 1000 else ''}",
            )


def unknown_mix(where: Where, mix: MixConfig) -> Iterator[Finding]:
    """A mix that nobody knows."""
    if mix.name not in MIX_NAMES:
        yield Finding((*where, "mix", "name"), f"no mix {mix.name!r}; there are {', '.join(MIX_NAMES)}")


def too_long_mix(where: Where, profile: Profile, mix: MixConfig) -> Iterator[Finding]:
    """A mix with a request that a replica can never run: it would supply nothing."""
    if mix.name not in MIX_NAMES:
        return
    longest = max(shape.input_tokens + shape.output_tokens for shape in mix.shapes().shapes)
    limits = profile.limits
    most = min(limits.max_model_len, limits.request_kv_blocks * limits.block_size)
    if longest > most:
        yield Finding(
            (*where, "mix"),
            f"the longest request of {mix.name} at scale {mix.scale:g} has {longest} tokens, {profile.name} "
            f"holds {most} (context {limits.max_model_len}, KV cache {limits.kv_tokens}); a scale of at most "
            f"{_cut(mix.scale * most / longest)} fits",
        )


def unmeasured_mix(where: Where, profile: Profile, mix: MixConfig) -> Iterator[Finding]:
    """A mix whose context a measured profile was not measured at: what it serves of it would be a guess."""
    note = extrapolation_note(profile, mix.shapes()) if mix.name in MIX_NAMES else ""
    if note:
        yield Finding(
            (*where, "mix"),
            f"{profile.name}: {note}; measure it there, change the mix or its scale, or write extrapolate: true, and "
            "limits derived from it are marked as extrapolated",
        )


def tier_problems(tiers: Sequence[TierConfig], pools: Sequence[PoolConfig]) -> Iterator[Finding]:
    """What is wrong with a tier's own promise on any profile, and bounds that mean nothing for it."""
    profiles, strict = known_profiles(pools), known_profiles(pool for pool in pools if not pool.extrapolate)
    for i, tier in enumerate(tiers):
        yield from _promise(("tiers", i), tier, profiles)
        if tier.mix is not None:
            for profile in strict:
                yield from unmeasured_mix(("tiers", i), profile, tier.mix)
        yield from _amounts(("tiers", i), tier)


def _promise(where: Where, tier: TierConfig, profiles: Iterable[Profile]) -> Iterator[Finding]:
    if tier.mix is not None:
        yield from unknown_mix(where, tier.mix)
    for profile in profiles:
        if tier.slo is not None:
            yield from hopeless_slo(where, profile, tier.slo)
        if tier.mix is not None:
            yield from too_long_mix(where, profile, tier.mix)
    if tier.oversell is not None and tier.share > 0:
        yield Finding(
            (*where, "oversell"), f"what is assured (share: {tier.share:g}) is never oversold; take it out, or share: 0"
        )


def known_profiles(pools: Iterable[PoolConfig]) -> list[Profile]:
    """Each profile of the pools that can be loaded; the others are told where they are named."""
    profiles = []
    for name in sorted({name for pool in pools for name in pool.profiles()}):
        with suppress(ProfileError, OSError, ValueError):
            profiles.append(load_profile(name))
    return profiles


def _amounts(where: Where, tier: TierConfig) -> Iterator[Finding]:
    for name in get_args(LimitName):
        least, most = getattr(tier.minimum, name), getattr(tier.maximum, name)
        if least is not None and tier.share == 0:
            yield Finding(
                (*where, "minimum", name), "a tier without a share is promised nothing; give it one, or take this out"
            )
        if least is not None and most is not None and least > most:
            yield Finding((*where, "minimum", name), f"{least} is above the maximum of {most}; lower one of them")
        for field, amount in (("minimum", least), ("maximum", most)):
            if amount is not None and name in tier.unlimited:
                yield Finding((*where, field, name), f"{name} is unlimited for this tier; take one of the two out")


def _cut(value: float) -> str:
    """Cut to two significant digits, so that what is advised is not above what is right."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return f"{floor(value / unit) * unit:.2g}"
