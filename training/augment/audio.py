"""Sounds with noise, at another loudness, a little earlier or later; and spectrograms with stripes hidden (SpecAugment)."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Pair = tuple[float, float]


def augment_waveform(
    samples: Array, rng: np.random.Generator, *, sampling_rate: int, noise_snr_db: Pair | None, gain_db: float, shift_s: float
) -> Array:
    """The sound [frames] as it might also have been recorded: moved, then with noise, then at another loudness.

    Args:
        samples: float32 [frames], full scale from -1 to 1.
        rng: What is drawn from.
        sampling_rate: Hz.
        noise_snr_db: Least and most dB by which the sound is louder than the white noise that is added, both as mean power over the whole
            row before it is moved; None adds none, and silence gets none.
        gain_db: Most dB by which it is made louder or softer. Nothing is clipped: what would exceed full scale (or the sound's own peak,
            where that already does) is made softer as a whole, noise and all, until it fits.
        shift_s: Most seconds by which it is moved, earlier or later, and half of its length at most. What leaves is lost, what is left
            open is silent.
    """
    if not len(samples):
        return samples
    made = _shifted(samples, rng, most=min(round(shift_s * sampling_rate), len(samples) // 2))
    if noise_snr_db is not None:
        power = float(np.mean(np.square(samples, dtype=np.float64)))
        amplitude = np.sqrt(power * 10 ** (-rng.uniform(*noise_snr_db) / 10))
        made = made + np.float32(amplitude) * rng.standard_normal(len(made), dtype=np.float32)
    if gain_db:
        made = made * np.float32(10 ** (rng.uniform(-gain_db, gain_db) / 20))
    peak, ceiling = float(np.abs(made).max()), max(1.0, float(np.abs(samples).max()))
    return made * np.float32(ceiling / peak) if peak > ceiling else made


def spec_augment(
    features: Array, rng: np.random.Generator, *, time_masks: int, time_mask_frames: int, freq_masks: int, freq_mask_bins: int, fill: float
) -> Array:
    """A spectrogram with some stripes hidden (https://arxiv.org/abs/1904.08779, without its warping of time).

    Args:
        features: float32 [frames, bins], time first. Whisper's are the other way round: give `features.T`, and turn back the result.
        rng: What is drawn from.
        time_masks: Stripes of whole frames; they may overlap.
        time_mask_frames: The most frames of one; any number from 0 is as likely.
        freq_masks: Stripes of whole bins.
        freq_mask_bins: The most bins of one, likewise.
        fill: What is put there. 0 is the mean of features that are normalised.
    """
    hidden = features.copy()
    for axis, stripes, most in ((0, time_masks, time_mask_frames), (1, freq_masks, freq_mask_bins)):
        length = features.shape[axis]
        for _ in range(stripes):
            width = int(rng.integers(min(most, length) + 1))
            start = int(rng.integers(length - width + 1))
            hidden.swapaxes(0, axis)[start : start + width] = fill
    return hidden


def _shifted(samples: Array, rng: np.random.Generator, *, most: int) -> Array:
    """By `most` samples at the most, later where that is positive."""
    by = int(rng.integers(-most, most + 1))
    moved = np.zeros_like(samples)
    moved[max(by, 0) : len(samples) + min(by, 0)] = samples[max(-by, 0) : len(samples) - max(by, 0)]
    return moved
