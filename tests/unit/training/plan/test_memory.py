"""The formulas of what a rank holds, against numbers worked out by hand."""

import pytest
import torch

from training.plan.memory import CPU_PROCESS, FETCHED_AHEAD, HOST_PROCESS, Counts, Offload, count, memory
from training.plan.trace import Event, Need, Pass
from training.zero import LARGEST_BUCKET, WEIGHT_BUFFERS, bucket_elements, fit_buckets

NOTHING = Need(0, 0)
FP32 = Counts(total=1000, trained=1000, bytes_each=4, largest=300, kept_whole=100)
LORA = Counts(total=8_000_000_000, trained=20_000_000, bytes_each=2, largest=500_000_000, kept_whole=30_000_000, saved_by_one=True)
FULL = Counts(total=8_000_000_000, trained=8_000_000_000, bytes_each=2, largest=500_000_000, kept_whole=1_000_000)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "checkpoint"),
    [
        (0, 4000, 2 * 4000, 8 * 1000, 12 * 1000),  # no masters beside fp32 weights; a flat copy of the gradients is sent; rank 0 saves
        (1, 4000, 4000 + 1000 + 4000, 12 * 250, 12 * 250),
        (2, 4000, 1000 + 4000, 12 * 250, 12 * 250),
        # Shards, and beside them the whole of a model that is used again within so few elements.
        (3, 1000 + 4000, 1000 + 4000 + 4000, 8 * 250, 12 * 250),
    ],
)
def test_a_full_fine_tune_in_fp32_on_four_workers(stage: int, weights: int, gradients: int, optimizer: int, checkpoint: int) -> None:
    held = memory(FP32, stage, workers=4, activations=NOTHING, on_gpu=False)  # type: ignore[arg-type]
    assert (held.weights, held.gradients, held.optimizer, held.checkpoint) == (weights, gradients, optimizer, checkpoint)


def test_in_16_bits_masters_are_kept_at_every_stage_and_gradients_are_of_what_trains() -> None:
    held = memory(LORA, 0, workers=8, activations=NOTHING, on_gpu=True)
    assert held.optimizer == 12 * LORA.trained
    assert held.weights == 2 * LORA.total
    assert held.gradients == 2 * 2 * LORA.trained


