"""The moving average is the recurrence, is put in and taken out again to the bit, and gives a checkpoint what it holds."""

import torch

from training.ema import MovingAverage


def test_it_follows_the_recurrence_and_goes_in_and_out() -> None:
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

    for start, part in average.parts():
        assert start == 0
        part.zero_()  # what a checkpoint puts there is what is in place then
    with average.in_place():
        assert not parameter.data.any()
    assert torch.equal(parameter.data, now)
