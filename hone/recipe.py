"""The recipe: every setting of a run, typed, with its unit and meaning beside it.

YAML and dotted overrides in, `Recipe` out; workers see only the resolved JSON. Keys are spelled as PEFT (`lora_alpha`), DeepSpeed
(`zero.stage`) and Ray (`num_workers`, `resources_per_worker`) spell them. A relative path means relative to the recipe file.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, ValidationError, model_validator

from hone.errors import RecipeError
from hone.ids import NAME_PATTERN

Name = Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Source = Annotated[str, StringConstraints(min_length=1)]
FindingKind = Literal[
    "leakage",
    "near_leakage",
    "exact_duplicates",
    "near_duplicates",
    "unknown_labels",
    "one_label",
    "email",
    "phone",
    "card",
    "secret",
]
Sources = Source | Annotated[list[Source], Field(min_length=1)]


class Settings(BaseModel):
    """A section of the recipe: unknown keys are refused, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class MixedSource(Settings):
    """A further source of training rows."""

    source: Sources
    """Files, folders, globs or URIs, as for `data.train`."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often an epoch sees each row: 0.5 sees one half of them, and the other half in the next epoch; 2 sees each twice."""
    columns: dict[str, str] | None = None
    """As `data.columns`, where these files differ from the others."""


class TextAugmentation(Settings):
    """Small changes to a text, other ones each time that it is seen (https://arxiv.org/abs/1901.11196)."""

    probability: Share = 0.5
    """Share of the texts that are changed."""
    word_dropout: Share = 0.1
    """Share of the words that are left out."""
    word_swap: Share = 0.1
    """Share of the words that change places with the next."""
    case_noise: Share = 0.05
    """Share of the words whose case changes."""


class AugmentSettings(Settings):
    """How training rows are changed each time they are seen; validation rows never are."""

    text: TextAugmentation | None = None
    """For the task text-classification."""


