"""A loss far above those before it is told; noise and the fall at the beginning are not."""

import random

from training.spikes import FEWEST, LossWatch


def test_a_spike_is_told_and_noise_is_not() -> None:
    noise, watch = random.Random(0), LossWatch(spread=8)
    losses = [3.0 * 0.97**n + noise.gauss(0, 0.02) for n in range(100)]
    assert not any(watch.spike(loss) for loss in losses)
    assert watch.spike(losses[-1] + 2.0) == {"loss": round(losses[-1] + 2.0, 4), "median_before": round(sorted(losses[-50:])[25], 4)}
    assert not watch.spike(losses[-1])


def test_nothing_is_unusual_at_first_or_when_it_is_switched_off() -> None:
    watch, off = LossWatch(spread=8), LossWatch(spread=0)
    assert not any(watch.spike(loss) for loss in [1.0] * (FEWEST - 1) + [50.0])
    assert not any(off.spike(loss) for loss in [1.0] * 40 + [50.0])
