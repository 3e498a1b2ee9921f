"""Which replica takes a request: the one that has its adapter already, unless others are much less busy.

Every adapter ranks the replicas by a hash of both names (rendezvous hashing, Thaler and Ravishankar 1998), so ingresses agree without
talking, and a replica that comes or goes changes the first choice of its own share of adapters alone. A replica is passed over while it has
more than a quarter above the mean of requests (consistent hashing with bounded loads, https://arxiv.org/abs/1608.01350): so a hot adapter
spreads over as many replicas as it needs, the same ones each time, and all the traffic of a base is shared evenly.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

T = TypeVar("T")

SLACK = 1.25
"""A replica takes so many times the mean of requests at most. Nearer to 1, adapters move more; farther away, some wait as others idle."""


def ranked(model: str, replicas: Sequence[T], *, name: Callable[[T], str], load: Callable[[T], int]) -> list[T]:
    """The replicas that may take a request for a model, first choice first; there is always one, since not all are above the mean.

    Args:
        model: As it is called.
        replicas: All that there are.
        name: Of a replica.
        load: Requests that it has.
    """
    most = math.ceil(SLACK * (sum(map(load, replicas)) + 1) / len(replicas))
    return [replica for replica in sorted(replicas, key=lambda each: _score(model, name(each)), reverse=True) if load(replica) < most]


def _score(model: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{model}\0{replica}".encode(), digest_size=8).digest()


class WarmRouter(RequestRouter):  # type: ignore[misc]
    """For `request_router_config` of a deployment whose methods take a call with a `model`."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas by rank; Serve takes the first that has room, and asks again after a while where none has."""
        if not candidate_replicas:
            return []
        model = getattr(pending_request.args[0], "model", None) if pending_request and pending_request.args else None
        if model is None:
            return [list(candidate_replicas)]
        known = self.replica_queue_len_cache
        chosen = ranked(
            model,
            candidate_replicas,
            name=lambda replica: replica.replica_id.unique_id,
            load=lambda replica: known.get(replica.replica_id) or 0,
        )
        return [*([replica] for replica in chosen), list(candidate_replicas)]
