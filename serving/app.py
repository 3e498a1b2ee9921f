"""`serving.app:build`: what Ray Serve imports, from `hone serve` or from a Serve configuration file.

Two deployments. The ingress holds no model: it validates, routes and formats, so a busy replica never delays a 404. Each replica holds the
base. Serve's HTTP server binds 127.0.0.1 unless told otherwise.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import ray
from fastapi import FastAPI
from grpc.aio import AioRpcError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from hone.recipe.serving import EngineName, VllmSettings
from hone.registry import Registry
from hone.storage import Home
from serving.access import Auth, KeyRing, StoreKeys
from serving.calls import (
    ChatCall,
    Classified,
    ClassifyCall,
    CompletionCall,
    EmbedCall,
    Embedded,
    Event,
    Failed,
    Status,
    TokenizeCall,
    Tokenized,
)
from serving.catalog import BaseDescription
from serving.disk import DISK_BYTES
from serving.engine.generation import PREFILL_TOKENS
from serving.engines import ROWS
from serving.errors import REPLICA_LOST, BusyError, UnavailableError
from serving.ingress import make_app
from serving.measured import Measured
from serving.priority import give_way
from serving.replica import SWITCH_S, Replica

INGRESS_REQUESTS = 4096
UPSCALE_S = 10.0
"""How long there are too many requests before a replica is added; from none to one there is no wait."""
MEASURED_WITHIN_S = 5.0
"""A replica that says nothing for so long is left out of the metrics."""


class ServeArgs(BaseModel):
    """Arguments of the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(min_length=1)
    """Base model: a Hugging Face folder, a hub name, or a published whole model `name@version`."""
    home: str | None = None
    """Home folder, whose registry is served; `$HONE_HOME`, else ./.hone."""
    revision: str | None = None
    """Hub revision of the base."""
    num_replicas: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = 1
    """How many; or (fewest, most), as many as the requests take. With fewest 0 the last one goes too when nobody asks, and the next request
    waits for the base to be loaded."""
    idle_s: float = Field(default=300, ge=0)
    """How long a replica is too many before it goes, where their number changes."""
    drain_s: float = Field(default=600, ge=0)
    """How long a replica that is to go may take for the answers that it has begun; it gets no more. After that it is ended."""
    engine: EngineName = "slots"
    """What makes the answers: hone's own slot engine, or vLLM (the extra hone[vllm], on NVIDIA GPUs)."""
    vllm: VllmSettings = VllmSettings()
    """What vLLM is told, where it is the engine."""
    max_rows: int | None = Field(default=None, ge=1)
    """Answers that one replica makes at once; more wait their turn. By default 32 by the slot engine, down to 16 where more would not all
    have the whole context, and 256 by vLLM. Where the number of replicas changes, one is added when each has as many; of a base whose
    answers take turns a replica makes 4 whatever is said here, so that 4 is worth saying."""
    max_context: int | None = Field(default=None, ge=8)
    """Tokens of prompt and answer together; by default as many as the base and the memory allow."""
    max_adapters: int = Field(default=64, ge=1)
    """Adapters that one replica keeps on the device that computes; one that is called when as many are in use waits."""
    adapter_memory: int | None = Field(default=None, ge=0)
    """Bytes of adapters that one replica keeps in the machine's memory, checked and ready; by default a tenth of what is free."""
    adapter_disk: str | None = None
    """Folder on the machine's own disk in which adapters are kept, where the registry is on another machine; replicas share it."""
    adapter_disk_bytes: int = Field(default=DISK_BYTES, ge=0)
    """How many bytes of them."""
    max_copies: int = Field(default=2, ge=0)
    """Copies of the base that one replica keeps, for adapters that cannot share a batch; each takes the base's memory once more. vLLM keeps
    none."""
    prefill_tokens: int = Field(default=PREFILL_TOKENS, ge=1)
    """Prompt tokens that are read between two tokens of the answers in the making."""
    prefix_tokens: int | None = Field(default=None, ge=0)
    """Tokens of earlier prompts and answers that one replica keeps for those that begin alike; 0 keeps none, by default as many as fit into
    a tenth of the free memory."""
    auth: Auth = "auto"
    """Who needs an API key. `auto`: everyone once the store has keys, and before that everyone who comes from another machine. `required`:
    everyone. `off`: nobody, though known keys keep their limits."""
    max_queued: int = Field(default=256, ge=0)
    """Requests that wait in a replica, and as many again before all replicas, before more are answered 429."""
    num_cpus: float = Field(default=1, ge=0)
    """CPU cores of one replica, and the threads that it computes with."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of one replica; by default one where the cluster has any, and as many as share its base under vLLM."""

    @model_validator(mode="after")
    def _fewest_first(self) -> "ServeArgs":
        if not isinstance(self.num_replicas, int) and self.num_replicas[0] > self.num_replicas[1]:
            raise ValueError(f"num_replicas: the fewest, {self.num_replicas[0]}, are more than the most, {self.num_replicas[1]}")
        return self


