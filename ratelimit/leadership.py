"""Which of several controllers leads: the one that holds a lease in Redis. Only it changes what is in force there.

``penstock:leader`` is the lease ("TERM HOLDER", it ends by Redis's clock), ``penstock:leader:term`` the newest term. A
holder is one run of one process. Whoever stands by asks every ``RETRY_S``; the leader renews every ``RENEW_S``, and
gives the lease back when it is stopped.

What is guaranteed, of one Redis (a primary, as long as it is the one that everybody talks to):

- *One leads.* A leader counts its lease from before it asked, on its own steady clock, and lays its work down
  ``MARGIN_S`` before that ends, unless Redis has confirmed the same term again. Wall clocks play no part. Two lead at
  once only if clocks *run* differently, by more than ``MARGIN_S`` in ``LEASE_S``, or Redis's wall clock jumps ahead.
- *Only the leader writes*, even then: each write is one script that reads the lease first (``write``). A process that
  was paused, or a command that was long on its way, finds another term there, or none, and changes nothing.
- *A term with its holder is never given out twice*, so no old writer passes for a new one. Terms only grow, as long as
  Redis keeps them. One that restarts empty, or fails over to a replica that lags, may have forgotten the newest: a
  candidate gives the newest that it has heard of, and what is compared is the term and the holder, not which is
  greater. A lease that was forgotten is lost to its holder, and is taken anew by whoever asks first; one that came back
  out of a replica ends by itself. So nobody is without a leader for longer than ``LEASE_S`` and an asking.

A Redis belongs to one *installation*, a state folder with its id: ``penstock:installation``, written with each lease.
Who asks from another folder is not given the lease, says so once, and is unready: leading, it would put its own API
keys, or none, in place of those in force. A Redis without an id takes that of the first who leads. Once it was told of
the other installation, it leaves a Redis that has lost everything to that one too.

What is not: two primaries (a partition before the old one steps down) are two Redises, and have a leader each. The
files of the state folder are not behind this fence; each says what keeps it whole.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from importlib.resources import files
from secrets import token_hex
from time import monotonic
from typing import Final, NamedTuple, Protocol, TypeAlias

import msgspec
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from ratelimit.cancellation import is_cancelled
from ratelimit.controllermetrics import ControllerMetrics
from ratelimit.installation import Installation

log = logging.getLogger(__name__)

LEADER_KEY: Final = "penstock:leader"
TERM_KEY: Final = "penstock:leader:term"
INSTALLATION_KEY: Final = "penstock:installation"
LEASE_S: Final = 5.0
RENEW_S: Final = 1.5
#: After an asking that failed, and while another leads.
RETRY_S: Final = 0.5
#: So much of a lease is never used: for what is under way when it ends, and clocks that run differently.
MARGIN_S: Final = 1.0
ASK_TIMEOUT_S: Final = 1.0

_REFUSALS: Final = (AuthenticationError, AuthorizationError, NoPermissionError)

Word: TypeAlias = str | bytes | int


class NotLeadingError(RuntimeError):
    """A controller that does not lead, or not any more, was to write; nothing was written."""


class RefusedError(RuntimeError):
    """Redis is there, and refuses this controller; nothing was ever answered to it. The message says what to do."""


class Answer(NamedTuple):
    """What Redis says: the term in force (0: none), and whether it is the asker's."""

    term: int
    is_ours: bool


class Standing(msgspec.Struct, frozen=True):
    """Where a controller stands: the term that it leads (0: none), until when by its own steady clock, and the newest
    term that it has heard of.
    """

    term: int = 0
    until_s: float = 0.0
    newest_term: int = 0

    def leads(self, now_s: float) -> bool:
        """Whether it may act as the leader now."""
        return self.term > 0 and now_s < self.until_s

    def after(self, answer: Answer, asked_s: float) -> Standing:
        """What it is by an answer to what it asked at ``asked_s``: Redis began to count the lease no earlier."""
        newest = max(self.newest_term, answer.term)
        if not answer.is_ours:
            return Standing(newest_term=newest)
        return Standing(answer.term, asked_s + LEASE_S - MARGIN_S, newest)

    def stood_down(self) -> Standing:
        """What it is when its lease is not to be counted on any more."""
        return Standing(newest_term=self.newest_term)

    def asking_timeout_s(self, now_s: float) -> float:
        """How long to wait for an answer: a leader no longer than it leads, unless it has slept through that."""
        left_s = self.until_s - now_s
        return min(ASK_TIMEOUT_S, left_s) if self.term and left_s > 0 else ASK_TIMEOUT_S


