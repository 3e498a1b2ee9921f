"""Texts, pictures and sounds are changed by what was asked for, and by no more."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.augment.audio import augment_waveform, spec_augment
from training.augment.images import augment_image
from training.augment.text import augment_text

TEXT = " the quick  brown fox\n\njumps over a lazy dog \t and runs. "
WORDS = TEXT.split()
NO_TEXT = {"word_dropout": 0.0, "word_swap": 0.0, "case_noise": 0.0}
NO_IMAGE: dict[str, Any] = {
    "flip": 0.0,
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
}
NO_AUDIO: dict[str, Any] = {"sampling_rate": 16_000, "noise_snr_db": None, "gain_db": 0.0, "shift_s": 0.0}
NO_MASKS: dict[str, Any] = {"time_masks": 0, "time_mask_frames": 0, "freq_masks": 0, "freq_mask_bins": 0, "fill": 0.0}
share = st.floats(0, 1)
seeds = st.integers(0, 2**32)


def drawn(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def text(seed: int = 0, **changes: float) -> str:
    return augment_text(TEXT, drawn(seed), **{**NO_TEXT, **changes})


def image(picture: Image.Image, seed: int = 0, **changes: Any) -> Image.Image:
    return augment_image(picture, drawn(seed), **{**NO_IMAGE, **changes})


def waveform(samples: npt.NDArray[np.float32], seed: int = 0, **changes: Any) -> npt.NDArray[np.float32]:
    return augment_waveform(samples, drawn(seed), **{**NO_AUDIO, **changes})


def masked(features: npt.NDArray[np.float32], seed: int = 0, **changes: Any) -> npt.NDArray[np.float32]:
    return spec_augment(features, drawn(seed), **{**NO_MASKS, **changes})


def noisy_picture(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(drawn(7).integers(40, 120, (height, width, 3), dtype=np.uint8))


def tone(amplitude: float = 0.1, frames: int = 16_000) -> npt.NDArray[np.float32]:
    return (amplitude * np.sin(2 * np.pi * 440 * np.arange(frames) / 16_000)).astype(np.float32)


def pixels(picture: Image.Image) -> npt.NDArray[np.int64]:
    return np.asarray(picture).astype(np.int64)


def decibels(ratio: Any) -> float:
    return float(20 * np.log10(ratio))


def root_mean_square(samples: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


CHANGED: list[Callable[[int], Any]] = [
    lambda seed: text(seed, word_dropout=0.3, word_swap=0.3, case_noise=0.3),
    lambda seed: pixels(
        image(
            noisy_picture(),
            seed,
            flip=0.5,
            crop_scale=(0.3, 1),
            crop_ratio=(0.7, 1.4),
            brightness=0.3,
            contrast=0.3,
            saturation=0.3,
            hue=0.2,
        )
    ).tolist(),
    lambda seed: waveform(tone(), seed, noise_snr_db=(5, 20), gain_db=6, shift_s=0.1).tolist(),
    lambda seed: masked(np.ones((50, 20), np.float32), seed, time_masks=2, time_mask_frames=9, freq_masks=2, freq_mask_bins=5).tolist(),
]


@pytest.mark.parametrize("change", CHANGED, ids=["text", "image", "waveform", "spectrogram"])
def test_the_same_seed_gives_the_same_row_and_another_one_another(change: Callable[[int], Any]) -> None:
    assert change(3) == change(3)
    assert len({str(change(seed)) for seed in range(5)}) == 5


@given(st.text(max_size=40), seeds)
def test_without_any_strength_a_text_is_what_it_was(given_text: str, seed: int) -> None:
    assert augment_text(given_text, drawn(seed), **NO_TEXT) == given_text


def test_words_are_left_out_as_often_as_asked_and_the_others_keep_their_blanks() -> None:
    many = "\n".join("a b  c\td e f g h i j" for _ in range(300))
    left = augment_text(many, drawn(), **{**NO_TEXT, "word_dropout": 0.2})
    assert 0.17 < 1 - len(left.split()) / 3000 < 0.23
    pieces = set(re.findall(r"\s\S|^\S", left))
    assert pieces <= set(re.findall(r"\s\S|^\S", many)) | {left[0]}
    assert left.count("  ") == left.count("  c")


def test_one_word_stays_even_if_all_are_left_out() -> None:
    found = Counter(text(seed, word_dropout=1.0).strip() for seed in range(300))
    assert set(found) == set(WORDS)
    assert (text(word_dropout=1.0)[0], text(word_dropout=1.0)[-1]) == (" ", " ")


def test_exchanged_words_are_next_to_each_other_and_blanks_stay() -> None:
    for seed in range(50):
        made = text(seed, word_swap=0.3)
        assert re.findall(r"\s+", made) == re.findall(r"\s+", TEXT)
        places = [WORDS.index(word) for word in made.split()]
        assert sorted(places) == list(range(len(WORDS)))
        assert all(abs(place - n) <= 1 for n, place in enumerate(places))
    assert text(word_swap=1.0).split()[:4] == ["quick", "the", "fox", "brown"]


def test_the_case_of_as_many_words_is_changed_as_asked() -> None:
    many = "word Word WORD 12 " * 500
    made = augment_text(many, drawn(), **{**NO_TEXT, "case_noise": 0.4})
    changed = [(before, after) for before, after in zip(many.split(), made.split(), strict=True) if before != after]
    assert 0.36 < len(changed) / 1500 < 0.44
    assert {after for _, after in changed} == {"word", "Word", "WORD"}


@given(st.text(st.sampled_from("aB9.\n \t"), max_size=40), share, share, share, seeds)
def test_a_changed_text_is_never_empty_and_has_no_word_more(given_text: str, dropout: float, swap: float, case: float, seed: int) -> None:
    made = augment_text(given_text, drawn(seed), word_dropout=dropout, word_swap=swap, case_noise=case)
    before, after = (Counter(each.casefold().split()) for each in (given_text, made))
    assert after <= before
    assert bool(after) == bool(before)


@given(st.integers(1, 20), st.integers(1, 20), seeds)
@settings(deadline=None)
def test_without_any_strength_a_picture_is_what_it_was(width: int, height: int, seed: int) -> None:
    picture = noisy_picture(width, height)
    assert np.array_equal(pixels(image(picture, seed)), pixels(picture))


@pytest.mark.parametrize("ratio", [(0.75, 4 / 3), (1.0, 2.0), (0.5, 1.0), (1.2, 2.0)])
def test_the_whole_area_has_but_one_shape(ratio: tuple[float, float]) -> None:
    assert image(noisy_picture(), crop_ratio=ratio).size == (40, 30)


def test_pictures_are_mirrored_as_often_as_asked() -> None:
    picture = noisy_picture()
    mirrored = sum(np.array_equal(pixels(image(picture, seed, flip=0.3)), pixels(picture)[:, ::-1]) for seed in range(300))
    assert 65 < mirrored < 115
    assert np.array_equal(pixels(image(picture, flip=1.0)), pixels(picture)[:, ::-1])


def test_a_crop_is_a_part_of_the_picture_and_every_share_of_its_area_as_likely() -> None:
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    picture = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))  # each pixel says where it is
    shares, shapes, lefts = [], [], []
    for seed in range(400):
        made = pixels(image(picture, seed, crop_scale=(0.2, 0.8), crop_ratio=(0.75, 4 / 3)))
        height, width = made.shape[:2]
        left, top = made[0, 0, :2]
        assert np.array_equal(made, pixels(picture)[top : top + height, left : left + width])
        shares.append(width * height / 20_000)
        shapes.append(width / height / 2)
        lefts.append(left / max(1, 200 - width))
    assert 0.19 < min(shares) < 0.22 < 0.78 < max(shares) < 0.81
    assert np.histogram(shares, 6, (0.2, 0.8))[0].min() > 40
    assert 0.73 < min(shapes) < 0.8 < 1.25 < max(shapes) < 1.36
    assert 0.45 < np.mean(lefts) < 0.55


@given(st.integers(1, 30), st.integers(1, 30), st.tuples(share, share), st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), seeds)
@settings(deadline=None)
def test_a_crop_fits_into_every_picture(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], seed: int) -> None:
    low, high = sorted(max(each, 0.01) for each in scale)
    made = image(noisy_picture(width, height), seed, crop_scale=(low, high), crop_ratio=tuple(sorted(ratio)))
    assert 1 <= made.width <= width
    assert 1 <= made.height <= height


def test_brightness_multiplies_the_pixels() -> None:
    picture = noisy_picture()
    factors = [np.mean(pixels(image(picture, seed, brightness=0.4))) / np.mean(pixels(picture)) for seed in range(200)]
    assert 0.58 < min(factors) < 0.65 < 1.35 < max(factors) < 1.42
    made = pixels(image(picture, 1, brightness=0.4))
    assert np.abs(made - pixels(picture) * np.mean(made) / np.mean(pixels(picture))).max() < 1.5


def test_contrast_scales_the_differences_to_the_mean_grey() -> None:
    picture = noisy_picture()
    mean = np.asarray(picture.convert("L")).mean()
    for seed in range(20):
        made = pixels(image(picture, seed, contrast=0.5))
        factor = np.std(made) / np.std(pixels(picture))
        assert 0.49 < factor < 1.51
        assert np.abs(made - (mean + factor * (pixels(picture) - mean))).max() < 2


def test_saturation_scales_the_differences_to_each_pixels_grey() -> None:
    picture = noisy_picture()
    grey = np.asarray(picture.convert("L")).astype(float)[:, :, None]
    for seed in range(20):
        made = pixels(image(picture, seed, saturation=0.5))
        factor = np.std(made - grey) / np.std(pixels(picture) - grey)
        assert 0.45 < factor < 1.55
        assert np.abs(made - (grey + factor * (pixels(picture) - grey))).max() < 3
    without_colour = picture.convert("L").convert("RGB")
    assert np.array_equal(pixels(image(without_colour, saturation=0.9)), pixels(without_colour))


def test_hue_turns_colours_round_the_wheel_and_leaves_grey() -> None:
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    turns = [image(red, seed, hue=0.5).convert("HSV").getpixel((0, 0)) for seed in range(200)]
    assert all(abs(value - 200) <= 1 and saturation == 255 for _, saturation, value in turns)
    hues = [(hue + 128) % 256 - 128 for hue, _, _ in turns]
    assert min(hues) < -120
    assert max(hues) > 120
    few = [(image(red, seed, hue=0.1).convert("HSV").getpixel((0, 0))[0] + 128) % 256 - 128 for seed in range(200)]
    assert -27 <= min(few) < -22 < 22 < max(few) <= 27
    grey = noisy_picture().convert("L").convert("RGB")
    assert np.array_equal(pixels(image(grey, hue=0.5)), pixels(grey))


def test_the_given_picture_and_sound_stay_as_they_were() -> None:
    picture, samples, features = noisy_picture(), tone(), np.ones((50, 20), np.float32)
    image(picture, flip=1.0, brightness=0.5, hue=0.5)
    waveform(samples, noise_snr_db=(0, 0), gain_db=6, shift_s=0.1)
    masked(features, time_masks=2, time_mask_frames=20)
    assert np.array_equal(pixels(picture), pixels(noisy_picture()))
    assert np.array_equal(samples, tone())
    assert features.all()


@given(st.lists(st.floats(-3, 3, width=32), max_size=50), seeds)
def test_without_any_strength_a_sound_is_what_it_was(values: list[float], seed: int) -> None:
    samples = np.array(values, dtype=np.float32)
    assert np.array_equal(waveform(samples, seed), samples)


@pytest.mark.parametrize("ratio", [0.0, 10.0, 30.0])
def test_noise_is_as_far_below_the_sound_as_asked(ratio: float) -> None:
    made = waveform(tone(), noise_snr_db=(ratio, ratio))
    noise = made - tone()
    assert abs(decibels(root_mean_square(tone()) / root_mean_square(noise)) - ratio) < 0.5
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert 0.9 < power[:4000].mean() / power[4000:].mean() < 1.1  # white


def test_noise_ratios_are_drawn_from_their_range() -> None:
    ratios = [
        decibels(root_mean_square(tone()) / root_mean_square(waveform(tone(), seed, noise_snr_db=(5, 15)) - tone())) for seed in range(99)
    ]
    assert 4.8 < min(ratios) < 6 < 14 < max(ratios) < 15.2


def test_silence_stays_silent() -> None:
    assert not waveform(np.zeros(1000, np.float32), noise_snr_db=(0, 20), gain_db=12, shift_s=1).any()


def test_gain_is_drawn_either_way_in_decibels() -> None:
    gains = [decibels(root_mean_square(waveform(tone(), seed, gain_db=6)) / root_mean_square(tone())) for seed in range(200)]
    assert -6.01 < min(gains) < -5.5 < 5.5 < max(gains) < 6.01
    made = waveform(tone(), 1, gain_db=6)
    assert np.allclose(made, tone() * (root_mean_square(made) / root_mean_square(tone())), atol=1e-6)


def test_what_would_be_clipped_is_made_softer_as_a_whole() -> None:
    for seed in range(30):
        made = waveform(tone(0.9), seed, gain_db=20)
        assert np.abs(made).max() <= 1.0001
        assert np.allclose(made / np.abs(made).max(), tone(1.0), atol=1e-4)
        assert np.abs(waveform(tone(1.5), seed, gain_db=20, noise_snr_db=(0, 0))).max() < 1.5001


def test_a_sound_is_moved_either_way_and_not_wrapped_round() -> None:
    samples = np.arange(1, 1001, dtype=np.float32) / 1000
    moves = []
    for seed in range(200):
        made = waveform(samples, seed, shift_s=0.01)
        by = int(np.argmax(made > 0)) if made[0] == 0 else 1 - round(float(made[0]) * 1000)
        expected = np.zeros_like(samples)
        if by >= 0:
            expected[by:] = samples[: 1000 - by]
        else:
            expected[:by] = samples[-by:]
        assert np.array_equal(made, expected)
        moves.append(by)
    assert -160 <= min(moves) < -150 < 150 < max(moves) <= 160


@given(
    st.integers(1, 300),
    st.tuples(st.floats(-20, 60), st.floats(-20, 60)) | st.none(),
    st.floats(0, 60),
    st.floats(0, 10),
    st.floats(0, 3),
    seeds,
)
def test_a_changed_sound_is_as_long_and_no_louder_than_full_scale(
    frames: int, snr: tuple[float, float] | None, gain: float, shift: float, amplitude: float, seed: int
) -> None:
    samples = tone(amplitude, frames)
    made = waveform(samples, seed, noise_snr_db=snr and tuple(sorted(snr)), gain_db=gain, shift_s=shift)
    assert (made.dtype, made.shape) == (np.float32, samples.shape)
    assert np.isfinite(made).all()
    assert np.abs(made).max() <= max(1, np.abs(samples).max()) * 1.0001


def test_stripes_are_hidden_across_the_whole_spectrogram() -> None:
    widths = []
    for seed in range(300):
        made = masked(np.ones((100, 40), np.float32), seed, time_masks=1, time_mask_frames=20, fill=-3)
        rows = np.flatnonzero((made == -3).all(axis=1))
        assert (made == -3).sum() == 40 * len(rows)
        assert np.array_equal(rows, np.arange(len(rows)) + (rows[0] if len(rows) else 0))
        widths.append(len(rows))
    assert Counter(widths).keys() == set(range(21))
    made = masked(np.ones((100, 40), np.float32), 1, freq_masks=1, freq_mask_bins=10)
    assert (made == 0).sum() == 100 * (made == 0).all(axis=0).sum() > 0


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3), st.integers(0, 40), st.integers(0, 3), st.integers(0, 40), seeds)
def test_no_more_is_hidden_than_asked(
    frames: int, bins: int, time_masks: int, mask_frames: int, freq_masks: int, mask_bins: int, seed: int
) -> None:
    features = np.ones((frames, bins), np.float32)
    made = masked(features, seed, time_masks=time_masks, time_mask_frames=mask_frames, freq_masks=freq_masks, freq_mask_bins=mask_bins)
    assert (made.dtype, made.shape) == (np.float32, features.shape)
    assert (made == 0).all(axis=1).sum() <= time_masks * mask_frames or (made == 0).all()
    assert (made == 0).all(axis=0).sum() <= freq_masks * mask_bins or (made == 0).all()
    if not (time_masks and mask_frames) and not (freq_masks and mask_bins):
        assert made.all()
