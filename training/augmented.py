"""Training rows that are a little different each time they are seen: what is drawn depends on (seed, step, row) alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hone.errors import DataError
from hone.recipe import AudioAugmentation, ImageAugmentation, TextAugmentation
from models.tasks import TASKS, Inputs, Task
from models.tasks.audio_classification import features, samples_of
from training.augment.audio import augment_waveform, spec_augment
from training.augment.images import augment_image
from training.augment.text import augment_text
from training.batches import Rows
from training.job import Job
from training.token_rows import TokenRows

Row = dict[str, Any]
Take = Callable[[int, Rows], list[Row]]


def augmented(rows: TokenRows, job: Job, inputs: Inputs) -> Take:
    """What gives the training rows of a step by their numbers: changed as the recipe says, each time anew, or as they are."""
    settings, seed = job.recipe.data.augment, job.recipe.train.seed
    task = TASKS[job.recipe.task]
    if settings.text:
        return AugmentedText(
            rows, task, task.load_processor(job.base_folder), settings.text, seed=seed, max_length=job.data.max_length
        ).take
    change: Callable[[Row, np.random.Generator], Row] | None = None
    if settings.image:
        image = settings.image
        change = lambda row, rng: changed_image(row, rng, image)  # noqa: E731
    if settings.audio:
        audio = settings.audio
        change = lambda row, rng: changed_sound(row, rng, audio, inputs.processor)  # noqa: E731
    if change is None:
        return lambda _step, numbers: rows.take(numbers)
    changes = change
    return lambda step, numbers: [
        changes(row, np.random.default_rng([seed, step, number])) for row, number in zip(rows.take(numbers), numbers.tolist(), strict=True)
    ]


class AugmentedText:
    """Rows of texts with one class each, changed anew at every step."""

    def __init__(self, rows: TokenRows, task: Task, tokenizer: Any, settings: TextAugmentation, *, seed: int, max_length: int) -> None:
        self._rows, self._task, self._tokenizer, self._settings = rows, task, tokenizer, settings
        self._seed, self._max_length = seed, max_length

    def take(self, step: int, numbers: Rows) -> list[Row]:
        """Rows by number, as `TokenRows.take` gives them."""
        rows = self._rows.take(numbers)
        changed = [self._changed(number, step) for number in numbers.tolist()]
        texts = [{"text": text, "label": ""} for text in changed if text is not None]
        encoded = iter(self._task.encode(texts, self._tokenizer, max_length=self._max_length) if texts else [])
        for row, text in zip(rows, changed, strict=True):
            if text is not None:
                made = next(encoded)
                assert not isinstance(made, DataError)
                row["input_ids"] = made[0].input_ids
        return rows

    def _changed(self, number: int, step: int) -> str | None:
        """The text as it is this time; None where it stays as it is."""
        rng, settings = np.random.default_rng([self._seed, step, number]), self._settings
        if rng.random() >= settings.probability:
            return None
        return augment_text(
            self._rows.text(number),
            rng,
            word_dropout=settings.word_dropout,
            word_swap=settings.word_swap,
            case_noise=settings.case_noise,
        )


def changed_image(row: Row, rng: np.random.Generator, settings: ImageAugmentation) -> Row:
    """The row with another picture, of the same size."""
    from PIL import Image

    shape = tuple(int(side) for side in row["parts"])
    pixels = np.frombuffer(row["content"], dtype=np.uint8).reshape(shape)
    if shape[0] != 3:
        return row
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    made = augment_image(picture, rng, **settings.model_dump()).resize(picture.size, Image.Resampling.BILINEAR)
    return {**row, "content": np.asarray(made).transpose(2, 0, 1).tobytes()}


def changed_sound(row: Row, rng: np.random.Generator, settings: AudioAugmentation, extractor: Any) -> Row:
    """The row with `features` of another sound, and stripes of them hidden where they are a spectrogram."""
    samples = augment_waveform(
        samples_of(row),
        rng,
        sampling_rate=extractor.sampling_rate,
        noise_snr_db=settings.noise_snr_db,
        gain_db=settings.gain_db,
        shift_s=settings.shift_s,
    )
    made = features(samples, extractor)
    if made.ndim == 2:
        is_bins_first = extractor.model_input_names[0] == "input_features" and made.shape[0] == getattr(extractor, "feature_size", None)
        striped = spec_augment(
            made.T if is_bins_first else made,
            rng,
            time_masks=settings.time_masks,
            time_mask_frames=settings.time_mask_frames,
            freq_masks=settings.freq_masks,
            freq_mask_bins=settings.freq_mask_bins,
            fill=float(made.mean()),
        )
        made = np.ascontiguousarray(striped.T if is_bins_first else striped)
    return {**row, "features": made}
