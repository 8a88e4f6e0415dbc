"""The replicas to watch: those that a config names, and those that Kubernetes has for it at the moment."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from ratelimit.decided import Adopted
from ratelimit.discovered import Discovered, discovered
from ratelimit.publication import Publication
from serving.discovery import Discovery
from serving.endpointslices import Listing, Refusal
from serving.fleet import ReplicaSpec

log = logging.getLogger(__name__)

#: How long a controller that starts waits to be told the fleet by Kubernetes.
FIRST_LIST_TIMEOUT_S = 10.0
MOST_SAID = 20

StartDiscovery = Callable[[Callable[[], None]], Discovery]


class DiscoveryState(msgspec.Struct, frozen=True):
    """What a round tells of discovery: replicas by model, GPU type and profile; how old the newest word is.

    ``failed_since``: the failures since the state was asked for last.
    """

    replicas: Mapping[tuple[str, str, str], int]
    refused: int
    age_s: float
    failed_since: int


class FleetSpecs:
    """The replicas of each adopted config, as of the last ``look``: all of a round sees the same."""

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._before: dict[Listing, Publication | None] = {}
        self._unlisted: frozenset[Listing] = frozenset()
        self._found: list[tuple[Adopted, Discovered]] = []
        self._looked_at = -1
        self._failures = 0
        self._said: frozenset[Refusal] = frozenset()
        #: Another number whenever a look may have found another fleet.
        self.version = 0

    @property
    def is_unsure(self) -> bool:
        """Whether there are slices that were not listed yet, and nobody has said what was there ``before``."""
        return not self._unlisted <= self._before.keys()

    async def first_list(self) -> None:
        """Wait for the first word of Kubernetes, for so long and no longer."""
        if not await self._discovery.listed_once(FIRST_LIST_TIMEOUT_S):
            log.error(
                "Kubernetes has not told its EndpointSlices within %g s; the replicas of the limits in force are "
                "taken to be there until it does",
                FIRST_LIST_TIMEOUT_S,
            )

    def assume(self, published: Publication | None) -> None:
        """Take the replicas of these limits to be there, until their slices are listed."""
        self._before |= dict.fromkeys(self._unlisted - self._before.keys(), published)
        self._looked_at = -1

    def look(self, adopted: Sequence[Adopted]) -> None:
        """Follow what these configs discover, and find what there is of it now."""
        self._discovery.watch({each.listing for one in adopted for each in one.discover})
        known = [one for one, _ in self._found]
        if self._looked_at == self._discovery.version and [*map(id, known)] == [*map(id, adopted)]:
            return
        listed = self._discovery.slices()
        self._looked_at, self.version = self._discovery.version, self.version + 1
        self._unlisted = frozenset(each.listing for one in adopted for each in one.discover) - listed.keys()
        self._before = {each: known for each, known in self._before.items() if each in self._unlisted}
        self._found = [
            (one, discovered(one.discover, one.profiles, listed, self._before, {spec.url for spec in one.specs}))
            for one in adopted
        ]
        self._say({refusal for _, found in self._found for refusal in found.refused})

    def of(self, adopted: Adopted) -> tuple[ReplicaSpec, ...]:
        """All replicas of a config, those that it names first."""
        return (*adopted.specs, *self.discovered_of(adopted))

    def discovered_of(self, adopted: Adopted) -> tuple[ReplicaSpec, ...]:
        """The replicas of a config that Kubernetes has told of; none of a config that was not looked at."""
        return next((found.specs for one, found in self._found if one is adopted), ())

    def state(self) -> DiscoveryState:
        """What to tell of the config that was looked at first."""
        replicas: Counter[tuple[str, str, str]] = Counter()
        refused = 0
        for adopted, found in self._found[:1]:
            replicas.update((spec.model, spec.gpu, adopted.profiles[spec.profile].name) for spec in found.specs)
            refused = len(found.refused)
        failed, self._failures = self._discovery.failures - self._failures, self._discovery.failures
        return DiscoveryState(replicas, refused, self._discovery.age_s(), failed)

    async def stop(self) -> None:
        """Follow nothing any more."""
        await self._discovery.stop()

    def _say(self, refused: Collection[Refusal]) -> None:
        """Log each refusal once, while it lasts."""
        new = sorted(set(refused) - self._said)
        for each in new[:MOST_SAID]:
            log.warning("discovery leaves out %s: %s", each.what, each.why)
        if len(new) > MOST_SAID:
            log.warning("discovery leaves out %d more", len(new) - MOST_SAID)
        self._said = frozenset(refused)


def together(specs: Iterable[Iterable[ReplicaSpec]]) -> tuple[ReplicaSpec, ...]:
    """All of them, each URL once, as it is in the last."""
    return tuple({spec.url: spec for each in specs for spec in each}.values())
