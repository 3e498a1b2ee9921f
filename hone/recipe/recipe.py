"""The recipe: every setting of a run, typed, with its unit and meaning beside it.

Keys are spelled as PEFT (`lora_alpha`), DeepSpeed (`zero.stage`) and Ray (`num_workers`, `resources_per_worker`) spell them. What cannot
work is refused here, before anything is read or started.
"""

import difflib
from typing import Literal

from pydantic import Field, model_validator

from hone.methods import METHODS, why_not
from hone.recipe.data import DataSettings
from hone.recipe.guard import GuardSettings, HealthSettings
from hone.recipe.keys import all_keys
from hone.recipe.method import LoraMethod, Method
from hone.recipe.publish import PublishSettings, gate_metrics
from hone.recipe.search import LogUniform, RandInt, SearchSettings, Uniform
from hone.recipe.serving import ServingSettings
from hone.recipe.settings import Name, Settings
from hone.recipe.train import (
    CheckpointSettings,
    OptimSettings,
    PreferenceSettings,
    ScalingSettings,
    TrackSettings,
    TrainSettings,
    ZeroSettings,
)
from hone.tasks import TASKS, TaskName


class Recipe(Settings):
    """One fine-tuning run."""

    name: Name
    """The adapter is published as NAME@1, NAME@2, ..."""
    task: TaskName
    """What it learns to do; `hone methods` says which methods go with it."""
    base: str = Field(min_length=1)
    """Base model: a Hugging Face folder, or a hub name such as Qwen/Qwen3-0.6B."""
    revision: str | None = None
    """Hub revision of the base model."""
    data: DataSettings
    method: Method = LoraMethod()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    guard: GuardSettings = GuardSettings()
    health: HealthSettings = HealthSettings()
    preference: PreferenceSettings = PreferenceSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    zero: ZeroSettings = ZeroSettings()
    scaling: ScalingSettings = ScalingSettings()
    search: SearchSettings | None = None
    publish: PublishSettings = PublishSettings()
    track: TrackSettings = TrackSettings()
    serving: ServingSettings = ServingSettings()

    @property
    def is_open(self) -> bool:
        """Whether it leaves something to the plan that is made when a run is prepared."""
        return "auto" in (self.zero.stage, self.train.micro_batch_size)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Recipe":
        _check_workers(self)
        _check_method(self)
        _check_augmentation(self)
        _check_guard(self)
        _check_gate(self)
        for key, domain in (self.search.space if self.search else {}).items():
            _check_search_key(key)
            if isinstance(domain, LogUniform | Uniform | RandInt) and domain.upper <= domain.lower:
                raise ValueError(f"search.space.{key}: upper {domain.upper} is not above lower {domain.lower}")
        return self


def allowed_stages(recipe: Recipe) -> list[Literal[0, 1, 2, 3]]:
    """The ZeRO stages under which the recipe can run at all, whatever it asks for."""
    if recipe.zero.offload_param or recipe.zero.offload_optimizer == "nvme":
        return [3]
    needs_zero = recipe.zero.offload_optimizer or recipe.train.precision == "fp16"
    stages: list[Literal[0, 1, 2, 3]] = [1, 2] if needs_zero else [0, 1, 2]
    return stages if _why_not_sharded(recipe) else [*stages, 3]


def _check_workers(recipe: Recipe) -> None:
    scaling, batch, size = recipe.scaling, recipe.train.global_batch_size, recipe.scaling.sequence_parallel_size
    groups = scaling.most_groups
    which = f"scaling.num_workers {groups}" if size == 1 else f"the {groups} groups of scaling.sequence_parallel_size {size} workers"
    if isinstance(scaling.num_workers, int) and batch % groups:  # an elastic run's steps may be uneven
        raise ValueError(f"train.global_batch_size {batch} does not divide among {which}; use a multiple of {groups}")
    if batch < groups:
        raise ValueError(f"train.global_batch_size {batch} is less than a row for each of {groups} {'workers' if size == 1 else 'groups'}")
    if size == 1:
        return
    if recipe.task not in SLICED_TASKS:
        raise ValueError(
            f"scaling.sequence_parallel_size cuts packed rows, for the tasks {' and '.join(SLICED_TASKS)}, and this is {recipe.task}"
        )
    if recipe.method.type in ("prompt", "prefix") or not recipe.train.packing:
        what = "train.packing is false" if not recipe.train.packing else f"with method {recipe.method.type} none are packed"
        raise ValueError(f"scaling.sequence_parallel_size cuts packed rows, and {what}")


SLICED_TASKS = ("chat", "completion")
"""Tasks whose loss is a sum over tokens, wherever they are; a preference is between answers as a whole."""


