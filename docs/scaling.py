"""The arithmetic behind docs/scaling.md, and its tables. `python -m docs.generate` writes them, tests/docs finds drift.

Sources: Rajbhandari et al., ZeRO (https://arxiv.org/abs/1910.02054), sections 3 and 7, for bytes a parameter and the volume of each stage;
Thakur et al. 2005 (https://doi.org/10.1177/1094342005051521) for what a ring moves: an all-reduce 2 (N - 1) / N times the data a rank, a
reduce-scatter or an all-gather half of it. When DeepSpeed reduces, as in its stage_1_and_2.py: stage 2 after each portion, 0 and 1 once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from training.health import every_s
from training.ledger import WRITES_A_STEP

START, END = "<!-- tables -->", "<!-- /tables -->"
WEIGHT = GRADIENT = 2
"""Bytes, bf16."""
OPTIMIZER = 12
"""Bytes: the fp32 weight and AdamW's two moments. A checkpoint holds the same."""
PORTIONS = 4
"""Forward and backward passes a step on each rank, in the tables."""
WORLDS = (8, 64, 1024)


@dataclass(frozen=True)
class Model:
    """A Llama."""

    name: str
    hidden: int
    key_value: int
    """Width of all key heads together."""
    intermediate: int
    layers: int
    vocabulary: int
    tied: bool = False
    """Whether the head is the embedding."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the linear weights of one layer."""
        h, kv, i = self.hidden, self.key_value, self.intermediate
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        layer = sum(a * b for a, b in self.shapes) + 2 * self.hidden
        return layer * self.layers + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def lora(self, r: int = 16) -> int:
        """Parameters of LoRA on every linear layer."""
        return sum(r * (a + b) for a, b in self.shapes) * self.layers


MODELS = (
    Model("1B", 2048, 512, 8192, 16, 128256, tied=True),
    Model("8B", 4096, 1024, 14336, 32, 128256),
    Model("70B", 8192, 1024, 28672, 80, 128256),
)


def sent(stage: int, *, parameters: int, trained: int, world: int, portions: int) -> float:
    """Bytes that each rank sends in one step."""
    once = (world - 1) / world
    gradients, weights = GRADIENT * trained, WEIGHT * trained
    if stage in (0, 1):  # an all-reduce; or a reduce-scatter, and the new weights back
        return once * (gradients + weights)
    if stage == 2:
        return once * (portions * gradients + weights)
    return once * portions * (2 * WEIGHT * parameters + gradients)  # weights come up forward and backward, the frozen ones too


def held(stage: int, *, parameters: int, trained: int, world: int) -> float:
    """Bytes of weights, gradients and optimiser that each rank holds; activations and buffers come on top."""
    weights = WEIGHT * parameters / (world if stage == 3 else 1)
    gradients = GRADIENT * trained / (world if stage >= 2 else 1)
    return weights + gradients + OPTIMIZER * trained / (world if stage >= 1 else 1)


def tables() -> str:
    """Markdown."""
    return "\n\n".join(
        [
            f"**GB that each rank sends a step, {PORTIONS} portions a step, 64 ranks**",
            _by_stage(lambda stage, parameters, trained: sent(stage, parameters=parameters, trained=trained, world=64, portions=PORTIONS)),
            "**GB of weights, gradients and optimiser on each rank, 64 ranks**",
            _by_stage(lambda stage, parameters, trained: held(stage, parameters=parameters, trained=trained, world=64)),
            "**GB on each rank at stage 3, full fine-tuning, by ranks**",
            _table(
                ("model", *map(str, WORLDS)),
                [(m.name, *(_gb(held(3, parameters=m.parameters, trained=m.parameters, world=world)) for world in WORLDS)) for m in MODELS],
            ),
            "**A checkpoint, and the bandwidth that writes it in a minute**",
            _table(
                ("model", "full, GB", "GB/s", "LoRA r=16, GB", "GB/s"),
                [
                    (m.name, *(_gb(value) for n in (m.parameters, m.lora()) for value in (OPTIMIZER * n, OPTIMIZER * n / 60)))
                    for m in MODELS
                ],
            ),
            "**What all ranks write into the run folder, at a step a second**",
            _table(
                ("ranks", "ledger, writes/s", "health, writes/s", "ledger files an attempt", "parts of a full checkpoint"),
                [(str(n), *(f"{rate:.0f}" for rate in writes(n)), f"{n:,}", f"{n:,}") for n in WORLDS],
            ),
        ]
    )


def writes(world: int, *, step_s: float = 1.0) -> tuple[float, float]:
    """Writes a second of all ranks: of the ledger, and of health."""
    held_steps = -(-world // WRITES_A_STEP)
    return world / held_steps / step_s, world / every_s(world, stall_s=45)


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    head, _, rest = page.partition(START)
    return f"{head}{START}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def _by_stage(amount: Callable[[int, int, int], float]) -> str:
    rows = []
    for model in MODELS:
        for what, trained in (("full", model.parameters), ("LoRA r=16", model.lora())):
            rows.append(
                (model.name, what, f"{trained / 1e6:,.0f} M", *(_gb(amount(stage, model.parameters, trained)) for stage in range(4)))
            )
    return _table(("model", "method", "trains", "stage 0", "stage 1", "stage 2", "stage 3"), rows)


def _gb(amount: float) -> str:
    return f"{amount / 1e9:,.3g}" if amount < 1e11 else f"{amount / 1e9:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
