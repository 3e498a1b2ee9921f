"""The moving average is the recurrence, is put in and taken out again to the bit, and survives a checkpoint."""

from pathlib import Path

import torch

from training.ema import MovingAverage


def test_it_follows_the_recurrence_and_goes_in_and_out(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average, expected = MovingAverage([parameter], decay=0.9), torch.zeros(3)
    for done in range(1, 30):
        parameter.data += done
        average.update(done)
        decay = min(0.9, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * parameter.data
    now = parameter.detach().clone()
    with average.in_place():
        torch.testing.assert_close(parameter.data, expected)
    assert torch.equal(parameter.data, now)

    average.save(tmp_path, rank=0)
    again = MovingAverage([parameter], decay=0.9)
    again.load(tmp_path, rank=0)
    with again.in_place():
        torch.testing.assert_close(parameter.data, expected)
