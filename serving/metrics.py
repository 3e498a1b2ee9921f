"""`/metrics`: what the ingress has counted and every replica has measured, as Prometheus reads it.

One address has the whole server, on one machine as on a cluster: the ingress asks every replica when it is asked itself. Series of
replicas bear a `replica` label, so one that is replaced is a new series and not a counter that falls.
"""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.engine.measures import Histogram
from serving.gate import Counts
from serving.measured import Measured
from serving.metering import Sums

CONTENT_TYPE = CONTENT_TYPE_LATEST

HISTOGRAMS = {
    "time_to_first_token_seconds": "From when the replica has a request to its first token; loading its adapter is in it.",
    "time_between_tokens_seconds": "Between two tokens of an answer.",
    "queue_wait_seconds": "What rows and inputs wait for the model.",
    "batch_rows": "Rows that one pass gives a token each.",
    "classify_batch_rows": "Inputs that one pass classifies or makes vectors of.",
    "adapter_load_seconds": "Loads of adapters to the device that did well, from memory or from files.",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens that the model began with; every row counts.",
    "cached_tokens": "Of those, the ones that were kept from earlier prompts and did not have to be read.",
    "completion_tokens": "Tokens that the model made.",
    "answers": "Answers that were made to their end.",
    "adapter_memory_hits": "Of those loads, the ones from memory.",
    "adapter_evictions": "Adapters that left the device to make room.",
    "adapter_refusals": "Loads of adapters that failed or were refused.",
}
GAUGES = {
    "slots": "Answers that the replica makes at once.",
    "rows_running": "Answers in the making.",
    "rows_waiting": "Rows and inputs that wait for the model.",
    "adapters_active": "Adapters of the answers in the making.",
    "adapters_resident": "Adapters on the device, and copies of the base with one.",
    "adapters_in_memory": "Adapters in the machine's memory, checked and ready.",
    "adapter_memory_bytes": "Bytes of those.",
    "prefix_blocks": "Blocks of 16 tokens that are kept from earlier prompts and answers.",
    "usage_unwritten": "Sums of usage that are not in the store yet; one that stays says that the store is out of reach.",
}


def exposition(counts: Counts, replicas: Sequence[Measured]) -> bytes:
    """All of it, as text."""
    registry = CollectorRegistry()
    registry.register(_Families(counts, replicas))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, counts: Counts, replicas: Sequence[Measured]) -> None:
        self._counts = counts
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        yield from self._of_ingress()
        for name, says in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"hone_{name}", says, labels=["replica"])
            for each in self._replicas:
                _add(family, [each.replica], each.histograms[name])
            yield family
        for name, says in COUNTERS.items():
            yield _counter(name, says, ["replica"], (([each.replica], each.counters[name]) for each in self._replicas))
        for name, says in GAUGES.items():
            gauge = GaugeMetricFamily(f"hone_{name}", says, labels=["replica"])
            for each in self._replicas:
                gauge.add_metric([each.replica], each.gauges[name])
            yield gauge
        yield from self._of_usage("adapter", {each.replica: each.adapters for each in self._replicas})
        yield from self._of_usage("key", {each.replica: each.keys for each in self._replicas})

    def _of_ingress(self) -> Iterator[Metric]:
        requests = list(self._counts.requests.items())
        yield _counter("http_requests", "Requests that were answered.", ["route", "status"], ((list(who), n) for who, n in requests))
        seconds = HistogramMetricFamily("hone_http_request_seconds", "From a request to the end of its answer.", labels=["route"])
        for route, histogram in list(self._counts.seconds.items()):
            _add(seconds, [route], histogram)
        yield seconds
        yield GaugeMetricFamily("hone_http_requests_in_flight", "Requests that are being answered, or wait.", self._counts.in_flight)
        yield GaugeMetricFamily("hone_replicas", "Replicas that say how they are.", len(self._replicas))

    def _of_usage(self, what: str, by_replica: dict[str, dict[str, Sums]]) -> Iterator[Metric]:
        sums = [(replica, name, each) for replica, names in by_replica.items() for name, each in names.items()]
        used = [(replica, name, each.used) for replica, name, each in sums]
        labels = ["replica", what]
        yield _counter(f"{what}_requests", f"Requests by {what}.", labels, (([r, name], each.requests) for r, name, each in used))
        tokens = (
            ([replica, name, kind], float(count))
            for replica, name, each in used
            for kind, count in (("prompt", each.prompt_tokens), ("cached", each.cached_tokens), ("completion", each.completion_tokens))
        )
        yield _counter(f"{what}_tokens", f"Tokens by {what}; `cached` are among `prompt`.", [*labels, "kind"], tokens)
        says = HISTOGRAMS["time_to_first_token_seconds"]
        waits = HistogramMetricFamily(f"hone_{what}_time_to_first_token_seconds", f"By {what}. {says}", labels=labels)
        for replica, name, each in sums:
            _add(waits, [replica, name], each.first_tokens)
        yield waits


def _counter(name: str, says: str, labels: list[str], values: Iterable[tuple[list[str], float]]) -> Metric:
    family = CounterMetricFamily(f"hone_{name}", says, labels=labels)
    for who, value in values:
        family.add_metric(who, value)
    return family


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    reached, buckets = 0, []
    for bound, count in zip([*map(str, map(float, histogram.bounds)), "+Inf"], histogram.counts, strict=True):
        reached += count
        buckets.append((bound, float(reached)))
    family.add_metric(labels, buckets, histogram.sum)
