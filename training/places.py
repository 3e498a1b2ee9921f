"""Where a row of the prepared data stands in the user's own files."""

from collections.abc import Sequence

import numpy as np

from hone.data.gate import Look
from training.batches import Rows
from training.job import PreparedData
from training.token_rows import Shards


def places_of(data: PreparedData, numbers: Rows) -> list[str]:
    """File and line of rows, by their numbers over all shards. Reads what the gate saw, so it is for when something went wrong."""
    shards, looks = Shards(data.shards), [Look.load(folder) for folder in dict.fromkeys(shard.parent for shard in data.shards)]
    return [_place(looks, int(shards.value(number, "digest"))) for number in numbers.tolist()]


def listed(places: Sequence[str], shown: int = 5) -> str:
    """A few of them, for a message."""
    more = f" and {len(places) - shown} more" if len(places) > shown else ""
    return ", ".join(places[:shown]) + more


def _place(looks: Sequence[Look], digest: int) -> str:
    """Where the first row of that digest stands: another of the same digest is the same row."""
    found = ((look, np.flatnonzero(np.asarray(look.digests) == digest)) for look in looks)
    look, rows = next((look, rows) for look, rows in found if len(rows))
    return look.place(look.spot(int(rows[0])))
