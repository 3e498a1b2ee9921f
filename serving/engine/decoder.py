"""Forward passes of a causal model over the slot cache: prompts of new rows, then one token for every running row.

Both ask the model for what it documents: explicit position ids and a 4-D mask, which transformers passes on as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from serving.engine.cache import SlotCache
from serving.engine.lora import Mixer, RowPlan, Rows, Segments


class Decoder:
    """A causal model whose linear layers are wrapped by `mixer`."""

    def __init__(self, model: Any, mixer: Mixer) -> None:
        self.model = model
        self.mixer = mixer
        self.device: torch.device = model.device
        self._boolean_mask = model.config._attn_implementation == "sdpa"

    def prefill(self, cache: SlotCache, prompts: Sequence[Sequence[int]], rows: Rows, *, first: int) -> Tensor:
        """Read the prompts of new rows into the slots from `first`.

        Prompts are padded on the right: what a padding token writes lies past its row's last token, is never attended to, and is
        overwritten as the row goes on. Give rows sorted by adapter.

        Returns:
            [rows, vocabulary] float32: the logits after each prompt's last token.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(prompts), -1)
        cache.aim(first=first, positions=positions, width=longest)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        kept, index = torch.unique(last, return_inverse=True)
        mask = (positions[0][None, :] <= positions[0][:, None])[None, None]
        logits = self._forward(cache, ids, positions, mask, kept, Segments(list(rows)))
        return logits[torch.arange(len(prompts), device=self.device), index]

    def decode(self, cache: SlotCache, tokens: Sequence[int], lengths: Sequence[int], plan: RowPlan) -> Tensor:
        """Read one more token of each row in slots 0..n-1; `lengths` are the positions already filled, `plan` the rows' adapters.

        Returns:
            [rows, vocabulary] float32: the logits after that token.
        """
        positions = torch.tensor(lengths, device=self.device)[:, None]
        width = max(lengths) + 1
        cache.aim(first=0, positions=positions, width=width)
        mask = (torch.arange(width, device=self.device)[None, :] <= positions)[:, None, None, :]
        ids = torch.tensor(tokens, device=self.device)[:, None]
        return self._forward(cache, ids, positions, mask, 1, plan)[:, 0]

    def _forward(self, cache: SlotCache, ids: Tensor, positions: Tensor, mask: Tensor, kept: Tensor | int, plan: RowPlan) -> Tensor:
        if not self._boolean_mask:
            dtype = self.model.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill_(~mask, torch.finfo(dtype).min)
        with self.mixer.running(plan):
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=kept
            )
        logits: Tensor = out.logits
        return logits.float()
