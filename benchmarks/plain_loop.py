"""The loop that hone is held against: one process, ordinary torch, transformers and PEFT; nothing of hone's training, no Ray, no DeepSpeed.

    python -m benchmarks.plain_loop recipe.json     # prints the validation accuracy after each epoch, as a JSON list

Rows are shuffled, batched, padded and counted as a textbook would. Only the recipe is shared, so both have the same settings.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from hone.recipe import LoraMethod, Recipe

Batch = dict[str, torch.Tensor]


def main() -> None:
    """Train as the recipe says."""
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    print(json.dumps(train(recipe)))  # noqa: T201


def train(recipe: Recipe) -> list[float]:
    """Validation accuracy after each epoch."""
    torch.manual_seed(recipe.train.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    train_rows, validation_rows = _read(str(recipe.data.train)), _read(str(recipe.data.validation))
    labels = sorted({row["label"] for row in train_rows})

    def collate(rows: list[dict[str, str]]) -> tuple[Batch, torch.Tensor]:
        texts = [row["text"] for row in rows]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=recipe.data.max_length, return_tensors="pt")
        return dict(inputs), torch.tensor([labels.index(row["label"]) for row in rows])

    model = _model(recipe, n_labels=len(labels))
    loader: Any = DataLoader(train_rows, recipe.train.global_batch_size, shuffle=True, collate_fn=collate)
    optim, epochs = recipe.optim, int(recipe.train.num_train_epochs)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    steps = epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(steps * optim.warmup_ratio), steps)
    accuracy = []
    for _ in range(epochs):
        model.train()
        for inputs, targets in loader:
            loss: Any = torch.nn.functional.cross_entropy(model(**inputs).logits, targets)
            loss.backward()
            if optim.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(weights, optim.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accuracy.append(_accuracy(model, DataLoader(validation_rows, 64, collate_fn=collate)))
        print("epoch", len(accuracy), accuracy[-1], file=sys.stderr, flush=True)  # noqa: T201
    return accuracy


def _model(recipe: Recipe, *, n_labels: int) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(recipe.base, num_labels=n_labels)
    if not isinstance(recipe.method, LoraMethod):
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    lora = recipe.method
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.r,
        lora_alpha=int(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
    )
    return get_peft_model(model, config)


@torch.no_grad()
def _accuracy(model: Any, loader: Any) -> float:
    model.eval()
    right = [(model(**inputs).logits.argmax(-1) == targets).float() for inputs, targets in loader]
    return float(torch.cat(right).mean())


def _read(path: str) -> Any:
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
