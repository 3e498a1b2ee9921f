"""Shapes of Llama models, and how many floating point operations a token of training takes on one."""

from dataclasses import dataclass
from typing import Any, Literal

Method = Literal["full", "lora"]


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions; the weights are random."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    is_tied: bool
    """Whether the head multiplies by the embedding."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self, *, context: int) -> dict[str, Any]:
        """Arguments of `transformers.LlamaConfig`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.is_tied,
            "max_position_embeddings": context,
            "rope_theta": 500_000.0,
        }


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256, is_tied=True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128_256, is_tied=False),
    "tiny": Shape(64, 176, 2, 4, 2, 512, is_tied=True),
}
"""Of Llama 3.2 1B and Llama 3.1 8B (the latter's are in table 3 of https://arxiv.org/abs/2407.21783), and one to try the benchmark with."""


def forward_flops(shape: Shape, *, row: int) -> tuple[int, int]:
    """Of one token, on average over a row of so many: of the linear layers with the head, and of attention.

    A multiplication and an addition are two. The linear layers of a layer are queries and answers (hidden x hidden each), keys and values
    (hidden x key-value heads x head size each) and three of the feed-forward block. Attention is two products of a token with itself and
    all before it, (row + 1) / 2 on average. Norms, activations and the embedding's look-up are not counted.
    """
    width = shape.heads * shape.head_dim
    narrow = shape.key_value_heads * shape.head_dim
    layer = 2 * shape.hidden * width + 2 * shape.hidden * narrow + 3 * shape.hidden * shape.intermediate
    linear = 2 * (shape.layers * layer + shape.hidden * shape.vocabulary)
    attention = 2 * width * (row + 1) * shape.layers
    return linear, attention


def lora_parameters(shape: Shape, *, rank: int) -> int:
    """Of adapters on every linear layer but the head."""
    hidden, narrow = shape.hidden, shape.key_value_heads * shape.head_dim
    sides = 2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + shape.intermediate)
    return shape.layers * rank * sides


def training_flops(shape: Shape, method: Method, *, row: int, rank: int) -> int:
    """Of one token, forward and backward, as model FLOPs utilisation counts them (https://arxiv.org/abs/2204.02311, appendix B): what is
    computed a second time under gradient checkpointing does not count.

    Backward a linear layer takes as much as forward for the gradient of its input, and as much again for its weight's. A frozen weight
    has none, so LoRA takes 2 times the forward pass of the base's layers, 3 times attention's, and 6 for each parameter of its own.
    """
    linear, attention = forward_flops(shape, row=row)
    if method == "full":
        return 3 * (linear + attention)
    return 2 * linear + 3 * attention + 6 * lora_parameters(shape, rank=rank)
