"""Where a row of the prepared data stands in the user's own files."""

from collections.abc import Sequence

import numpy as np

from hone.data.gate import Look
from training.batches import Rows
from training.job import PreparedData
from training.token_rows import Shards


def places_of(data: PreparedData, numbers: Rows) -> list[str]:
    """File and line of rows, by their numbers over all shards. Reads what the gate saw, so it is for when something went wrong."""
    folders = list(dict.fromkeys(shard.parent for shard in data.shards))
    found: list[str] = []
    for number in numbers.tolist():
        first = 0
        for folder in folders:
            shards = Shards([shard for shard in data.shards if shard.parent == folder])
            if number < first + len(shards):
                look = Look.load(folder)
                found.append(_place(look, int(shards.value(number - first, "digest"))))
                break
            first += len(shards)
    return found


def listed(places: Sequence[str], shown: int = 5) -> str:
    """A few of them, for a message."""
    more = f" and {len(places) - shown} more" if len(places) > shown else ""
    return ", ".join(places[:shown]) + more


def _place(look: Look, digest: int) -> str:
    row = int(np.flatnonzero(np.asarray(look.digests) == digest)[0])
    return look.place(look.spot(row))
