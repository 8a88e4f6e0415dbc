"""What the controller asks before it publishes and tells afterwards: waiting changes, approvals, the audit log.

In the state folder, ``waiting.json`` holds the changes that wait, written by the controller, ``approvals.json`` what
people let through, written by ``penstock limits approve``, ``decided.json`` and ``decided_keys.json`` what is decided
now, for a controller that starts with another config; of epochs see ``epochlog``. ``taking_up``, ``in_force`` and
``save`` write, and may wait for locks: an event loop calls them in a thread, one at a time.

No file here stops the limits: what cannot be written is said once in the log, counted in ``unkept``, and tried again at
every round. Approvals that cannot be read approve nothing. Only what was decided before must be readable: without it a
restart would approve whatever the config says by then, so until then the limits in force stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from time import time
from typing import TypeVar

from ratelimit.approval import (
    MOST_APPROVALS,
    Approval,
    ApprovalError,
    Change,
    Decision,
    Waiting,
    decide,
    still_valid,
    waiting_named,
)
from ratelimit.attempts import Attempts
from ratelimit.decided import Decided, issued_keys
from ratelimit.decidedfiles import DecidedFiles
from ratelimit.difference import bound_changed
from ratelimit.epochlog import EpochLog
from ratelimit.keys import KeyRecord
from ratelimit.policy import Policy
from ratelimit.publication import Publication
from ratelimit.statefile import StateFile

log = logging.getLogger(__name__)

I = TypeVar("I")  # noqa: E741 - the inputs, as in ``approval``


def waiting_file(state_dir: Path) -> StateFile[Waiting]:
    """The changes that wait for approval."""
    return StateFile(state_dir / "waiting.json", Waiting)


class ApprovalFile:
    """What people let through. Methods may raise ``StateFileError``."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._file = StateFile(state_dir / "approvals.json", Approval)

    def valid(self, now_s: float) -> tuple[Approval, ...]:
        """Those that have not expired."""
        return still_valid(self._file.read(), now_s)

    def approve(self, digest: str | None, by: str, now_s: float, valid_s: float) -> Waiting:
        """Let a change that waits through, the only one if ``digest`` is None. Raises ``ApprovalError``."""
        found = waiting_named(waiting_file(self._state_dir).read(), digest)
        with self._file.changing() as approvals:
            others = [each for each in still_valid(approvals, now_s) if each.digest != found.digest]
            if len(others) >= MOST_APPROVALS:
                raise ApprovalError(f"there are {MOST_APPROVALS} approvals already; wait until some expire")
            approvals[:] = [*others, Approval(found.digest, by, now_s, now_s + valid_s, found.does.largest_fall)]
        return found

    def use_up(self, used: Sequence[Approval]) -> None:
        """Forget approvals that have let their change through."""
        with self._file.changing() as approvals:
            approvals[:] = [each for each in approvals if each not in used]


class IssuedKeys:
    """How many keys there are by tier, counted when the key file or a policy has changed."""

    def __init__(self) -> None:
        self._of: tuple[tuple[KeyRecord, ...], tuple[Policy, ...]] | None = None
        self._counts: dict[str, int] = {}

    def counts(self, records: tuple[KeyRecord, ...], policies: Sequence[Policy], now_s: float) -> dict[str, int]:
        """By tier; one that has expired since the last change still counts, which at worst lets some keys through."""
        if self._of is None or self._of[0] is not records or self._of[1] != tuple(policies):
            self._counts, self._of = issued_keys(records, policies, now_s), (records, tuple(policies))
        return self._counts


