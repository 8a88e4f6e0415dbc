"""Every epoch, from before it is published until it is in the audit log.

``intents.json`` of the state folder has what is not in the log yet: each epoch is written there, with its cause and who
approved what, before it is published, and taken out when the log has it. So whenever a controller dies, the one after
it can say of each epoch that may have been in force who let it through.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ratelimit.approval import Approval
from ratelimit.attempts import Attempts
from ratelimit.audit import AuditLog, Entry
from ratelimit.difference import Difference, Setting, Snapshot, difference, snapshot
from ratelimit.publication import Publication
from ratelimit.publisher import read_published
from ratelimit.statefile import StateFile

#: Epochs kept while the log cannot be written; of more than these the oldest are lost, and counted.
MOST_UNKEPT = 100


class Intent(msgspec.Struct, frozen=True):
    """An epoch that is not in the log yet; ``settled``: it is known as well as it ever will be if it was in force."""

    entry: Entry
    settled: bool = False


class EpochLog:
    """The epochs of one installation. What cannot be read or written is said once, and tried again."""

    def __init__(self, state_dir: Path, attempts: Attempts) -> None:
        self._state_dir = state_dir
        self._attempts = attempts
        self._audit = AuditLog(state_dir)
        self._file = StateFile(state_dir / "intents.json", Intent)
        self._intents: list[Intent] = []
        self._are_written = True
        self._are_resumed = False
        self._last: Snapshot | None = None
        self._newest_noted = 0
        #: Epochs that never reached the audit log.
        self.lost = 0

    @property
    def unkept(self) -> int:
        """Epochs in force or past that are not in the audit log yet."""
        return len(self._intents)

    @property
    def newest(self) -> int:
        """The newest epoch that was or may have been in force; 0 where none is known."""
        last = self._last.publication.epoch if self._last else 0
        return max(last, self._newest_noted)

    @property
    def has_unsaved(self) -> bool:
        """Whether ``save`` has something to write."""
        return bool(self._intents) or not self._are_written

    @property
    def is_unsure(self) -> bool:
        """Whether an epoch was to be published and nobody has said whether it is in force."""
        return any(not intent.settled for intent in self._intents)

    def resume(self) -> tuple[Approval, ...]:
        """Take up where the controller before has stopped; the approvals that its unfinished epochs have used."""
        self._attempts.make("unfinished epochs cannot be read", self._read_intents)
        self._attempts.make("the audit log cannot be read", self._read_last)
        self._are_resumed = True
        return tuple(approval for intent in self._intents for approval in intent.entry.approved)

    def intend(self, publication: Publication, used: Sequence[Approval], settings: Sequence[Setting]) -> None:
        """Note what is about to be in force, on disk before this returns if it can be.

        Where the epoch in force stays only ``settings`` and approvals are noted, and nothing if there are none.
        """
        now, before = snapshot(publication), self._last.publication.epoch if self._last else 0
        is_new = now != self._last
        if not (is_new or used or settings):
            return
        does = difference(self._last, now) if is_new else Difference()
        does = msgspec.structs.replace(does, settings=(*does.settings, *settings))
        cause = publication.reason if is_new else "what is decided changed, and no limit by it"
        self._add(Intent(Entry(publication.epoch, publication.published_at, cause, before, does, now, tuple(used))))
        self._attempts.make("what is about to be published cannot be kept", self._write_intents)

    def in_force(self) -> None:
        """What was noted last is in force."""
        self._are_resumed = False
        self._intents = [msgspec.structs.replace(intent, settled=True) for intent in self._intents]
        self._last = self._intents[-1].entry.published if self._intents else self._last

    def settle(self, found: int) -> None:
        """Say of what was to be published whether it was in force; ``found`` is the epoch that Redis holds, 0 if none.

        What never was is forgotten, for it is tried again. Of a controller that has died it stays, marked as unsure, if
        it has used approvals: what is decided may rest on them.
        """
        last = self._last.publication.epoch if self._last else 0
        settled = []
        for intent in self._intents:
            entry = intent.entry
            if intent.settled or entry.epoch in (found, entry.before):
                settled.append(Intent(entry, settled=True))
                self._last = entry.published if not (intent.settled or entry.unsure) else self._last
            elif found != last or (self._are_resumed and entry.approved):
                settled.append(Intent(msgspec.structs.replace(entry, unsure=True), settled=True))
        self._intents, self._are_written, self._are_resumed = settled, False, False

    def save(self) -> None:
        """Bring what is settled into the audit log, and take it out of the file."""
        self._attempts.make("epochs are in force but not in the audit log", self._append)
        if not self._are_written:
            self._attempts.make("unfinished epochs cannot be kept", self._write_intents)

    def _add(self, intent: Intent) -> None:
        if len(self._intents) >= MOST_UNKEPT:
            self._intents.pop(0)
            self.lost += 1
        self._intents.append(intent)
        self._are_written = False

    def _append(self) -> None:
        while self._intents and self._intents[0].settled:
            self._audit.append(self._intents[0].entry)
            self._intents.pop(0)
            self._are_written = False

    def _write_intents(self) -> None:
        with self._file.changing() as intents:
            intents[:] = self._intents
        self._are_written = True

    def _read_intents(self) -> None:
        self._intents = self._file.read()
        self._newest_noted = max((intent.entry.epoch for intent in self._intents), default=0)

    def _read_last(self) -> None:
        """The last epoch in force that was kept; one published after it that nothing else tells of is kept now."""
        kept = {(entry.epoch, entry.at, entry.cause) for entry in self._audit.entries()} if self._intents else set()
        self._intents = [
            intent for intent in self._intents if (intent.entry.epoch, intent.entry.at, intent.entry.cause) not in kept
        ]
        self._last = next((entry.published for entry in self._audit.entries() if not entry.unsure), None)
        known = [self._last.publication.epoch if self._last else 0, *(i.entry.epoch for i in self._intents)]
        published = read_published(self._state_dir)
        if published is None or published.epoch < max(known):
            return
        if published.epoch > max(known):
            self.intend(published, (), ())
        self._intents = [
            Intent(intent.entry, intent.settled or intent.entry.epoch == published.epoch) for intent in self._intents
        ]
        self._last = snapshot(published)