@pytest.mark.parametrize(("counts", "bucket"), [(LORA, LORA.trained), (FULL, LARGEST_BUCKET)])
def test_a_bucket_is_what_deepspeed_is_told_to_make(counts: Counts, bucket: int) -> None:
    config = {"zero_optimization": {"stage": 2}}
    fit_buckets(config, counts.trained)
    assert config["zero_optimization"]["reduce_bucket_size"] == bucket == bucket_elements(counts.trained)
    held = memory(counts, 2, workers=8, activations=NOTHING, on_gpu=True)
    assert held.gradients == 2 * (bucket + counts.trained // 8)


def test_stage_3_gathers_what_deepspeed_is_told_to_keep_and_no_more_than_there_is() -> None:
    held = memory(LORA, 3, workers=8, activations=NOTHING, on_gpu=True)
    assert held.weights == 2 * (LORA.total // 8 + LORA.kept_whole + LORA.largest + LORA.most_gathered // 2 + FETCHED_AHEAD)
    small = Counts(total=1000, trained=1000, bytes_each=4, largest=600, kept_whole=900)
    assert memory(small, 3, workers=2, activations=NOTHING, on_gpu=False).weights == 4 * (500 + 1000)


def test_on_a_gpu_offloading_moves_bytes_to_the_machine() -> None:
    for stage in (1, 2, 3):
        there = memory(FULL, stage, workers=8, activations=NOTHING, on_gpu=True)  # type: ignore[arg-type]
        moved = memory(FULL, stage, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(optimizer=True))  # type: ignore[arg-type]
        assert moved.optimizer == 0
        assert there.total - moved.total == (12 + 2) * FULL.trained // 8
    # The state, gradients in 16 bits and in fp32 for the step, and the copy that a checkpoint is written from.
    assert moved.host == HOST_PROCESS + (12 + 2 + 4 + 12) * FULL.trained // 8
    both = memory(FULL, 3, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(optimizer=True, param=True))
    assert moved.weights - both.weights == both.host - moved.host == 2 * FULL.total // 8


def test_what_cannot_be_moved_at_a_stage_stays() -> None:
    assert memory(FULL, 2, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(param=True)) == memory(
        FULL, 2, workers=8, activations=NOTHING, on_gpu=True
    )


def test_from_nvme_four_buffers_of_a_sub_group_are_in_memory_and_no_copy_for_a_checkpoint() -> None:
    there = memory(FULL, 3, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(optimizer=True))
    swapped = memory(FULL, 3, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(optimizer=True, swapped_at_once=1_000_000))
    part, at_once = -(-FULL.trained // 8), 1_000_000 + -(-FULL.largest // 8)
    assert at_once < part
    assert swapped.total == there.total, "on the GPU nothing is other"
    in_files = 12 * part + 4 * part + 12 * part  # moments and masters, the gradients' fp32 copy, the copy for a checkpoint
    assert there.host - swapped.host == in_files - 16 * at_once
    small = memory(FULL, 3, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(optimizer=True, swapped_at_once=10**12))
    assert there.host - small.host == in_files - 16 * part, "no buffer is larger than all there is"


def test_weights_on_nvme_take_buffers_in_memory_and_no_shard() -> None:
    there = memory(FULL, 3, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(param=True))
    swapped = memory(FULL, 3, workers=8, activations=NOTHING, on_gpu=True, offload=Offload(param=True, weights_at_once=1_000_000))
    written = 1_000_000 * 8 + FULL.largest
    assert written < FULL.trained
    assert swapped.total == there.total, "on the GPU nothing is other"
    assert there.host - swapped.host == 2 * (FULL.total // 8 - WEIGHT_BUFFERS * -(-FULL.largest // 8) - written)
    cpu = [memory(FP32, 3, workers=2, activations=NOTHING, on_gpu=False, offload=Offload(param=True, weights_at_once=n)) for n in (0, 1)]
    assert cpu[0].weights - cpu[1].weights == 4 * (FP32.total // 2 - WEIGHT_BUFFERS * -(-FP32.largest // 2) - 2 - FP32.largest)


def test_on_a_cpu_offloading_saves_nothing() -> None:
    plain = memory(FP32, 3, workers=2, activations=NOTHING, on_gpu=False)
    moved = memory(FP32, 3, workers=2, activations=NOTHING, on_gpu=False, offload=Offload(optimizer=True, param=True))
    assert moved.total - plain.total == 4 * 500 + 4 * 500  # masters that are copies, and fp32 gradients for the step
    assert plain.host == moved.host == 0


def test_an_adapter_is_saved_by_one_rank_and_on_a_gpu_from_the_machines_memory() -> None:
    assert memory(LORA, 2, workers=8, activations=NOTHING, on_gpu=False).checkpoint == 12 * LORA.trained
    on_gpu = memory(LORA, 3, workers=8, activations=NOTHING, on_gpu=True)
    assert on_gpu.checkpoint == 0
    assert on_gpu.host == HOST_PROCESS + 12 * LORA.trained


def test_weights_are_counted_module_by_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5, bias=False))
    model[1].weight.requires_grad_(False)
    counts = count(model, dtype=torch.float32, kept_whole=100)
    assert (counts.total, counts.trained, counts.largest, counts.kept_whole) == (320, 220, 220, 20 + 100)


def test_only_malloc_keeps_what_is_given_back() -> None:
    need = Need(live=100 * 2**20, taken=400 * 2**20)
    on_cpu, on_gpu = (memory(FP32, 2, workers=2, activations=need, on_gpu=on_gpu) for on_gpu in (False, True))
    assert on_gpu.allocator == 0
    assert on_cpu.allocator > on_cpu.activations
    parts = (on_cpu.weights, on_cpu.gradients, on_cpu.optimizer, on_cpu.activations, on_cpu.checkpoint, on_cpu.allocator)
    assert on_cpu.total == sum(parts) + CPU_PROCESS


def test_a_pass_is_at_its_highest_before_it_gives_back() -> None:
    events = (Event(1, 10), Event(2, 20), Event(1, 0), Event(3, 5), Event(2, 0), Event(3, 0))
    assert Pass(events, flops=0).need == Need(live=30, taken=30)
    assert Pass((*events, Event(4, 31)), flops=0).need == Need(live=31, taken=66)