def build(args: ServeArgs) -> serve.Application:
    """The application: `serve.run(build(ServeArgs(base=...)))`, or `import_path: serving.app:build` with these args."""
    args = ServeArgs.model_validate(args)
    home = str(Home(args.home).root)  # resolved here: a replica has another working directory
    rows = args.max_rows or ROWS[args.engine]
    replica = serve.deployment(ServedReplica).options(
        name="Replica",
        **_how_many(args),
        request_router_config=RequestRouterConfig(request_router_class="serving.router.WarmRouter"),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=args.drain_s,
        # They wait in the replica, whose engine is fair among tenants: for those that wait at the ingress, Serve asks replicas again and
        # again whether there is room, which took half a core (docs/decisions/0022).
        max_ongoing_requests=rows + args.max_queued,
        max_queued_requests=args.max_queued,
        logging_config=LoggingConfig(enable_access_log=False),  # it writes a line of its own, and the ingress has the route's
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": _gpus(args)},
        health_check_period_s=5,
    )
    bound = replica.bind(
        base=args.base,
        home=home,
        revision=args.revision,
        engine=args.engine,
        vllm=args.vllm,
        max_rows=args.max_rows,
        max_context=args.max_context,
        max_adapters=args.max_adapters,
        max_copies=args.max_copies,
        adapter_memory=args.adapter_memory,
        adapter_disk=args.adapter_disk,
        adapter_disk_bytes=args.adapter_disk_bytes,
        prefill_tokens=args.prefill_tokens,
        prefix_tokens=args.prefix_tokens,
    )
    # Many more than the replicas take: waiting streams sit here, and those past `max_queued` are answered 429.
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(bound, home, args.auth, may_sleep=not isinstance(args.num_replicas, int) and args.num_replicas[0] == 0)


def _how_many(args: ServeArgs) -> dict[str, Any]:
    """Serve's settings for the number of replicas: one more where each has its slots full."""
    if isinstance(args.num_replicas, int):
        return {"num_replicas": args.num_replicas}
    fewest, most = args.num_replicas
    scaling = AutoscalingConfig(
        min_replicas=fewest,
        initial_replicas=max(fewest, 1),  # the ingress learns from it what is served
        max_replicas=most,
        target_ongoing_requests=args.max_rows or ROWS[args.engine],
        upscale_delay_s=UPSCALE_S,
        downscale_delay_s=args.idle_s,
        look_back_period_s=UPSCALE_S,
    )
    return {"autoscaling_config": scaling}


class ServedReplica(Replica):
    """A replica as Serve runs it: named as Serve names it, metered, and stopped when Serve lets go of it."""

    def __init__(self, **settings: Any) -> None:
        sys.setswitchinterval(SWITCH_S)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch takes memory in large pages: docs/decisions/0025
        give_way()
        super().__init__(**settings, name=serve.get_replica_context().replica_id.unique_id, is_metered=True)

    def __del__(self) -> None:
        if hasattr(self, "_meter"):  # the last that is made: without it, the base could not be loaded, and Serve is told that
            self.stop()


