"""Cross entropy of a linear head without ever holding all its logits.

For a large vocabulary the logits, not the weights, fill the memory: 4,096 targets by 150,000 tokens are 2.4 GB in fp32, and as much
again for their gradient. Here they are made for a few targets at a time, and the gradient with respect to the hidden states (and to the
head, where it trains) is taken at once, so the backward pass computes nothing twice. As in Liger Kernel
(https://arxiv.org/abs/2410.10989), in plain torch.
"""

from typing import Any

import torch
from torch.nn.functional import linear

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""fp32 logits at a time: what stays in a core's cache, and what keeps a GPU busy."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, *, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of `softmax(hidden @ weight.T + bias)` at the targets, and how many are the likeliest.

    Args:
        hidden: [targets, width].
        weight: [vocabulary, width].
        bias: [vocabulary].
        targets: [targets] int64.
        label_smoothing: Share of each target's probability that is spread over the whole vocabulary.
    """
    loss, right = _LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing)  # type: ignore[no-untyped-call]
    return loss, right


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, smoothing: float
    ) -> Any:
        wanted = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        right = targets.new_zeros(())
        step = max(16, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // (4 * weight.shape[0]))
        for start in range(0, len(targets), step):
            part, target = hidden[start : start + step], targets[start : start + step, None]
            logits = linear(part, weight, bias).float()
            right += (logits.argmax(-1, keepdim=True) == target).sum()
            total = logits.logsumexp(-1, keepdim=True)
            loss += (total - (1 - smoothing) * logits.gather(1, target)).sum()
            if smoothing:
                loss -= smoothing * logits.mean(-1).sum()
            if not any(wanted):
                continue
            # Softmax minus one at the target (or what smoothing makes of that one), in place of the logits.
            logits.sub_(total).exp_().scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=logits.dtype))
            if smoothing:
                logits.sub_(smoothing / logits.shape[1])
            of_logits = logits.to(weight.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[start : start + step])
            if of_weight is not None:
                of_weight += of_logits.T @ part
            if of_bias is not None:
                of_bias += logits.sum(0)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if gradient is None else (gradient * outputs[0]).to(dtype) for gradient, dtype in gradients), None, None
