"""`audio-classification`: an audio encoder with a new head names the class of a sound, its classes, or a number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.data.media import load_audio
from hone.errors import BaseModelError, DataError
from models.tasks.classification import ClassificationTask, answer_of, labels_of, no_answer
from models.tasks.task import Batch, Encoded, Inputs, TokenRow


class AudioClassification(ClassificationTask):
    """Averaged over the rows of the global batch."""

    name: ClassVar[str] = "audio-classification"
    shape: ClassVar[str] = "audio"
    unit: ClassVar[str] = "samples"
    rows_at_once: ClassVar[int] = 16

    def check_base(self, base: BaseModel) -> None:
        """Every base with an audio-classification class in transformers will do; loading says if there is none."""

    def load_processor(self, folder: Path) -> Any:
        from transformers import AutoFeatureExtractor

        try:
            return AutoFeatureExtractor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise BaseModelError(f"{folder}: no feature extractor (preprocessor_config.json): {str(error).splitlines()[0][:200]}") from None

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:
        return [_encoded(row, processor, max_length) for row in rows]

    def model_class(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return AutoModelForAudioClassification

    def nothing(self, inputs: Inputs) -> TokenRow:
        return no_answer({"content": np.zeros(inputs.processor.sampling_rate // 2, dtype=np.float32)})

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:  # noqa: ARG002 - the protocol's signature
        """What the feature extractor makes (`input_values` or `input_features`, perhaps `attention_mask`), and `labels`."""
        name = inputs.processor.model_input_names[0]
        made = [row["features"] if "features" in row else features(samples_of(row), inputs.processor) for row in rows]
        return {**_padded(name, made, inputs.processor), "labels": labels_of(rows)}


def samples_of(row: TokenRow) -> npt.NDArray[np.float32]:
    """float32 [frames], full scale from -1 to 1."""
    return np.frombuffer(row["content"], dtype=np.float32)


def features(samples: npt.NDArray[np.float32], extractor: Any) -> npt.NDArray[np.float32]:
    """What the model reads of one sound: a spectrogram, or the samples themselves."""
    made = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
    return np.asarray(made[extractor.model_input_names[0]][0], dtype=np.float32)


def _padded(name: str, made: list[npt.NDArray[np.float32]], extractor: Any) -> Batch:
    if len({each.shape for each in made}) == 1 and not getattr(extractor, "return_attention_mask", False):
        return {name: torch.from_numpy(np.stack(made))}
    padded = extractor.pad({name: made}, padding=True, return_tensors="np")
    return {key: torch.from_numpy(np.asarray(padded[key])) for key in (name, "attention_mask") if key in padded}


def _encoded(row: Row, extractor: Any, max_milliseconds: int) -> list[Encoded] | DataError:
    try:
        samples = load_audio(row["audio"], sampling_rate=extractor.sampling_rate)
    except DataError as error:
        return error
    most = max_milliseconds * extractor.sampling_rate // 1000
    content = np.ascontiguousarray(samples[:most], dtype=np.float32)
    answer = answer_of(row)
    return [Encoded(length=len(samples), cost=len(content), is_cut=len(samples) > most, content=content.tobytes(), **answer)]