class Governor:
    """Decides which changes take effect, and keeps what was decided."""

    def __init__(self, state_dir: Path, clock: Callable[[], float] = time) -> None:
        self._state_dir = state_dir
        self._clock = clock
        self._attempts = Attempts()
        self._epochs = EpochLog(state_dir, self._attempts)
        self._approvals = ApprovalFile(state_dir)
        self._waiting: tuple[Waiting, ...] | None = None
        self._are_unsaved = False
        self._files = DecidedFiles(state_dir)
        self._keep: Decided | None = None
        self._is_kept = True
        self._before: Decided | None = None
        self._taking: Decided | None = None
        self._used: tuple[Approval, ...] = ()
        self._claimed: tuple[Approval, ...] = ()

    @property
    def waiting(self) -> int:
        """How many changes wait."""
        return len(self._waiting or ())

    @property
    def unkept(self) -> int:
        """Epochs in force or past that are not in the audit log yet, or never reached it."""
        return self._epochs.unkept + self._epochs.lost

    @property
    def newest_epoch(self) -> int:
        """The newest epoch that was or may have been in force, as far as is known here."""
        return self._epochs.newest

    def is_unsure(self) -> bool:
        """Whether ``settle`` must be told what Redis holds, as after an error or a death while publishing."""
        self._resume()
        return self._epochs.is_unsure

    def resumed(self) -> Decided | None:
        """What was decided when the controller before stopped; None where it let everything through.

        Raises ``StateFileError`` where that is there and cannot be read: to take it for nothing would approve whatever
        the config says now.
        """
        self._before = self._files.read()
        return self._before

    def taking_up(self, decided: Decided, publication: Publication, approved: Sequence[str]) -> None:
        """Keep what is about to be decided and in force, and who approved what of it, before it is.

        ``publication`` is what will be in force: the same epoch as before where no limit changes. What is decided is
        kept for a controller that starts with another config; only where changes may wait.
        """
        self._resume()
        self._used = tuple(each for each in self._valid() if each.digest in approved) if approved else ()
        bounds = [each.adopted.falls_above for each in (self._before or decided, decided)]
        self._epochs.intend(publication, self._used, bound_changed(*bounds))
        self._keep, self._is_kept = decided if decided.adopted.falls_above is not None else None, False
        self._taking = decided
        self.save()

    def in_force(self) -> None:
        """What was taken up last is in force: bring it into the audit log, and use up what let it through."""
        self._epochs.in_force()
        self._before = self._taking
        self._use_up(self._used)
        self.save()

    def settle(self, found_epoch: int) -> None:
        """Say whether what was about to be published is in force, by the epoch that Redis holds (0: none)."""
        self._epochs.settle(found_epoch)

    def _use_up(self, used: tuple[Approval, ...]) -> None:
        if used:
            self._attempts.make("approvals cannot be used up", lambda: self._approvals.use_up(used))

    def approvals(self) -> tuple[Approval, ...]:
        """The approvals that count now; none while nothing waits."""
        return self._valid() if self._waiting else ()

    def decide(
        self,
        base: I,
        changes: Sequence[Change[I]],
        derived: Callable[[I], Publication],
        falls_above: float | None,
        later: Callable[[I], I] | None = None,
    ) -> Decision[I]:
        """Which of the changes take effect; those that wait are said in the log once, and kept by ``taking_up``."""
        self._resume()
        self._finish_claimed({change.digest for change in changes})
        approved = {approval.digest: approval for approval in self._valid()} if changes else {}
        decision = decide(base, changes, derived, falls_above, approved, later)
        before = {each.digest: each for each in self._waiting or ()}
        waiting = tuple(
            Waiting(
                change.digest,
                change.cause,
                before[change.digest].since if change.digest in before else self._clock(),
                falls_above or 0.0,
                does,
                approved[change.digest].fall if change.digest in approved else None,
            )
            for change, does in decision.held
        )
        for each in waiting:
            if each.digest not in before or before[each.digest].approved_fall != each.approved_fall:
                _say(each)
        self._are_unsaved = self._are_unsaved or waiting != self._waiting
        self._waiting = waiting
        return decision

    def _finish_claimed(self, undecided: set[str]) -> None:
        """Use up what let changes through that a controller took up before it died; they are decided by now."""
        self._use_up(tuple(each for each in self._claimed if each.digest not in undecided))
        self._claimed = ()

    @property
    def has_unsaved(self) -> bool:
        """Whether ``save`` has something to write."""
        return self._epochs.has_unsaved or self._are_unsaved or not self._is_kept

    def save(self) -> None:
        """Write to disk what is not there yet; a failure is said once, and the next call tries again."""
        if not self._is_kept:
            self._attempts.make("what is decided cannot be kept", self._write_decided)
        if self._are_unsaved:
            self._attempts.make("waiting changes cannot be kept", self._write_waiting)
        self._epochs.save()

    def _write_decided(self) -> None:
        self._files.write(self._keep)
        self._is_kept = True

    def _write_waiting(self) -> None:
        with waiting_file(self._state_dir).changing() as kept:
            kept[:] = self._waiting or ()
        self._are_unsaved = False

    def _resume(self) -> None:
        """Take up, once, where the controller before has stopped."""
        if self._waiting is None:
            self._waiting = ()
            self._attempts.make("waiting changes cannot be read", self._read_waiting)
            self._claimed = self._epochs.resume()

    def _read_waiting(self) -> None:
        self._waiting = tuple(waiting_file(self._state_dir).read())

    def _valid(self) -> tuple[Approval, ...]:
        found: list[Approval] = []
        self._attempts.make("approvals cannot be read", lambda: found.extend(self._approvals.valid(self._clock())))
        return tuple(found)


def outgrown(approved_fall: float) -> str:
    """Why a change waits that has been approved, in words."""
    return f"approved for a fall of {100 * approved_fall:.0f} %, which it would clearly exceed now"


def _say(waiting: Waiting) -> None:
    falls = waiting.does.falls_above(waiting.falls_above)
    worst = [f"{fall.limit} of {fall.who} on {fall.model} loses {100 * fall.fall:.0f} %" for fall in falls[:1]]
    worst += [*waiting.does.lost_access[:1]]
    worst += [f"{each.what} goes from {each.before} to {each.after}" for each in waiting.does.settings if each.fall]
    log.warning(
        "WAITING FOR APPROVAL: %s. By it %s, and %d limit(s) lose more than the %.0f %% that "
        "approval.falls_above allows. What is in force stays, and follows the fleet. `penstock limits pending` shows "
        "it, `penstock limits approve %s` lets it through.",
        waiting.cause if waiting.approved_fall is None else f"{waiting.cause} ({outgrown(waiting.approved_fall)})",
        "; ".join(worst),
        len(falls),
        100 * waiting.falls_above,
        waiting.digest,
    )
