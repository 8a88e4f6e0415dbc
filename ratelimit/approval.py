"""Which changes of what people decide may take effect, and which wait until somebody approves them. Pure.

What limits depend on is of two kinds. What is *observed* (which replicas serve, and how well) takes effect at once: a
promise that the fleet can no longer keep helps nobody. What is *decided* (the config with its profiles, the overrides,
the number of keys) is a list of changes. What would be published with all of them is weighed against what would be
published with none, both with the fleet as it is now. Where a limit falls further than the operator allows, each
change is weighed alone, against what would be published without it: one that lowers a limit further than that waits,
the others take effect. So what is bounded is each change, as if they were made one after the other, not their sum.

A change is known by a digest of what was decided before and after it, so that an approval lets that change through and
no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Generic, NamedTuple, TypeVar

import msgspec

from ratelimit.difference import Difference, Setting, difference, snapshot
from ratelimit.publication import Publication

#: What limits are derived from, of whatever type.
I = TypeVar("I")  # noqa: E741 - the inputs

_DIGEST_LENGTH = 16
#: An approval holds this long unless its giver says otherwise: a day for the change to arrive where it is meant to.
APPROVAL_VALID_S = 24 * 3600.0
LONGEST_APPROVAL_S = 30 * 24 * 3600.0
MOST_APPROVALS = 1000
#: A change waits again where it leaves less than this of what it was approved to leave of the limit that falls most.
LEAST_KEPT = 0.9


class ApprovalError(ValueError):
    """There is nothing to approve as asked; the message says what there is."""


class Approval(msgspec.Struct, frozen=True):
    """Somebody lets the change with this digest through, as long as no limit falls much further than ``fall``.

    Times are seconds since 1970. ``fall`` is the largest that was shown to whoever approved.
    """

    digest: str
    by: str
    at: float
    until: float
    fall: float = 1.0

    def covers(self, fall: float) -> bool:
        """Whether a fall is what was approved, or not clearly more: the fleet moves a little all the time."""
        return 1 - fall >= LEAST_KEPT * (1 - self.fall)


class Change(NamedTuple, Generic[I]):
    """One change of what is decided: what it is in words, its digest, and the inputs with it.

    ``settings`` are what it does that no limit shows.
    """

    cause: str
    digest: str
    applied: Callable[[I], I]
    settings: tuple[Setting, ...] = ()


class Waiting(msgspec.Struct, frozen=True):
    """A change that waits for approval: what it would do, and since when (seconds since 1970) it waits.

    ``approved_fall`` is the largest fall that it has been approved for, where by now it would be clearly larger.
    """

    digest: str
    cause: str
    since: float
    falls_above: float
    does: Difference
    approved_fall: float | None = None


class Decision(NamedTuple, Generic[I]):
    """What to derive from, what that comes to, what was approved, and which changes wait with what they would do."""

    inputs: I
    publication: Publication
    approved: tuple[str, ...]
    held: tuple[tuple[Change[I], Difference], ...]


def digest_of(cause: str, before: object, after: object) -> str:
    """What tells one change from every other; ``before`` and ``after`` are anything that JSON can say."""
    return sha256(msgspec.json.encode([cause, before, after], order="deterministic")).hexdigest()[:_DIGEST_LENGTH]


def decide(
    base: I,
    changes: Sequence[Change[I]],
    derived: Callable[[I], Publication],
    falls_above: float | None,
    approved: Mapping[str, Approval],
    later: Callable[[I], I] | None = None,
) -> Decision[I]:
    """Take up the changes one after another, but for those by which a limit loses more than ``falls_above`` of itself.

    ``base`` is what was decided so far with the fleet as it is now. ``approved`` is by digest: such a change is taken
    up if it does no more than was approved. With ``falls_above`` None nothing waits. ``later`` is what inputs come to
    by themselves in time: a change is weighed then too, for what hides its fall now will not hide it for ever.
    """
    views = [derived] if later is None else [derived, lambda inputs: derived(later(inputs))]
    together = base
    for change in changes:
        together = change.applied(together)
    wanted = _Seen(together, [view(together) for view in views])
    if falls_above is None or not changes:
        return Decision(together, wanted.now, (), ())
    standing = _Seen(base, [view(base) for view in views])
    all_settings = [setting for change in changes for setting in change.settings]
    if _worst(standing, wanted, all_settings).largest_fall <= falls_above:
        return Decision(together, wanted.now, (), ())
    used: list[str] = []
    held: list[tuple[Change[I], Difference]] = []
    for change in changes:
        inputs = change.applied(standing.inputs)
        candidate = _Seen(inputs, [view(inputs) for view in views])
        does = _worst(standing, candidate, change.settings)
        falls = does.largest_fall > falls_above
        approval = approved.get(change.digest)
        if falls and (approval is None or not approval.covers(does.largest_fall)):
            held.append((change, does))
            continue
        used += [change.digest] if falls else []
        standing = candidate
    return Decision(standing.inputs, standing.now, tuple(used), tuple(held))


class _Seen(NamedTuple, Generic[I]):
    """Inputs and what they come to: now, and later where that is asked for."""

    inputs: I
    publications: Sequence[Publication]

    @property
    def now(self) -> Publication:
        return self.publications[0]


def _worst(before: _Seen[I], after: _Seen[I], settings: Sequence[Setting]) -> Difference:
    """What a change does in the view in which a limit falls furthest; of equal ones in that of now."""
    pairs = zip(before.publications, after.publications, strict=True)
    return max((_does(*pair, settings) for pair in pairs), key=lambda does: does.largest_fall)


def _does(before: Publication, after: Publication, settings: Iterable[Setting]) -> Difference:
    found = difference(snapshot(before), snapshot(after))
    return msgspec.structs.replace(found, settings=(*found.settings, *settings))


def still_valid(approvals: Iterable[Approval], now_s: float) -> tuple[Approval, ...]:
    """The approvals that have not expired at ``now_s``."""
    return tuple(approval for approval in approvals if now_s < approval.until)


def waiting_named(waiting: Sequence[Waiting], digest: str | None) -> Waiting:
    """The waiting change that is meant; without a digest the only one. Raises ``ApprovalError``."""
    known = ", ".join(f"{each.digest} ({each.cause})" for each in waiting) or "none"
    if not waiting:
        raise ApprovalError("no change waits for approval; `penstock limits history` shows what took effect")
    found = [each for each in waiting if digest is None or each.digest == digest]
    if len(found) != 1 and digest is None:
        raise ApprovalError(f"several changes wait; say which: {known}")
    if not found:
        raise ApprovalError(f"no change {digest!r} waits, or it has changed since; those that wait: {known}")
    return found[0]
