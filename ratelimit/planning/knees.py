"""The knees that a plan needs, each found once; several at a time in processes of their own, where there are many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

from ratelimit.policy import Promise
from serving.capacity import InfeasibleSloError
from serving.operating import OperatingPoint, operating_point
from serving.profile import Profile

#: Starting processes takes as long as this many knees.
_FEW = 3
#: A knee takes seconds; all of them together that are not found by then never will be.
_TIMEOUT_S = 900.0


class KneeKey(NamedTuple):
    """What a knee is a function of."""

    profile: Profile
    promise: Promise


#: A knee and where it was found, or why there is none.
Found = OperatingPoint | str


def find_knees(keys: Iterable[KneeKey], on_found: Callable[[KneeKey], None]) -> Mapping[KneeKey, Found]:
    """The knee of each key, or why no load meets its promise; ``on_found`` is told as they come.

    Raises ``TimeoutError``.
    """
    wanted = list(dict.fromkeys(keys))
    found = {}
    for key, result in _one_by_one(wanted) if len(wanted) <= _FEW else _at_once(wanted):
        found[key] = result
        on_found(key)
    return found


def _one_by_one(wanted: list[KneeKey]) -> Iterator[tuple[KneeKey, Found]]:
    return ((key, _find(key)) for key in wanted)


def _at_once(wanted: list[KneeKey]) -> Iterator[tuple[KneeKey, Found]]:
    pool = ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), mp_context=get_context("spawn"))
    try:
        running: dict[Future[Found], KneeKey] = {pool.submit(_find, key): key for key in wanted}
        for done in as_completed(running, timeout=_TIMEOUT_S):
            yield running[done], done.result()
    except BaseException:  # also of whoever asks no more: what is still simulated is not waited for
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    # Unless it is waited for here, the interpreter's exit may find the pool's pipes half closed, and say so.
    pool.shutdown()


def _find(key: KneeKey) -> Found:
    try:
        return operating_point(key.profile, *key.promise)
    except InfeasibleSloError as error:
        return str(error)
