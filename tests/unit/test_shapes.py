"""What the GPU benchmark counts is what the models have."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import SHAPES, forward_flops, lora_parameters, training_flops

ROW = 4096


@pytest.mark.parametrize("name", SHAPES)
def test_the_operations_are_those_of_the_models_layers(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape.config(context=ROW)))
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        linear, _ = forward_flops(shape, row=ROW)
        assert linear == 2 * sum(layer.weight.numel() for layer in layers)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert lora_parameters(shape, rank=16) == trained


def test_what_torch_counts_is_what_is_written_out() -> None:
    """Forward and backward, on a row without a mask: torch counts every pair of tokens, and a causal model needs half of them."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, row = SHAPES["tiny"], 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape.config(context=row), attn_implementation="eager"))
    ids = torch.randint(shape.vocabulary, (1, row))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    linear, attention = forward_flops(shape, row=row)
    every_pair = attention * 2 * row / (row + 1)
    assert counter.get_total_flops() == pytest.approx(3 * row * (linear + every_pair), rel=0.01)


def test_an_8b_takes_48_gigaflops_a_token_and_lora_two_thirds_of_that() -> None:
    full, lora = (training_flops(SHAPES["8b"], method, row=ROW, rank=16) for method in ("full", "lora"))
    assert full == pytest.approx(6 * 7.5e9 + 12 * 32 * 4096 * ROW / 2, rel=0.01)  # 6 N and 12 L H T / 2: PaLM's appendix B, causal
    assert 0.66 < lora / full < 0.72


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_benchmark_says_so_and_stops() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no GPU here" in done.stderr
