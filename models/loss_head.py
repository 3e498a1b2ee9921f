"""A language model's head that answers with the loss of what it would have answered."""

from typing import Any, Self

import torch

from models.linear_cross_entropy import linear_cross_entropy


class LossHead(torch.nn.Linear):
    """A linear head with a second way to be called, so that its weight is only ever used in its own forward pass.

    DeepSpeed's ZeRO-3 has the weights of a module gathered during the module's own forward and backward pass. Whoever reads
    `head.weight` outside of it makes the weight a part of the module that asked: it is gathered as long as that one runs, and, where it
    is asked for after DeepSpeed has noted the order of modules, the run ends with a "tracing error".
    """

    @classmethod
    def of(cls, head: torch.nn.Linear) -> Self:
        """With the very parameters of `head`; `head` itself if it is one already."""
        if isinstance(head, cls):
            return head
        made = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        made.weight, made.bias = head.weight, head.bias
        return made.train(head.training)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None, *, label_smoothing: float = 0.0) -> Any:
        """Logits; or with targets their summed cross entropy and how many are the likeliest, as `linear_cross_entropy`.

        Args:
            hidden: [..., width]; with targets [targets, width].
            targets: [targets] int64.
            label_smoothing: See `linear_cross_entropy`.
        """
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, self.bias, targets, label_smoothing=label_smoothing)