def _check_method(recipe: Recipe) -> None:
    reason = why_not(recipe.task, recipe.method.type)
    if reason:
        others = ", ".join(name for name in METHODS if not why_not(recipe.task, name))
        raise ValueError(f"method {recipe.method.type} does not go with task {recipe.task}: {reason}. What does: {others}")
    reason = _why_not_sharded(recipe)
    if (recipe.zero.stage == 3 or recipe.zero.offload_param) and reason:
        raise ValueError(reason)
    if recipe.zero.offload_optimizer == "nvme" and getattr(recipe.method, "gradual_unfreezing", None):
        raise ValueError("method.gradual_unfreezing empties the state of what thaws, in memory; use zero.offload_optimizer true")
    if recipe.zero.offload_param == "nvme" and recipe.train.ema_decay:
        raise ValueError("train.ema_decay reads every weight after each step; use zero.offload_param true, which keeps them in memory")
    if recipe.zero.stage == 0 and recipe.train.precision == "fp16":
        raise ValueError("train.precision fp16 needs zero.stage 1, 2 or 3: without ZeRO, DeepSpeed 0.19 does not scale the loss")
    if recipe.method.type == "prefix" and recipe.train.gradient_checkpointing:
        raise ValueError("train.gradient_checkpointing recomputes layers without the keys and values that method prefix puts before theirs")
    if recipe.preference != PreferenceSettings() and recipe.task != "preference":
        raise ValueError(f"preference: is for the task preference, and this is {recipe.task}")


def _why_not_sharded(recipe: Recipe) -> str | None:
    method = recipe.method
    if isinstance(method, LoraMethod) and (method.use_dora or method.load_in_4bit):
        key = "use_dora" if method.use_dora else "load_in_4bit"
        return f"method.{key} needs each weight whole, and zero.stage 3 shards them; use zero.stage 2"
    if recipe.guard.kl_penalty and not METHODS[method.type].keeps_base:
        return f"guard.kl_penalty with method {method.type} needs a second copy of the base; use zero.stage 2 or lower"
    return None


def _check_augmentation(recipe: Recipe) -> None:
    augment = recipe.data.augment
    if augment.text and recipe.task != "text-classification":
        raise ValueError(f"data.augment.text is for the task text-classification; a {recipe.task} row would learn the changed words")
    for kind, settings in (("image", augment.image), ("audio", augment.audio)):
        if settings and recipe.task != f"{kind}-classification":
            raise ValueError(f"data.augment.{kind} is for the task {kind}-classification, and this is {recipe.task}")


def _check_guard(recipe: Recipe) -> None:
    guard, data = recipe.guard, recipe.data
    metrics = ["eval_loss", *(f"eval_{name}" for name in TASKS[recipe.task].metrics)]
    _check_metric("guard", guard.metric, guard.mode, metrics, recipe.task)
    if recipe.search:
        _check_metric("search", recipe.search.metric, recipe.search.mode, [*metrics, *TRAINING_METRICS], recipe.task)
    if guard.early_stopping_patience and not data.validation and not data.validation_fraction and not data.folds:
        raise ValueError("guard.early_stopping_patience needs validation rows; set data.validation or data.validation_fraction")
    if guard.max_retain_loss_increase is not None and data.retain is None:
        raise ValueError("guard.max_retain_loss_increase is measured on data.retain, and there is none")
    if guard.max_retain_loss_increase is not None and recipe.task == "preference":
        raise ValueError("guard.max_retain_loss_increase: the loss of the task preference is relative to the base already; leave it out")
    if guard.kl_penalty and recipe.task == "preference":
        raise ValueError("guard.kl_penalty: the task preference has its own penalty towards the base, preference.beta")
    if guard.kl_penalty and data.retain and not data.retain_fraction:
        raise ValueError("guard.kl_penalty is on the rows of data.retain that are mixed in, and data.retain_fraction is 0")


def _check_gate(recipe: Recipe) -> None:
    gate, data = recipe.publish.gate, recipe.data
    if gate is None:
        return
    known = gate_metrics(recipe.task)
    for section in ("metrics", "no_worse_than_alias"):
        for name in getattr(gate, section):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"publish.gate.{section}: {name!r} is not measured by task {recipe.task}; {hint}")
    if (gate.metrics or gate.no_worse_than_alias) and not data.validation and not data.validation_fraction and not data.folds:
        raise ValueError("publish.gate needs validation rows to be measured on; set data.validation or data.validation_fraction")
    if gate.max_retain_loss_increase is not None and (data.retain is None or recipe.task == "preference"):
        raise ValueError("publish.gate.max_retain_loss_increase is measured on data.retain, of any task but preference; leave it out")


def _check_metric(section: str, metric: str, mode: str, metrics: list[str], task: str) -> None:
    if metric not in metrics:
        raise ValueError(f"{section}.metric {metric!r} is not measured by task {task}; there are {', '.join(metrics)}")
    is_loss = metric.endswith(("loss", "error", "kl", "increase"))
    if is_loss and mode == "max":
        raise ValueError(f"{section}.mode max would choose the highest {metric}; use min")
    if not is_loss and mode == "min":
        raise ValueError(f"{section}.mode min would choose the lowest {metric}; set {section}.mode: max")


TRAINING_METRICS = ("loss", "retain_loss", "retain_loss_increase", "retain_kl")
"""What a search may be judged by beside validation."""


def _check_search_key(key: str) -> None:
    known = all_keys(Recipe)
    if key in known and key.split(".")[0] in SEARCHED:
        return
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; name a key of {', '.join(SEARCHED)}"
    raise ValueError(f"search.space.{key}: not a recipe key that can be searched{hint}")


SEARCHED = ("method", "optim", "train", "data", "guard", "preference", "zero")
