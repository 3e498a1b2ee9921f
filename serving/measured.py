"""What a replica tells of itself when it is asked: copies of its measures, and what is in its memory. Plain picklable values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.adapters import AdapterPool
from serving.contract import ServingEngine
from serving.engine.measures import Histogram
from serving.memory import AdapterMemory
from serving.metering import Meter, Sums


@dataclass(frozen=True)
class Measured:
    """One replica, since its start."""

    replica: str
    histograms: dict[str, Histogram]
    counters: dict[str, float]
    gauges: dict[str, float]
    adapters: dict[str, Sums] = field(default_factory=dict)
    """By `name@version`, or the base's name."""
    keys: dict[str, Sums] = field(default_factory=dict)
    """By `project/name`."""


def measured(replica: str, engine: ServingEngine, pools: Sequence[AdapterPool], memory: AdapterMemory, meter: Meter) -> Measured:
    """Copies of everything that a replica counts; names are those of the metrics, without `hone_`."""
    measures = engine.measures
    resident = [name for pool in pools for name in pool.resident]
    loads = Histogram()
    for pool in pools:
        loads.add(pool.load_seconds)
    return Measured(
        replica,
        histograms={
            "time_to_first_token_seconds": measures.time_to_first_token.copy(),
            "time_between_tokens_seconds": measures.time_between_tokens.copy(),
            "queue_wait_seconds": measures.queue_wait.copy(),
            "batch_rows": measures.batch_rows.copy(),
            "classify_batch_rows": measures.classify_rows.copy(),
            "adapter_load_seconds": loads,
        },
        counters={
            "prompt_tokens": measures.prompt_tokens,
            "cached_tokens": measures.cached_tokens,
            "completion_tokens": measures.completion_tokens,
            "answers": engine.completed,
            "adapter_memory_hits": memory.hits,
            "adapter_evictions": sum(pool.evicted for pool in pools),
            "adapter_refusals": sum(pool.refused for pool in pools),
        },
        gauges={
            "slots": engine.max_rows,
            "rows_running": engine.running,
            "rows_waiting": engine.waiting,
            "adapters_active": engine.active_adapters,
            "adapters_resident": len(resident),
            "adapters_in_memory": len(memory),
            "adapter_memory_bytes": memory.size,
            "prefix_blocks": engine.prefix_blocks,
            "usage_unwritten": meter.unwritten,
        },
        adapters=meter.adapters.copy(),
        keys=meter.keys.copy(),
    )
