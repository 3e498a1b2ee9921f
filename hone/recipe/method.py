"""Ways of fine-tuning: what each of them can be told. `hone methods` says which goes with which task."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from hone.recipe.settings import Fraction, Settings

Modules = Literal["all-linear"] | list[str]


class GradualUnfreezing(Settings):
    """Train the top layers alone at first, and take one more from above at a time (https://arxiv.org/abs/1801.06146)."""

    start_layers: int = Field(default=0, ge=0)
    """Layers that train from the beginning, beside the head; by default the head alone, or the top layer where no head is new."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps until the next layer trains too; by default an epoch."""


class LoraMethod(Settings):
    """Low-rank adapters beside frozen weights (https://arxiv.org/abs/2106.09685), by PEFT."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1, le=512)
    """Rank of the update."""
    lora_alpha: float = Field(default=32, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    target_modules: Modules = "all-linear"
    """Which linear layers get an adapter: names (or endings of names) as PEFT takes them, or all but the head."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), which keeps high ranks from learning ever less (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Learn the length of each weight's columns apart from their direction (https://arxiv.org/abs/2402.09353). Slower; served merged."""
    init_lora_weights: bool | Literal["gaussian", "pissa"] = True
    """true begins as the base does; pissa begins from the base's own largest singular vectors (https://arxiv.org/abs/2404.02948)."""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)
    """How many times faster the second matrix learns than the first, 16 in the paper (LoRA+, https://arxiv.org/abs/2402.12354)."""
    load_in_4bit: bool = False
    """Keep the frozen weights in NF4 (QLoRA, https://arxiv.org/abs/2305.14314). On a GPU, with the extra hone[qlora]."""

    @model_validator(mode="after")
    def _variants_fit_together(self) -> "LoraMethod":
        if self.init_lora_weights == "pissa" and (self.use_dora or self.load_in_4bit):
            other = "use_dora" if self.use_dora else "load_in_4bit"
            raise ValueError(f"method.init_lora_weights pissa changes the frozen weights, which does not go with {other}")
        return self


class FullMethod(Settings):
    """Every weight trains; the result is a whole model."""

    type: Literal["full"] = "full"
    gradual_unfreezing: GradualUnfreezing | None = None


class FreezeMethod(Settings):
    """The embeddings and the lowest layers stay as they are, the rest trains; the result is a whole model."""

    type: Literal["freeze"] = "freeze"
    freeze_embeddings: bool = True
    freeze_layers: Annotated[int, Field(ge=0)] | Fraction = 0.5
    """How many of the lowest layers stay, or which share of all."""
    gradual_unfreezing: GradualUnfreezing | None = None


class Ia3Method(Settings):
    """Learnt factors on keys, values and inner activations (https://arxiv.org/abs/2205.05638), by PEFT."""

    type: Literal["ia3"] = "ia3"
    target_modules: list[str] | None = None
    """Linear layers whose outputs are scaled; by default the attention's keys and values, wherever the base has them."""
    feedforward_modules: list[str] | None = None
    """Linear layers whose inputs are scaled; by default the last of each feed-forward block."""


class AdapterMethod(Settings):
    """Small bottleneck layers behind frozen ones (https://arxiv.org/abs/1902.00751)."""

    type: Literal["adapter"] = "adapter"
    bottleneck_size: int = Field(default=64, ge=1)
    """Width of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby puts one behind the attention and one behind the feed-forward block of each layer; pfeiffer only the second
    (https://arxiv.org/abs/2005.00247)."""
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    adapter_dropout: Fraction = 0.0
    target_modules: list[str] | None = None
    """Linear layers that get one behind them; by default those that end the blocks of `placement`."""


class PromptMethod(Settings):
    """Learnt vectors before the words of each row (https://arxiv.org/abs/2104.08691), by PEFT."""

    type: Literal["prompt"] = "prompt"
    num_virtual_tokens: int = Field(default=20, ge=1, le=1024)


class PrefixMethod(Settings):
    """Learnt keys and values before those of each layer (https://arxiv.org/abs/2101.00190), by PEFT."""

    type: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = Field(default=20, ge=1, le=1024)


def _method_type(value: Any) -> str:
    """Which method a section means; `type` may be left out where it is LoRA."""
    return str(value.get("type", "lora") if isinstance(value, dict) else getattr(value, "type", "lora"))


Method = Annotated[
    Annotated[LoraMethod, Tag("lora")]
    | Annotated[FullMethod, Tag("full")]
    | Annotated[FreezeMethod, Tag("freeze")]
    | Annotated[Ia3Method, Tag("ia3")]
    | Annotated[AdapterMethod, Tag("adapter")]
    | Annotated[PromptMethod, Tag("prompt")]
    | Annotated[PrefixMethod, Tag("prefix")],
    Discriminator(
        _method_type,
        custom_error_type="method_type",
        custom_error_message="method.type is one of lora, full, freeze, ia3, adapter, prompt, prefix",
    ),
]