class DataSettings(Settings):
    """Where the rows are and how they become tokens."""

    train: Sources
    """Training rows: a file, a folder, a glob or an object store URI, or a list of them. JSON Lines, JSON, CSV, TSV, Parquet, Arrow or
    text, also compressed; the format of the rows is recognised by their columns."""
    validation: Sources | None = None
    """Validation rows, likewise. Without any, `validation_fraction` of the training rows is held out."""
    validation_fraction: Fraction = 0.05
    """Share of the rows of `train` held out when there is no validation file; 0 trains without validation."""
    stratify: bool = True
    """Hold out the same share of each class, where rows have one."""
    group_by: str | None = None
    """Column whose values are never on both sides: rows of one customer, one document, one patient."""
    folds: int | None = Field(default=None, ge=2, le=100)
    """Split the rows of `train` into so many folds and validate on one of them, instead of `validation_fraction`."""
    fold: int = Field(default=0, ge=0)
    """Which fold validates, from 0."""
    mix: list[MixedSource] = []
    """Further sources of training rows, each as often as its weight says."""
    retain: Sources | None = None
    """General data mixed in against forgetting, such as what the base was tuned on."""
    retain_fraction: Fraction = 0.1
    """Share of each epoch's rows that come from `retain`."""
    augment: AugmentSettings = AugmentSettings()
    max_length: int = Field(default=1024, ge=8)
    """Tokens per row; longer rows are cut at the end, and the run says how many were."""
    columns: dict[str, str] = {}
    """Names of columns that are called otherwise in the files: {text: review, label: stars}."""
    max_bad_fraction: Fraction = 0.0
    """Share of the rows that may be bad; they are left out and counted. By default a single one stops the run before it starts."""
    stop_on: list[FindingKind] = ["leakage"]
    """Findings that stop the run before a worker is asked for; the others are told. See `hone data check`."""
    near_duplicate_rows: int = Field(default=10_000, ge=0)
    """Rows among which near duplicates are looked for, at about a third of a millisecond each; 0 for none. `hone data check` without a
    recipe looks among more."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "DataSettings":
        if self.validation and self.folds:
            raise ValueError("data.folds splits the training rows, and data.validation names rows of its own; leave one of them out")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"data.fold {self.fold} is not one of data.folds {self.folds}; they count from 0")
        return self


class LoraMethod(Settings):
    """Low-rank adapters beside frozen weights (https://arxiv.org/abs/2106.09685), by PEFT."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1, le=512)
    """Rank of the update."""
    lora_alpha: float = Field(default=32, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter: names (or endings of names) as PEFT takes them, or all but the head."""


class FullMethod(Settings):
    """Every weight trains; the result is a whole model."""

    type: Literal["full"] = "full"


def _method_type(value: Any) -> str:
    """Which method a section means; `type` may be left out where it is LoRA."""
    return str(value.get("type", "lora") if isinstance(value, dict) else getattr(value, "type", "lora"))


Method = Annotated[
    Annotated[LoraMethod, Tag("lora")] | Annotated[FullMethod, Tag("full")],
    Discriminator(_method_type, custom_error_type="method_type", custom_error_message="method.type is one of lora, full"),
]


class OptimSettings(Settings):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate. 1e-4 to 1e-3 suits LoRA, 1e-5 to 5e-5 full fine-tuning."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 after warm-up."""
    warmup_ratio: Fraction = 0.06
    """Share of all steps over which the learning rate rises from 0."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 leaves them alone."""


class TrainSettings(Settings):
    """How long, in what portions, and how often to look."""

    num_train_epochs: float = Field(default=3, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps, whatever num_train_epochs says."""
    global_batch_size: int = Field(default=32, ge=1)
    """Rows per optimiser step over all workers, the same at any number of workers."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Most rows of one forward pass on one worker; gradient accumulation makes up the rest. Packed: as many tokens as so many of the
    longest rows have."""
    packing: bool = True
    """Lay rows end to end instead of padding them to one length, where task and model allow it. No token attends to another row's, and
    losses are the same; only the time differs."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between validations; by default once an epoch. There is always one before the first step and one at the end."""
    save_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that a restarted run resumes from; by default as often as validation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU that has it and fp32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = Field(default=0, ge=0, lt=2**31)


class ZeroSettings(Settings):
    """What DeepSpeed shards over the workers (https://arxiv.org/abs/1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 nothing, 1 optimiser state, 2 and gradients, 3 and weights."""


class ScalingSettings(Settings):
    """Workers and what each of them gets, as Ray Train's ScalingConfig."""

    num_workers: int = Field(default=1, ge=1)
    use_gpu: bool | Literal["auto"] = "auto"
    """auto takes one GPU a worker where the cluster has any."""
    resources_per_worker: dict[str, float] | None = None
    """Such as {CPU: 4, GPU: 1}; by default one CPU, and one GPU where GPUs are used."""
    wait_for_nodes_s: float = Field(default=0, ge=0)
    """How long to wait for an autoscaling cluster to grow before giving up."""
    max_failures: int = Field(default=2, ge=0)
    """How often the workers are restarted from the last checkpoint after one is lost."""


class LogUniform(Settings):
    """Between lower and upper, evenly in the exponent."""

    type: Literal["loguniform"]
    lower: float = Field(gt=0)
    upper: float


class Uniform(Settings):
    """Between lower and upper."""

    type: Literal["uniform"]
    lower: float
    upper: float


class RandInt(Settings):
    """A whole number from lower up to but not upper."""

    type: Literal["randint"]
    lower: int
    upper: int


class Choice(Settings):
    """One of the categories at random."""

    type: Literal["choice"]
    categories: list[Any] = Field(min_length=1)


class GridSearch(Settings):
    """Every value in turn; num_samples counts whole grids."""

    type: Literal["grid_search"]
    values: list[Any] = Field(min_length=1)


Distribution = Annotated[LogUniform | Uniform | RandInt | Choice | GridSearch, Field(discriminator="type")]


class AshaScheduler(Settings):
    """Asynchronous successive halving (https://arxiv.org/abs/1810.05934), counted in validations."""

    type: Literal["asha"] = "asha"
    grace_period: int = Field(default=1, ge=1)
    """Validations every trial is given."""
    reduction_factor: float = Field(default=3, gt=1)
    """At each rung, one trial in this many goes on."""


class SearchSettings(Settings):
    """What `hone tune` tries."""

    space: dict[str, Distribution] = Field(min_length=1)
    """Recipe key in dotted form -> where its value is drawn from, as Ray Tune names it."""
    num_samples: int = Field(default=8, ge=1)
    metric: str = "eval_loss"
    mode: Literal["min", "max"] = "min"
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """By default as many as the cluster holds."""
    scheduler: AshaScheduler = AshaScheduler()


class PublishSettings(Settings):
    """What happens to the result."""

    enabled: bool = True
    alias: Name | None = None
    """Alias moved to the new version once it is published."""


class Recipe(Settings):
    """One fine-tuning run."""

    name: Name
    """The adapter is published as NAME@1, NAME@2, ..."""
    task: Literal["chat", "text-classification"]
    base: str = Field(min_length=1)
    """Base model: a Hugging Face folder, or a hub name such as Qwen/Qwen3-0.6B."""
    revision: str | None = None
    """Hub revision of the base model."""
    data: DataSettings
    method: Method = LoraMethod()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    zero: ZeroSettings = ZeroSettings()
    scaling: ScalingSettings = ScalingSettings()
    search: SearchSettings | None = None
    publish: PublishSettings = PublishSettings()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Recipe":
        batch, workers = self.train.global_batch_size, self.scaling.num_workers
        if batch % workers:
            raise ValueError(
                f"train.global_batch_size {batch} does not divide among scaling.num_workers {workers}; use a multiple of {workers}"
            )
        if self.data.augment.text and self.task != "text-classification":
            raise ValueError(f"data.augment.text is for the task text-classification; a {self.task} row would learn the changed words")
        for key, domain in (self.search.space if self.search else {}).items():
            _check_search_key(key)
            if isinstance(domain, LogUniform | Uniform | RandInt) and domain.upper <= domain.lower:
                raise ValueError(f"search.space.{key}: upper {domain.upper} is not above lower {domain.lower}")
        return self

    def with_overrides(self, values: dict[str, Any]) -> "Recipe":
        """A copy with dotted keys set, checked like a recipe file.

        Raises:
            RecipeError: a key or value that a recipe file could not have.
        """
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            _set(tree, key, value)
        return parse_recipe(tree, where="overrides")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML (or resolved JSON) recipe and apply `key.path=value` overrides.

    Raises:
        RecipeError: the file cannot be read, or a line for each key that is wrong, with its line number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        tree = yaml.safe_load(text)
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values; this is {'empty' if tree is None else type(tree).__name__}")
    for override in overrides or []:
        key, value = parse_override(override)
        _set(tree, key, value)
        lines.pop(tuple(key.split(".")), None)
    return _absolute(parse_recipe(tree, where=str(path), lines=lines), path.resolve().parent)


def parse_recipe(tree: dict[str, Any], *, where: str, lines: dict[tuple[str, ...], int] | None = None) -> Recipe:
    """Check a tree of plain values.

    Raises:
        RecipeError: one line per wrong key, each with `where` and its line number if known.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, tree, where, lines or {}) for e in error.errors())) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `optim.learning_rate=2e-4` into its key and YAML value.

    Raises:
        RecipeError: no `=`, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override {text!r}: write KEY=VALUE, such as optim.learning_rate=2e-4")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override {text!r}: the value is not valid YAML") from None


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of the recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    """Paths in the recipe, made absolute against the recipe's own folder. A base that is no folder there is a hub name."""

    def absolute(path: str) -> str:
        return path if "://" in path else str((folder / Path(path).expanduser()).resolve())

    def all_absolute(sources: str | list[str] | None) -> str | list[str] | None:
        return [absolute(path) for path in sources] if isinstance(sources, list) else sources and absolute(sources)

    sources = {name: all_absolute(getattr(recipe.data, name)) for name in ("train", "validation", "retain")}
    mix = [mixed.model_copy(update={"source": all_absolute(mixed.source)}) for mixed in recipe.data.mix]
    data = recipe.data.model_copy(update={**sources, "mix": mix})
    looks_local = recipe.base.startswith((".", "/", "~")) or (folder / recipe.base).is_dir()
    base = absolute(recipe.base) if looks_local else recipe.base
    return recipe.model_copy(update={"data": data, "base": base})


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override {key!r}: {part!r} is {child!r}, which has no keys inside it")
        tree = child
    if last == "type" and tree.get(last) != value:
        tree.clear()  # the other type's keys mean nothing to this one
    tree[last] = value


def _key_lines(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line number (from 1) of each key of a YAML document."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            found[here] = key.start_mark.line + 1
            found |= _key_lines(value, here)
    return found


def _explain(error: Any, tree: dict[str, Any], where: str, lines: dict[tuple[str, ...], int]) -> str:
    """One line for one pydantic error: where, which key, what is wrong, what to do."""
    path = _keys_of(error["loc"], tree)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    place = f"{where}:{line}" if line else where
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        if path[-1] in _fields_at(path[:-1]):
            return f"{place}: {key}: does not go with the type chosen there; remove it"
        near = _nearest(path)
        return f"{place}: {key}: unknown key" + (f"; did you mean {near}?" if near else f"; known here: {', '.join(_fields_at(path[:-1]))}")
    if error["type"] == "missing":
        return f"{place}: {key}: required, and not there"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    return f"{place}: {key}: {message}{given}" if key else f"{place}: {message}{given}"


def _keys_of(loc: tuple[str | int, ...], tree: Any) -> tuple[str, ...]:
    """A pydantic location without the union branches it names, which are not keys of the file."""
    keys: list[str] = []
    for n, part in enumerate(loc):
        is_last = n == len(loc) - 1
        if isinstance(tree, dict) and (part in tree or is_last):
            tree = tree.get(part)
            keys.append(str(part))
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
            keys.append(str(part))
    return tuple(keys)


def _models_at(path: tuple[str, ...]) -> list[type[BaseModel]]:
    """The settings classes that may stand at a dotted path (several where the section is a union)."""
    models: list[type[BaseModel]] = [Recipe]
    for part in path:
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [model for annotation in annotations for model in _models_in(annotation)]
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is dict:
        return []
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _fields_at(path: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(field for model in _models_at(path) for field in model.model_fields))


def _nearest(path: tuple[str, ...]) -> str | None:
    """The known key most like an unknown one: first in its own section, then anywhere in the recipe."""
    here = difflib.get_close_matches(path[-1], _fields_at(path[:-1]), n=1, cutoff=0.6)
    if here:
        return ".".join((*path[:-1], here[0]))
    elsewhere = {key.rsplit(".", 1)[-1]: key for key in _all_keys()}
    close = difflib.get_close_matches(path[-1], elsewhere, n=1, cutoff=0.8)
    return elsewhere[close[0]] if close else None


def _all_keys(path: tuple[str, ...] = ()) -> list[str]:
    keys: list[str] = []
    for field in _fields_at(path):
        here = (*path, field)
        keys += [".".join(here), *_all_keys(here)]
    return keys


def _check_search_key(key: str) -> None:
    if key in _all_keys() and key.split(".")[0] in {"method", "optim", "train", "data", "zero"}:
        return
    near = difflib.get_close_matches(key, _all_keys(), n=1)
    hint = f"; did you mean {near[0]}?" if near else "; name a key of method, optim, train, data or zero"
    raise ValueError(f"search.space.{key}: not a recipe key that can be searched{hint}")
