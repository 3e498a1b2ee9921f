"""A running server from the outside: two scrapes of its /metrics, and what happened between them."""

import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.text import Text

from cluster.dashboard import open_url
from cluster.terminal import table
from hone.errors import ResourceError

Labels = tuple[tuple[str, str], ...]
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Scrape:
    """What a server said, and when."""

    at: float
    """By `time.monotonic()`."""
    samples: Mapping[str, Mapping[Labels, float]]
    """By name, and by labels in the order of their names."""

    def sum(self, name: str, **labels: str) -> float:
        """Over all series of a name that have these labels."""
        return sum(value for at, value in self.samples.get(name, {}).items() if labels.items() <= dict(at).items())

    def names(self, name: str, label: str) -> list[str]:
        """Values of a label."""
        return list(dict.fromkeys(dict(labels)[label] for labels in self.samples.get(name, {})))


@dataclass(frozen=True)
class Line:
    """One adapter, or one key."""

    name: str
    requests_per_s: float
    prompt_tokens_per_s: float
    completion_tokens_per_s: float
    requests: float
    """Since the replicas' start, as the next."""
    completion_tokens: float


@dataclass(frozen=True)
class Quantiles:
    """Of a histogram between two scrapes; None where nothing was measured."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True)
class Look:
    """A server between two scrapes."""

    seconds: float
    replicas: int
    requests_per_s: float
    errors_per_s: float
    """Answers with a status of 400 and above."""
    refused_per_s: float
    """Of those, 429 and 503."""
    in_flight: int
    prompt_tokens_per_s: float
    cached_share: float | None
    """Of prompt tokens that did not have to be read."""
    completion_tokens_per_s: float
    rows_running: int
    slots: int
    rows_waiting: int
    batch_rows: float | None
    """Mean of a pass."""
    time_to_first_token_s: Quantiles
    time_between_tokens_s: Quantiles
    queue_wait_s: Quantiles
    adapters_active: int
    adapters_resident: int
    adapter_loads: int
    adapter_evictions: int
    adapters: list[Line]
    """Busiest first."""
    keys: list[Line]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def scrape(url: str, *, key: str | None = None) -> Scrape:
    """Read /metrics.

    Raises:
        ResourceError: the server does not answer, or wants another key.
    """
    address = f"{url.rstrip('/')}/metrics"
    if not address.startswith(("http://", "https://")):
        raise ResourceError(f"{url!r} is no address of a server; write http://HOST:PORT")
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with open_url(request, timeout_s=TIMEOUT_S) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            hint = "; set HONE_API_KEY to a key with the scope metrics" if error.code in (401, 403) else ""
            raise ResourceError(f"{address} answers {error.code}{hint}") from None
    except (OSError, ValueError) as error:
        raise ResourceError(f"{address} does not answer ({getattr(error, 'reason', error)}); is `hone serve` running there?") from None
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return Scrape(time.monotonic(), samples)


def compare(before: Scrape, after: Scrape) -> Look:
    """What happened from one scrape to the next."""
    seconds = max(after.at - before.at, 1e-9)

    def grown(name: str, **labels: str) -> float:
        return _grown(before, after, name, **labels)

    def failed(*statuses: str) -> float:
        found = after.names("hone_http_requests_total", "status")
        return sum(grown("hone_http_requests_total", status=s) for s in found if s.startswith(statuses)) / seconds

    prompt, passes = grown("hone_prompt_tokens_total"), grown("hone_batch_rows_count")
    return Look(
        seconds=seconds,
        replicas=int(after.sum("hone_replicas")),
        requests_per_s=grown("hone_http_requests_total") / seconds,
        errors_per_s=failed("4", "5"),
        refused_per_s=failed("429", "503"),
        in_flight=int(after.sum("hone_http_requests_in_flight")),
        prompt_tokens_per_s=prompt / seconds,
        cached_share=grown("hone_cached_tokens_total") / prompt if prompt else None,
        completion_tokens_per_s=grown("hone_completion_tokens_total") / seconds,
        rows_running=int(after.sum("hone_rows_running")),
        slots=int(after.sum("hone_slots")),
        rows_waiting=int(after.sum("hone_rows_waiting")),
        batch_rows=grown("hone_batch_rows_sum") / passes if passes else None,
        time_to_first_token_s=_quantiles(before, after, "hone_time_to_first_token_seconds"),
        time_between_tokens_s=_quantiles(before, after, "hone_time_between_tokens_seconds"),
        queue_wait_s=_quantiles(before, after, "hone_queue_wait_seconds"),
        adapters_active=int(after.sum("hone_adapters_active")),
        adapters_resident=int(after.sum("hone_adapters_resident")),
        adapter_loads=int(after.sum("hone_adapter_load_seconds_count")),
        adapter_evictions=int(after.sum("hone_adapter_evictions_total")),
        adapters=_lines(before, after, "adapter", seconds),
        keys=_lines(before, after, "key", seconds),
    )


def drawn(look: Look, *, url: str, rows: int) -> RenderableType:
    """For a terminal."""
    memory = f"{look.adapters_active} active, {look.adapters_resident} in memory"
    head = [
        ("requests", f"{look.requests_per_s:.1f}/s, {look.in_flight} in flight"),
        ("errors", f"{look.errors_per_s:.1f}/s, of them {look.refused_per_s:.1f}/s 429 or 503"),
        ("tokens", f"{look.completion_tokens_per_s:,.0f}/s made, {look.prompt_tokens_per_s:,.0f}/s of prompts{_share(look.cached_share)}"),
        ("rows", f"{look.rows_running} of {look.slots} slots, {look.rows_waiting} waiting{_mean(look.batch_rows)}"),
        ("first token", _shown(look.time_to_first_token_s)),
        ("between tokens", _shown(look.time_between_tokens_s)),
        ("waiting", _shown(look.queue_wait_s)),
        ("adapters", f"{memory}; {look.adapter_loads} loads, {look.adapter_evictions} evictions"),
    ]
    replicas = "1 replica" if look.replicas == 1 else f"{look.replicas} replicas"
    title = Text(f"{url}   {replicas}   last {look.seconds:.1f} s", style="bold")
    return Group(title, table(("", ""), head), _listed("ADAPTER", look.adapters[:rows]), _listed("KEY", look.keys[:rows]))


def _grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    """Of counters, series by series: one that is new or has begun anew has grown by all that it has."""
    earlier = before.samples.get(name, {})
    return sum(
        value - (earlier.get(at, 0.0) if earlier.get(at, 0.0) <= value else 0.0)
        for at, value in after.samples.get(name, {}).items()
        if labels.items() <= dict(at).items()
    )


def _lines(before: Scrape, after: Scrape, what: str, seconds: float) -> list[Line]:
    requests, tokens = f"hone_{what}_requests_total", f"hone_{what}_tokens_total"
    lines = []
    for name in after.names(requests, what):
        labels = {what: name}
        lines.append(
            Line(
                name,
                _grown(before, after, requests, **labels) / seconds,
                _grown(before, after, tokens, kind="prompt", **labels) / seconds,
                _grown(before, after, tokens, kind="completion", **labels) / seconds,
                after.sum(requests, **labels),
                after.sum(tokens, kind="completion", **labels),
            )
        )
    return sorted(lines, key=lambda line: (-line.completion_tokens_per_s, -line.requests_per_s, -line.completion_tokens, line.name))


def _quantiles(before: Scrape, after: Scrape, name: str) -> Quantiles:
    reached = {bound: _grown(before, after, f"{name}_bucket", le=bound) for bound in after.names(f"{name}_bucket", "le")}
    buckets = sorted((float(bound), count) for bound, count in reached.items())
    return Quantiles(quantile(buckets, 0.5), quantile(buckets, 0.99))


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Where `share` of the values of cumulative buckets (upper bound, count) end, as Prometheus's `histogram_quantile` guesses it: values
    are spread evenly in their bucket, and those past the last bound are at it."""
    if not buckets or not buckets[-1][1]:
        return None
    rank, low, below = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = (low if bound == float("inf") else bound), count
    return low


def _listed(what: str, lines: Sequence[Line]) -> RenderableType:
    columns = (what, "REQUESTS/S", "PROMPT TOKENS/S", "ANSWER TOKENS/S", "REQUESTS", "ANSWER TOKENS")
    cells = [
        (
            line.name,
            f"{line.requests_per_s:.1f}",
            f"{line.prompt_tokens_per_s:,.0f}",
            f"{line.completion_tokens_per_s:,.0f}",
            f"{line.requests:,.0f}",
            f"{line.completion_tokens:,.0f}",
        )
        for line in lines
    ]
    return table(columns, cells)


def _shown(quantiles: Quantiles) -> str:
    if quantiles.p50 is None or quantiles.p99 is None:
        return "-"
    return f"p50 {quantiles.p50 * 1000:,.0f} ms, p99 {quantiles.p99 * 1000:,.0f} ms"


def _share(value: float | None) -> str:
    return "" if value is None else f" ({value:.0%} kept)"


def _mean(value: float | None) -> str:
    return "" if value is None else f", {value:.1f} a pass"
