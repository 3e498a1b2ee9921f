"""What a recipe is to run on: kinds of accelerators with their published figures, clusters as people write them, and prices.

The figures are in `hardware.yaml` and `prices.yaml` beside this file; either can be replaced by a file of the user's.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hone.errors import ResourceError

HERE = Path(__file__).parent
SPEC = re.compile(r"^(?:(\d+)x)?(\d+)x([A-Za-z][\w.-]*?)(?::(\d+(?:\.\d+)?)GiB)?$")
Positive = Annotated[float, Field(gt=0)]


class Kind(BaseModel):
    """One kind of accelerator."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_gib: Positive
    tflops: Positive
    """Dense, in bf16; of a CPU, of one core in fp32."""
    link_gbs: Positive
    """GB/s to the others of its node."""
    source: str = ""


class Hardware(BaseModel):
    """The table of kinds, and what is assumed of all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: dict[str, Kind]
    node_link_gbs: Positive
    utilisation: dict[str, Annotated[float, Field(gt=0, le=1)]]


class Prices(BaseModel):
    """What an hour of each kind costs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: str
    per_hour: dict[str, Annotated[float, Field(ge=0)]]


class Cluster(BaseModel):
    """Nodes alike, each with some accelerators of one kind."""

    model_config = ConfigDict(frozen=True)

    nodes: int
    per_node: int
    """Accelerators of a node; of a CPU cluster, workers that it has room for."""
    kind: str
    memory: int
    """Bytes that one worker may hold."""
    shares_memory: bool = False
    """Whether `memory` is that of a whole node, which its workers share."""
    host_memory: int | None = None
    """Bytes of a GPU node's own memory, which its workers share; None where that is not known."""

    @property
    def on_gpu(self) -> bool:
        return self.kind != "CPU"

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def memory_of_each(self, workers: int) -> int:
        """Bytes for each of so many workers."""
        return self.memory // self._of_a_node(workers) if self.shares_memory else self.memory

    def host_memory_of_each(self, workers: int) -> int | None:
        """Bytes of the machine's memory for each of so many workers on GPUs, where that is known."""
        return None if self.host_memory is None else self.host_memory // self._of_a_node(workers)

    def _of_a_node(self, workers: int) -> int:
        """How many of them are on the node that has the most: Ray fills one node before it takes another."""
        return min(workers, self.per_node)

    def __str__(self) -> str:
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.kind}"


def load_hardware(path: Path | None = None) -> Hardware:
    """The table of kinds. Raises ResourceError where a file of the user's cannot be used."""
    return Hardware.model_validate(_checked(path or HERE / "hardware.yaml", Hardware))


def load_prices(path: Path | None = None) -> Prices:
    """What an hour costs, by default an example. Raises ResourceError where a file of the user's cannot be used."""
    return Prices.model_validate(_checked(path or HERE / "prices.yaml", Prices))


def parse_cluster(spec: str, hardware: Hardware) -> Cluster:
    """`8xH100`, `2x8xA100-80GB` (nodes x accelerators x kind) or `4xCPU:16GiB` (workers, and the memory of each).

    Raises:
        ResourceError: not of that form, or of a kind that the table does not have.
    """
    found = SPEC.match(spec.strip())
    if not found:
        raise ResourceError(f"--cluster {spec!r}: write COUNTxKIND or NODESxCOUNTxKIND, such as 8xH100, 2x8xA100-80GB or 4xCPU:16GiB")
    nodes, count, name, memory = found.groups()
    kind = find_kind(name, hardware)
    if kind is None:
        raise ResourceError(f"--cluster {spec}: no kind {name!r}; known are {', '.join(hardware.kinds)}; add it to a --hardware file")
    if int(nodes or 1) < 1 or int(count) < 1:
        raise ResourceError(f"--cluster {spec}: there must be one accelerator at least")
    each = float(memory) if memory else hardware.kinds[kind].memory_gib
    return Cluster(nodes=int(nodes or 1), per_node=int(count), kind=kind, memory=int(each * 2**30))


def find_kind(name: str, hardware: Hardware) -> str | None:
    """The kind that a name means: as the table spells it, or as a driver or Ray does (`NVIDIA H100 80GB HBM3`, `A100-80G`)."""
    wanted = _plain(name)
    by_plain = {_plain(kind): kind for kind in hardware.kinds}
    if wanted in by_plain:
        return by_plain[wanted]
    inside = [kind for plain, kind in by_plain.items() if plain in wanted or wanted in plain]
    sized = [kind for kind in inside if kind.partition("-")[0].upper() in wanted.upper()]
    return max(sized or inside, key=len, default=None)


def _plain(name: str) -> str:
    short = re.sub(r"(?i)nvidia|tesla|sxm\d?|hbm\d?e?|[\s_-]", "", name)
    return re.sub(r"(?i)(\d+)gb?$", r"\1gb", short).lower()


def _checked(path: Path, model: type[BaseModel]) -> Any:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        model.model_validate(tree)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ResourceError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ResourceError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return tree
