"""Which replica takes a request: each GPU type its part of each kind of request, and there the least laden replica.

A request that replicas of kind g need u_g replica-seconds for goes to that kind in proportion to n_g/u_g: as much as
the kind could serve of such requests alone. Then every kind is loaded alike, with what requests are charged
(``capacity.fleet_cost_s``), whatever their mix. Turns are taken along a sequence that fills its range evenly, so parts
are kept closer than by lots. Each size of request has a sequence of its own, or large ones that come at a period like
the sequence's own would meet on one kind.

That rests on profiles. So a kind that holds more than half of what it may within its SLO counts for less, the fuller
the less, and one that is full gets nothing while another has room: where one does less than its profile says, its
requests stay longer, and others get the next ones. Below that nobody waits, and how long requests stay says more of the
GPU than of its load.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import Random
from typing import Generic, NamedTuple, Protocol, TypeVar

from serving.capacity import ReplicaGroup, RequestShape, replica_share

#: The part of what a kind of replica may hold from which on its requests are sent elsewhere.
HALF_FULL = 0.5
#: A kind's part is divided by its fullness to this power, from half full on. Tried with kinds 1.25 to 10 times slower
#: than told (``tests.bench.routing``): a lower one leaves them more, a higher one sends honest ones' requests away.
_RELIEF = 6
#: What the part of a kind that is full is multiplied with: no turns in practice, where another has room.
_LAST_RESORT = 1e-6
#: Of more replicas than this of one kind, the least laden of a few is taken.
_FEW = 64
_SAMPLE = 16
#: Multiples of the golden ratio, without their whole part, are the most even sequence that is computed by a sum.
_GOLDEN = 0.6180339887498949
#: Less than this of a cost or a share is what rounding has left.
_NOTHING = 1e-9


class Routable(Protocol):
    """What routing needs to know of a replica: where it is, and how many requests a second it can serve."""

    @property
    def url(self) -> str: ...
    @property
    def requests_per_s(self) -> float: ...


K = TypeVar("K")
R = TypeVar("R", bound=Routable)


class Alike(NamedTuple, Generic[R]):
    """Replicas of one pool that are of one kind (a group of one); ``kind`` is None where it is not known.

    Where there are several kinds, each has a replica, and serves something.
    """

    pool: str
    kind: ReplicaGroup | None
    replicas: Sequence[R]


class Load(NamedTuple):
    """What a request is expected to bring: ``sequences`` of one shape, and its cost, in any unit common to all."""

    shape: RequestShape
    sequences: int
    cost: float


class Place(NamedTuple, Generic[R]):
    """Where a request goes; it takes the ``share`` of what one such replica may hold at once."""

    among: Alike[R]
    replica: R
    cost: float
    share: float


class Router:
    """Sends the requests of one process, and knows what they take up.

    ``senders`` says how many such processes send to the same replicas alike. ``turn``, from 0 to 1, is where the
    sequences start, and the seed of what is left to chance: different processes start at different places.
    """

    def __init__(self, turn: float, senders: Callable[[], int]) -> None:
        self._start = turn
        self._turns: dict[tuple[str, int], float] = {}
        self._random = Random(turn).random  # noqa: S311 - what gets where is no secret
        self._senders = senders
        self._outstanding: defaultdict[str, float] = defaultdict(float)
        self._held: defaultdict[tuple[str, ReplicaGroup | None], float] = defaultdict(float)

    def choose(self, fleet: Sequence[Alike[R]], load: Load, exclude: Collection[str] = ()) -> Place[R] | None:
        """The place for a request, or ``None`` where every replica is excluded. It is not taken yet."""
        open_to = _without(fleet, exclude) if exclude else fleet
        if len(open_to) > 1:
            among, share = self._in_turn(open_to, load.shape)
        elif open_to:
            among, share = open_to[0], 0.0
        else:
            return None
        replica = self._least_laden(among.replicas, exclude)
        return Place(among, replica, load.cost, share * load.sequences) if replica else None

    def take(self, place: Place[R]) -> None:
        """A request is sent there."""
        self._outstanding[place.replica.url] += place.cost
        self._held[place.among.pool, place.among.kind] += place.share

    def leave(self, place: Place[R]) -> None:
        """It has ended."""
        _subtract(self._outstanding, place.replica.url, place.cost)
        _subtract(self._held, (place.among.pool, place.among.kind), place.share)

    def _least_laden(self, replicas: Sequence[R], exclude: Collection[str]) -> R | None:
        """The least laden of a few of many; of ever fewer as tries fail, since a dead one has the least load of all."""
        if len(replicas) > _FEW:
            draw, count = self._random, len(replicas)
            few = [replicas[int(draw() * count)] for _ in range(max(1, _SAMPLE // (1 + len(exclude))))]
            if found := least_laden([each for each in few if each.url not in exclude], self._outstanding):
                return found
        return least_laden([each for each in replicas if each.url not in exclude], self._outstanding)

    def _in_turn(self, fleet: Sequence[Alike[R]], shape: RequestShape) -> tuple[Alike[R], float]:
        """The kind whose turn it is, and the share of what one of its replicas may hold that a sequence takes."""
        senders, held = max(1, self._senders()), self._held
        reached, ends, shares = 0.0, list[float](), list[float]()
        for pool, kind, replicas in fleet:
            count = len(replicas)
            seconds, share = replica_share(kind, shape) if kind else (0.0, 0.0)
            full = senders * held.get((pool, kind), 0.0) / count
            part = count / ((seconds or 1.0) * max(full, HALF_FULL) ** _RELIEF)
            reached += part if full < 1 else part * _LAST_RESORT
            ends.append(reached)
            shares.append(share)
        at = min(bisect_right(ends, self._turn(fleet[0].pool, shape) * reached), len(fleet) - 1)
        return fleet[at], shares[at]

    def _turn(self, pool: str, shape: RequestShape) -> float:
        """The next turn of such requests; those of a size within a factor of four take turns together."""
        size = pool, (shape.input_tokens + shape.output_tokens).bit_length() // 2
        last = self._turns.get(size)
        if last is None:  # each sequence starts where one that goes through them all would have it
            last = self._start + len(self._turns) * _GOLDEN
        turn = self._turns[size] = (last + _GOLDEN) % 1.0
        return turn


def _without(fleet: Sequence[Alike[R]], excluded: Collection[str]) -> list[Alike[R]]:
    """The fleet less those replicas, and less the kinds that had no others; kinds of many keep theirs, for speed."""
    return [left for each in fleet if (left := _less(each, excluded)).replicas]


def _less(each: Alike[R], excluded: Collection[str]) -> Alike[R]:
    if len(each.replicas) > max(_FEW, 2 * len(excluded)):
        return each
    return each._replace(replicas=[replica for replica in each.replicas if replica.url not in excluded])


def _subtract(amounts: dict[K, float], name: K, amount: float) -> None:
    left = amounts.get(name, 0.0) - amount
    if left > _NOTHING:
        amounts[name] = left
    else:
        amounts.pop(name, None)


def least_laden(replicas: Iterable[R], outstanding: Mapping[str, float]) -> R | None:
    """The replica with the least outstanding cost for its capacity, or ``None`` if none serves anything.

    ``outstanding`` maps a replica's URL to the cost of the requests it holds, in any unit common to all. The cost of
    a request is the same on every replica, so dividing by ``requests_per_s`` sends work in proportion to capacity.
    Ties go to the replica with the larger capacity, then to the first named.
    """
    return min(
        (replica for replica in replicas if replica.requests_per_s > 0),
        key=lambda replica: (outstanding.get(replica.url, 0.0) / replica.requests_per_s, -replica.requests_per_s),
        default=None,
    )
