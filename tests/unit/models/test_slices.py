"""Workers that share a sequence compute what one would: the same loss and gradients, each over its own slice."""

from typing import Any

import pytest
import torch

from models.slices import slice_of, why_not_sliced
from models.tasks import TASKS, Inputs
from tests.sliced import CASES, SIZES, found
from tests.unit.models.test_packing import NOT_PACKED, ragged_rows, tiny
from training.sequence import copies


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(tmp_path_factory.mktemp("sliced"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_over_slices_are_those_of_the_whole(looked_at: dict[str, Any], name: str, size: int) -> None:
    told = looked_at[name].get(str(size))
    if told is None:
        assert CASES[name][1]["num_attention_heads"] % size
        return
    far = told["far"]
    assert far == pytest.approx(dict.fromkeys(far, 0.0), abs=1e-5)
    assert told["tokens"] == [-(-told["of"] // size)], "each layer sees the slice alone"


@pytest.mark.parametrize("of", [2, 3, 4, 5, 50])
def test_slices_hold_every_token_and_target_once(of: int) -> None:
    whole = TASKS["chat"].collate(ragged_rows(), inputs=Inputs(0), packed=True)
    slices = [slice_of(whole, number=number, of=of, pad_token_id=0) for number in range(of)]
    tokens = whole["input_ids"].shape[1]
    width = -(-tokens // of)
    for name in ("input_ids", "position_ids"):
        assert {part[name].shape for part in slices} == {(1, width)}
        assert torch.equal(torch.cat([part[name] for part in slices], 1)[:, :tokens], whole[name])
    for name, place in (("predicted_at", "predicted_at"), ("last", "last")):
        assert torch.equal(torch.cat([part[name] + n * width for n, part in enumerate(slices)]), whole[place])
    for name in ("targets", "row_of_target"):
        assert torch.equal(torch.cat([part[name] for part in slices]), whole[name])
    bounds = slices[0]["cu_seq_lens_q"]
    assert torch.equal(bounds[: len(whole["cu_seq_lens_q"])], whole["cu_seq_lens_q"])
    assert int(bounds[-1]) == of * width, "attention sees the tokens that were added as a row of their own"


@pytest.mark.parametrize(
    ("heads", "kept", "size", "times"), [(4, 4, 2, 1), (4, 2, 2, 1), (4, 2, 4, 2), (4, 1, 4, 4), (6, 3, 2, 2), (12, 3, 4, 4)]
)
def test_key_value_heads_are_laid_down_as_often_as_workers_need_them(heads: int, kept: int, size: int, times: int) -> None:
    assert copies(heads, kept, size) == times


def test_a_model_that_cannot_be_cut_is_refused_with_the_reason() -> None:
    assert why_not_sliced(tiny("llama"), of=2) is None
    assert why_not_sliced(tiny("llama"), of=3) == "its 4 attention heads do not divide among 3 workers"
    assert "cannot be packed for gemma2" in str(why_not_sliced(tiny("gemma2", **NOT_PACKED["gemma2"]), of=2))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "(dynamic) follows from the longest position" in str(why_not_sliced(tiny("llama", rope_parameters=rope), of=2))
