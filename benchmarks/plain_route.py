"""What one writes without hone: Ray Train, transformers' Trainer and DeepSpeed, LoRA on rows of a JSON Lines file.

A script of its own, `python -m benchmarks.plain_route BASE ROWS MARK`; the file MARK appears when the first step is done, and then it ends.
"""

import json
import sys
from pathlib import Path


def loop(config: dict[str, str]) -> None:
    """What each worker runs. Ray sends it without what the class in it needs, so that is imported here."""
    from typing import Any

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(config["base"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [json.loads(line) for line in Path(config["rows"]).read_text().splitlines()]
    encoded = [tokenizer(f"{row['prompt']} {row['completion']}", truncation=True, max_length=64) for row in rows]
    dataset = [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in encoded]
    model: Any = AutoModelForCausalLM.from_pretrained(config["base"])
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))

    class Mark(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
            control.should_training_stop = True
            if state.is_world_process_zero:
                Path(config["mark"]).touch()

    arguments = TrainingArguments(
        output_dir=str(Path(config["mark"]).parent / "out"),
        per_device_train_batch_size=4,
        max_steps=400,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        deepspeed={
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
        },
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Mark()],
    ).train()


def main() -> None:
    """Two workers on this machine."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    base, rows, mark = sys.argv[1:]
    ray.init(address="local", log_to_driver=False)
    TorchTrainer(
        loop,
        train_loop_config={"base": base, "rows": rows, "mark": mark},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(Path(mark).parent / "ray")),
    ).fit()


if __name__ == "__main__":
    main()
