"""Where the rows are, which of them validate, and how they become tokens."""

from typing import Literal

from pydantic import Field, model_validator

from hone.recipe.settings import Fraction, Settings, Share, Sources

Range = tuple[float, float]

FindingKind = Literal[
    "leakage",
    "near_leakage",
    "exact_duplicates",
    "near_duplicates",
    "unknown_labels",
    "one_label",
    "email",
    "phone",
    "card",
    "secret",
]


class MixedSource(Settings):
    """A further source of training rows."""

    source: Sources
    """Files, folders, globs or URIs, as for `data.train`."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often an epoch sees each row: 0.5 sees one half of them, and the other half in the next epoch; 2 sees each twice."""
    columns: dict[str, str] | None = None
    """As `data.columns`, where these files differ from the others."""


class TextAugmentation(Settings):
    """Small changes to a text, other ones each time that it is seen (https://arxiv.org/abs/1901.11196)."""

    probability: Share = 0.5
    """Share of the texts that are changed."""
    word_dropout: Share = 0.1
    """Share of the words that are left out."""
    word_swap: Share = 0.1
    """Share of the words that change places with the next."""
    case_noise: Share = 0.05
    """Share of the words whose case changes."""


class ImageAugmentation(Settings):
    """Pictures mirrored, cropped, and in other colours."""

    flip: Share = 0.5
    """Probability that left and right are exchanged. Not for pictures of writing."""
    crop_scale: Range = (0.6, 1.0)
    """Least and most share of the area that is kept."""
    crop_ratio: Range = (0.75, 1.333)
    """Least and most by which a crop is wider for its height than the picture is."""
    brightness: Share = 0.2
    """Pixels are multiplied by a factor from 1 - this to 1 + this."""
    contrast: Share = 0.2
    """Differences to the mean grey, likewise."""
    saturation: Share = 0.2
    """Differences to each pixel's grey, likewise."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Most by which colours are turned, in turns of the colour wheel."""

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "ImageAugmentation":
        _check_range("crop_scale", self.crop_scale, least=0.01, most=1.0)
        _check_range("crop_ratio", self.crop_ratio, least=0.1, most=10.0)
        return self


class AudioAugmentation(Settings):
    """Sounds with noise, at another loudness, a little earlier or later, and with stripes of their spectrogram hidden."""

    noise_snr_db: Range | None = (10.0, 40.0)
    """Least and most dB by which the sound is louder than the noise that is added; null adds none."""
    gain_db: float = Field(default=6.0, ge=0, le=60)
    """Most dB by which it is made louder or softer."""
    shift_s: float = Field(default=0.1, ge=0, le=60)
    """Most seconds by which it is moved."""
    time_masks: int = Field(default=1, ge=0, le=20)
    """Stripes of frames hidden (SpecAugment, https://arxiv.org/abs/1904.08779), where the model reads spectrograms."""
    time_mask_frames: int = Field(default=10, ge=0)
    """The most frames of one."""
    freq_masks: int = Field(default=1, ge=0, le=20)
    freq_mask_bins: int = Field(default=8, ge=0)

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "AudioAugmentation":
        if self.noise_snr_db is not None:
            _check_range("noise_snr_db", self.noise_snr_db, least=-60, most=200)
        return self


class AugmentSettings(Settings):
    """How training rows are changed each time they are seen; validation rows never are."""

    text: TextAugmentation | None = None
    """For the task text-classification."""
    image: ImageAugmentation | None = None
    """For the task image-classification."""
    audio: AudioAugmentation | None = None
    """For the task audio-classification."""


def _check_range(name: str, pair: tuple[float, float], *, least: float, most: float) -> None:
    if not least <= pair[0] <= pair[1] <= most:
        raise ValueError(f"{name} {list(pair)} is not a range [least, most] within {least:g} to {most:g}")


class DataSettings(Settings):
    """Where the rows are and how they become tokens."""

    train: Sources
    """Training rows: a file, a folder, a glob or an object store URI, or a list of them. JSON Lines, JSON, CSV, TSV, Parquet, Arrow or
    text, also compressed; the format of the rows is recognised by their columns."""
    validation: Sources | None = None
    """Validation rows, likewise. Without any, `validation_fraction` of the training rows is held out."""
    validation_fraction: Fraction = 0.05
    """Share of the rows of `train` held out when there is no validation file; 0 trains without validation."""
    stratify: bool = True
    """Hold out the same share of each class, where rows have one."""
    group_by: str | None = None
    """Column whose values are never on both sides: rows of one customer, one document, one patient."""
    folds: int | None = Field(default=None, ge=2, le=100)
    """Split the rows of `train` into so many folds and validate on one of them, instead of `validation_fraction`."""
    fold: int = Field(default=0, ge=0)
    """Which fold validates, from 0."""
    mix: list[MixedSource] = Field(default=[])
    """Further sources of training rows, each as often as its weight says."""
    retain: Sources | None = None
    """General data, such as what the base was tuned on: what the model should not forget. Some of its rows are mixed in, others are held
    out, and the loss on them is measured before and while it learns. See `guard`."""
    retain_fraction: Fraction = 0.1
    """Share of each epoch's rows that come from `retain`; 0 only measures."""
    retain_eval_rows: int = Field(default=200, ge=1)
    """Rows of `retain` that are held out to measure; a half of them, where there are fewer than twice as many."""
    augment: AugmentSettings = AugmentSettings()
    max_length: int = Field(default=1024, ge=8)
    """Tokens per row; longer rows are cut at the end, and the run says how many were."""
    max_seconds: float = Field(default=10.0, gt=0, le=3600)
    """Seconds per sound; longer ones are cut at the end."""
    columns: dict[str, str] = Field(default={})
    """Names of columns that are called otherwise in the files: {text: review, label: stars}."""
    max_bad_fraction: Fraction = 0.0
    """Share of the rows that may be bad; they are left out and counted. By default a single one stops the run before it starts."""
    stop_on: list[FindingKind] = Field(default=["leakage"])
    """Findings that stop the run before a worker is asked for; the others are told. See `hone data check`."""
    near_duplicate_rows: int = Field(default=10_000, ge=0)
    """Rows among which near duplicates are looked for, at about a third of a millisecond each; 0 for none. `hone data check` without a
    recipe looks among more."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "DataSettings":
        if self.validation and self.folds:
            raise ValueError("data.folds splits the training rows, and data.validation names rows of its own; leave one of them out")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"data.fold {self.fold} is not one of data.folds {self.folds}; they count from 0")
        return self