class Draft(NamedTuple):
    """A hash that is to take another's place: its key, and how many fields it has when it is whole."""

    key: str
    fields: int


class Writes(Protocol):
    """A way to change what is in force in Redis."""

    def check(self) -> None:
        """Raise ``NotLeadingError`` where nothing may be changed, as far as is known without asking Redis."""

    async def write(self, *commands: tuple[Word, ...]) -> None:
        """Execute all of these commands, or none. Raises ``NotLeadingError`` or ``RedisError``."""

    async def replace(self, hash_key: str, draft: Draft, *commands: tuple[Word, ...]) -> None:
        """As ``write``, and the hash becomes the draft, which is no key of its own then.

        Nothing is done, with ``RedisError``, where the draft is not whole (any more).
        """


class Leadership:
    """One candidate, of one installation. ``clock`` is in steady seconds; ``metrics`` is told what happens."""

    def __init__(
        self,
        redis: Redis,
        metrics: ControllerMetrics,
        installation: Installation,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{token_hex(4)}"
        self._ask_for = redis.register_script(_script("lead"))
        self._fenced = redis.register_script(_script("fenced"))
        self._metrics = metrics
        self._installation = installation
        self._clock = clock
        self._standing = Standing()
        self._refused = asyncio.Event()
        self._failure = ""
        self._is_known = False
        self._other_installation = ""

    @property
    def term(self) -> int:
        """The term that it leads now; 0 for none."""
        return self._standing.term if self._standing.leads(self._clock()) else 0

    async def run(self, work: Callable[[], Coroutine[None, None, object]]) -> None:
        """Stand by, do the work while leading, and stand by again, until cancelled.

        A Redis that is away is waited for. One that refuses the first asking ends this with ``RefusedError``: a wrong
        password is not mended by time, but one that is changed later may be.

        The work is begun anew in each term, cancelled when the term ends, and awaited before anything else is done. It
        is not to end by itself: its error, or a ``RuntimeError``, ends this too.
        """
        log.warning("standing by as %s", self.holder)
        while not is_cancelled():
            try:
                await self._stand_by()
                if not is_cancelled():  # it may have been, unheard, by the very asking that brought the lease
                    await self._lead(work)
            finally:
                await self._give_back()

    def check(self) -> None:
        """Raise ``NotLeadingError`` where it does not lead by its own clock."""
        if not self.term:
            raise NotLeadingError("this controller does not lead now: its lease was not renewed in time")

    async def write(self, *commands: tuple[Word, ...]) -> None:
        """Execute all of these commands, or none: only while Redis says that this one leads, in this term.

        Raises ``RedisError``, or ``NotLeadingError``; where Redis is why, the term is over.
        """
        await self._write([], [], commands)

    async def replace(self, hash_key: str, draft: Draft, *commands: tuple[Word, ...]) -> None:
        """As ``write``, and the hash becomes the draft. Raises ``RedisError`` where that is not whole."""
        await self._write([hash_key, draft.key], [draft.fields], commands)

    async def _write(self, keys: list[str], first: list[Word], commands: tuple[tuple[Word, ...], ...]) -> None:
        self.check()
        fence = self._fence
        words = [*first, *(word for command in commands for word in (len(command), *command))]
        done = int(await self._fenced(keys=[LEADER_KEY, *keys], args=(fence, *words)))
        if done < 0:
            raise RedisError(f"{keys[-1]} in Redis is not whole any more")
        if not done:
            self._refused.set()
            raise NotLeadingError(f"the lease in Redis is no longer {fence!r}")

    @property
    def _fence(self) -> str:
        return f"{self._standing.term} {self.holder}"

    async def _stand_by(self) -> None:
        while not is_cancelled():
            await self._ask()
            if self.term:
                return
            await asyncio.sleep(RETRY_S)

    async def _lead(self, work: Callable[[], Coroutine[None, None, object]]) -> None:
        self._refused.clear()
        log.warning("leads from now on, term %d", self._standing.term)
        self._metrics.leads()
        working, keeping = asyncio.create_task(work()), asyncio.create_task(self._keep())
        try:
            await asyncio.wait((working, keeping), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                raise RuntimeError("the leader's work has ended by itself")
        finally:
            await _ended(working)
            await _ended(keeping)
            self._metrics.stands_by()

    async def _keep(self) -> None:
        """Renew the lease; returns when it is lost, which is said."""
        is_renewed = True
        while not is_cancelled():
            if self._refused.is_set() or not self.term:
                log.error("leads no longer, what it did is left to whoever leads next: %s", self._why_lost())
                self._standing = self._standing.stood_down()
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S if is_renewed else RETRY_S):
                    await self._refused.wait()
            is_renewed = await self._ask()

    def _why_lost(self) -> str:
        return self._failure or "its lease in Redis has ended or is another's"

    async def _ask(self) -> bool:
        """Ask for the lease, or for more of it; whether Redis has answered. A failure is logged once."""
        standing, asked_s = self._standing, self._clock()
        asked: list[Word] = [self.holder, standing.term, standing.newest_term, round(LEASE_S * 1000)]
        asked += [self._installation.id, self._other_installation]
        try:
            async with asyncio.timeout(standing.asking_timeout_s(asked_s)):
                term, is_ours, other = await self._ask_for(keys=[LEADER_KEY, TERM_KEY, INSTALLATION_KEY], args=asked)
        except (RedisError, OSError) as error:  # OSError: TimeoutError too
            if not self._is_known and (isinstance(error, _REFUSALS) or isinstance(error.__cause__, _REFUSALS)):
                raise RefusedError(
                    f"Redis refuses this controller: {error}. Check the user and the password in the URL, and that the "
                    "user may do what docs/redis.md lists"
                ) from error
            failure = f"Redis does not answer for the lease: {error or type(error).__name__}"
            if not self._failure:
                log.warning("%s", failure)
            self._failure = failure
            self._metrics.health.lease_asked(answered=False)
            return False
        self._failure, self._is_known = "", True
        self._metrics.health.lease_asked(answered=True)
        self._note_other(other.decode() if isinstance(other, bytes) else other)
        self._standing = standing.after(Answer(int(term), bool(is_ours)), asked_s)
        return True

    def _note_other(self, installation: str) -> None:
        """Whose Redis it is, if not ours; said when that is new."""
        if installation and installation != self._other_installation:
            log.error(
                "this controller may not lead: Redis belongs to installation %s, and the state folder %s is "
                "installation %s. Its API keys and limits would take the place of those in force. Give it the state "
                "folder (on Kubernetes: the volume claim) of the controllers that led before, or a Redis of its own. "
                "To have Redis belong to this folder on purpose, stop the other controllers and delete the key %s",
                installation, self._installation.state_dir, self._installation.id, INSTALLATION_KEY,
            )  # fmt: skip
        self._other_installation = installation or self._other_installation
        self._metrics.health.kept_out(
            "Redis belongs to another state folder, the log says which" if installation else ""
        )

    async def _give_back(self) -> None:
        """Let the next one lead at once; a failure leaves that to the lease's end."""
        with suppress(RedisError, OSError, NotLeadingError):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await self.write(("DEL", LEADER_KEY))
        self._standing = self._standing.stood_down()


async def _ended(task: asyncio.Task[object] | asyncio.Task[None]) -> None:
    """Cancel it and wait; what it had to say is logged unless it was raised already."""
    if task.cancel():
        await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()):
            log.error("at the end of a term: %s", error)


def _script(name: str) -> str:
    return (files("ratelimit") / "scripts" / f"{name}.lua").read_text("utf-8")
