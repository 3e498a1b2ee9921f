"""How the weights move: the optimiser, how long, what DeepSpeed shards, and the workers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hone.recipe.settings import Fraction, Settings


class OptimSettings(Settings):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate. 1e-4 to 1e-3 suits LoRA, 1e-5 to 5e-5 full fine-tuning, 1e-3 to 1e-2 ia3, prompt and prefix."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of a new head, which often learns well at ten times that of the body; by default the same."""
    layerwise_lr_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer learns at this times the rate of the one above it, 0.8 to 0.95 for full fine-tuning; 1 for all alike."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    """Of matrices; biases and the weights of norms are left alone."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """How the learning rate falls to 0 after warm-up; wsd holds it and falls at the end (https://arxiv.org/abs/2404.06395)."""
    warmup_ratio: Fraction = 0.06
    """Share of all steps over which the learning rate rises from 0."""
    decay_ratio: Fraction = 0.2
    """Share of all steps over which wsd falls."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 leaves them alone."""


class TrainSettings(Settings):
    """How long, in what portions, and how often to look."""

    num_train_epochs: float = Field(default=3, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps, whatever num_train_epochs says."""
    global_batch_size: int = Field(default=32, ge=1)
    """Rows per optimiser step over all workers, the same at any number of workers."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Most rows of one forward pass on one worker (or on those that share a sequence); gradient accumulation makes up the rest. Packed: as
    many tokens as so many of the longest rows have. auto takes as many as fit by what `hone plan` estimates."""
    packing: bool = True
    """Lay rows end to end instead of padding them to one length, where task and model allow it. No token attends to another row's, and
    losses are the same; only the time differs."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between validations; by default once an epoch. There is always one before the first step and one at the end."""
    save_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that a restarted run resumes from; by default as often as validation."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on a GPU that has it and fp32 elsewhere. fp16 is for GPUs without bf16 (V100, T4): the loss is scaled so that small
    gradients do not vanish, and a step whose gradients overflow is done again with half the scale; it needs ZeRO."""
    label_smoothing_factor: Fraction = 0.0
    """Share of each target's probability that is spread over all classes or tokens (https://arxiv.org/abs/1512.00567)."""
    dropout: Fraction | None = None
    """Dropout of the base's layers, in place of what its configuration says."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Validate and publish a moving average of the weights that train, which each step moves by 1 - this; 0.99 to 0.999."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = Field(default=0, ge=0, lt=2**31)

    @property
    def portion(self) -> int:
        """Rows of one forward pass, once it is decided; a prepared job's always is."""
        assert self.micro_batch_size != "auto", "decided when a run is prepared"
        return self.micro_batch_size


class CheckpointSettings(Settings):
    """State that a run goes on from after a loss, at any number of workers. How often: `train.save_steps`."""

    keep_last: int = Field(default=2, ge=1)
    """How many are kept, beside that of the best validation."""
    uri: str | None = None
    """Folder or object store for them, in which each run has its own; by default the run folder. Such as `s3://bucket/path` or `gs://...`;
    a store that is not Amazon's as `s3://bucket/path?endpoint_override=host:9000&scheme=http`, or by AWS_ENDPOINT_URL. Keys are never in
    it: they are where the SDKs look for them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...), on every node."""


class TrackSettings(Settings):
    """Services that are told of a run beside TensorBoard, whose files are always in the run folder. Where they are and as whom is said by
    their own environment variables (WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI), where the command runs."""

    to: list[Literal["wandb", "mlflow"]] = Field(default=[])
    """Each needs its extra: `pip install 'hone[wandb]'`, `pip install 'hone[mlflow]'`."""
    project: str = Field(default="hone", min_length=1)
    """Project of Weights & Biases, and experiment of MLflow."""


class ZeroSettings(Settings):
    """What DeepSpeed shards over the workers (https://arxiv.org/abs/1910.02054)."""

    stage: Literal[0, 1, 2, 3, "auto"] = 2
    """0 nothing, 1 optimiser state, 2 and gradients, 3 and weights; auto the one that `hone plan` recommends."""
    offload_optimizer: bool | Literal["nvme"] = False
    """Keep the optimiser's state in the machine's memory (true) and update weights there: for stages 1 to 3, where a GPU is too small. nvme
    keeps it in files under nvme_path, for stage 3, where the memory is too small as well."""
    offload_param: bool | Literal["nvme"] = False
    """Keep the frozen and trained weights there as well, and bring up each layer when it is needed: for stage 3. nvme reads each from a
    file under nvme_path, at every use."""
    stage3_max_live_parameters: int = Field(default=1_000_000_000, ge=1)
    """Elements of weights that a worker may hold gathered at stage 3, those that are fetched before their use among them: fewer take less
    memory and wait more. DeepSpeed's own default."""
    stage3_max_reuse_distance: int = Field(default=1_000_000_000, ge=0)
    """A weight that is used again within so many elements stays gathered at stage 3. DeepSpeed's own default; none does with offload_param
    nvme."""
    nvme_path: Path | None = None
    """A folder on each machine's own disk, for what is offloaded to nvme; a run's own folder in it goes when the run ends."""
    sub_group_size: int | None = Field(default=None, ge=1)
    """Elements whose optimiser state is updated at once at stage 3; from NVMe, that many are in memory four times in fp32. DeepSpeed's own
    default is 1e9, and that of hone 5e7 with nvme."""

    @model_validator(mode="after")
    def _can_offload(self) -> "ZeroSettings":
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("zero.offload_optimizer needs zero.stage 1, 2 or 3; stage 0 shards and moves nothing")
        if self.offload_param and self.stage not in (3, "auto"):
            raise ValueError("zero.offload_param needs zero.stage 3, which brings weights up layer by layer")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ValueError(f"zero.offload_optimizer nvme needs zero.stage 3, and this is {self.stage}; true goes with 1 and 2")
        if ("nvme" in (self.offload_optimizer, self.offload_param)) != (self.nvme_path is not None):
            raise ValueError(
                "zero.offload_optimizer nvme or zero.offload_param nvme, and zero.nvme_path, the folder on each machine's disk, go together"
            )
        return self


class ScalingSettings(Settings):
    """Workers and what each of them gets, as Ray Train's ScalingConfig."""

    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """How many; or [fewest, most], to go on with as many as there is room for when machines go and come."""
    sequence_parallel_size: int = Field(default=1, ge=1)
    """So many workers share each packed sequence, a slice each, where one cannot hold a row's context (DeepSpeed Ulysses,
    https://arxiv.org/abs/2309.14509). num_workers is a multiple of it, and so are the base's attention heads."""
    use_gpu: bool | Literal["auto"] = "auto"
    """auto takes one GPU a worker where the cluster has any."""
    resources_per_worker: dict[str, float] | None = None
    """Such as {CPU: 4, GPU: 1}; by default one CPU, and one GPU where GPUs are used."""
    wait_for_nodes_s: float = Field(default=0, ge=0)
    """How long to wait for an autoscaling cluster to grow before giving up."""
    resize_every_s: float = Field(default=60, gt=0)
    """How often to look whether there is room for more workers; each change costs a restart from the last checkpoint."""
    max_failures: int = Field(default=2, ge=0)
    """How often the workers are restarted from the last checkpoint after one is lost."""

    @property
    def fewest(self) -> int:
        """Workers without which a run waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Workers that a run takes where there is room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def most_groups(self) -> int:
        """Groups of workers among which the rows of a step are shared out, at most; without sequence parallelism, workers."""
        return self.most // self.sequence_parallel_size

    @property
    def workers(self) -> str:
        """How many, as people say it."""
        return str(self.most) if self.most == self.fewest else f"{self.fewest} to {self.most}"

    @model_validator(mode="after")
    def _is_a_range(self) -> "ScalingSettings":
        if self.fewest > self.most:
            raise ValueError(f"scaling.num_workers [{self.fewest}, {self.most}]: the first is the fewest, the second the most")
        size = self.sequence_parallel_size
        for count in (self.fewest, self.most):
            if count % size:
                raise ValueError(f"scaling.num_workers {count} is no multiple of scaling.sequence_parallel_size {size}")
        return self


class PreferenceSettings(Settings):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290), for the task preference."""

    beta: float = Field(default=0.1, gt=0)
    """How much it costs to move away from the base."""