def _gpus(args: ServeArgs) -> float:
    if args.num_gpus is not None:
        return args.num_gpus
    if args.engine == "vllm":
        return args.vllm.tensor_parallel_size
    return 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0


class Ingress:
    """The HTTP application, in front of the replicas."""

    def __init__(self, replica: DeploymentHandle, home: str, auth: Auth, *, may_sleep: bool) -> None:
        give_way()
        opened = Home(home)
        self._app = make_app(ServeBackend(replica, may_sleep=may_sleep), Registry(opened), KeyRing(StoreKeys(opened.store_url), auth=auth))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


class ServeBackend:
    """Replicas behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle, *, may_sleep: bool) -> None:
        """`may_sleep` says that there may be no replica, and that to ask for its health is no reason for one."""
        self._handle, self._may_sleep = handle, may_sleep
        # Past Ray's object store, which took more computing than the rest of a message's way (docs/decisions/0022). Not for whole answers:
        # Serve takes those for queued until they are there.
        self._streaming = handle.options(stream=True, _by_reference=False, request_serialization="pickle", response_serialization="pickle")
        self._description: BaseDescription | None = None

    async def describe(self) -> BaseDescription:
        if self._description is None:
            self._description = await self._ask("describe")
        return self._description

    async def status(self) -> Status:
        if not self._may_sleep:
            asked: Status = await self._ask("status")
            return asked
        said = await self._everyone("status")  # a request that is routed would wake a replica
        return next((status for status in said if isinstance(status, Status)), Status(0, 0, 0, [], []))

    async def generate(self, call: ChatCall | CompletionCall) -> AsyncIterator[list[Event]]:
        with _serves_errors():
            async for events in self._streaming.generate.remote(call):
                yield events

    async def answer(self, call: ChatCall | CompletionCall) -> list[Event]:
        events: list[Event] = await self._ask("answer", call)
        return events

    async def classify(self, call: ClassifyCall) -> Classified | Failed:
        result: Classified | Failed = await self._ask("classify", call)
        return result

    async def embed(self, call: EmbedCall) -> Embedded | Failed:
        result: Embedded | Failed = await self._ask("embed", call)
        return result

    async def tokenize(self, call: TokenizeCall) -> Tokenized | Failed:
        result: Tokenized | Failed = await self._ask("tokenize", call)
        return result

    async def measured(self) -> list[Measured]:
        said = await self._everyone("measured")
        return [measured for answer in said if isinstance(answer, list) for measured in answer]

    async def _everyone(self, method: str) -> list[Any]:
        """What the replicas say that there are and that answer in time."""
        try:
            said: list[Any] = await self._handle.broadcast(method).results_async(timeout_s=MEASURED_WITHIN_S, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            said = []  # there is none, or one of them hangs; the ingress has numbers of its own
        return said

    async def _ask(self, method: str, *args: Any) -> Any:
        response = getattr(self._handle, method).remote(*args)
        with _serves_errors():
            try:
                return await response
            except asyncio.CancelledError:  # the client has gone; Serve tells only replicas that it streams from
                response.cancel()
                raise


@contextmanager
def _serves_errors() -> Iterator[None]:
    """What Serve raises, as what a caller is to know. Requests change nothing here, so one that was lost may be sent again."""
    try:
        yield
    except BackPressureError as error:
        raise BusyError(f"the server has all the requests that it holds; try again shortly ({error.message})") from None
    except (RayActorError, AioRpcError):
        raise UnavailableError("the replica that had this request is gone; send it again", None, REPLICA_LOST) from None
    except (DeploymentUnavailableError, ReplicaUnavailableError) as error:
        raise UnavailableError(f"no replica can answer right now ({error.message}); try again shortly") from None
