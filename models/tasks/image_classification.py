"""`image-classification`: a vision encoder with a new head names the class of a picture, its classes, or a number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from hone.base_model import BaseModel
from hone.data.formats import Row
from hone.data.media import load_image
from hone.errors import BaseModelError, DataError
from models.tasks.classification import ClassificationTask, answer_of, labels_of, no_answer
from models.tasks.task import Batch, Encoded, Inputs, TokenRow

Pixels = npt.NDArray[np.uint8]


class ImageClassification(ClassificationTask):
    """Averaged over the rows of the global batch."""

    name: ClassVar[str] = "image-classification"
    shape: ClassVar[str] = "image"
    unit: ClassVar[str] = "pixels"
    rows_at_once: ClassVar[int] = 16

    def check_base(self, base: BaseModel) -> None:
        """Every base with an image-classification class in transformers will do; loading says if there is none."""

    def load_processor(self, folder: Path) -> Any:
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError) as error:
            raise BaseModelError(f"{folder}: no image processor (preprocessor_config.json): {str(error).splitlines()[0][:200]}") from None

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[list[Encoded] | DataError]:  # noqa: ARG002
        return [_encoded(row, processor) for row in rows]

    def model_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def nothing(self, inputs: Inputs) -> TokenRow:
        from PIL import Image

        pixels = resized(Image.new("RGB", (64, 64)), inputs.processor)
        return no_answer({"content": pixels, "parts": pixels.shape})

    def collate(self, rows: Sequence[TokenRow], *, inputs: Inputs, packed: bool) -> Batch:  # noqa: ARG002 - the protocol's signature
        """`pixel_values` [rows, channels, height, width], scaled as the model was trained on, and `labels`."""
        pixels = np.stack([np.frombuffer(row["content"], dtype=np.uint8).reshape(tuple(row["parts"])) for row in rows])
        return {"pixel_values": _normalised(torch.from_numpy(pixels), inputs.processor), "labels": labels_of(rows)}


def resized(image: Any, processor: Any) -> Pixels:
    """A picture (of Pillow, RGB) at the size that the model takes: [channels, height, width]."""
    made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.ascontiguousarray(np.clip(np.rint(made), 0, 255).astype(np.uint8))


def _normalised(pixels: torch.Tensor, processor: Any) -> torch.Tensor:
    """What the processor does after resizing, for a whole batch at once."""
    values = pixels.float()
    if processor.do_rescale:
        values = values * processor.rescale_factor
    if processor.do_normalize:
        mean, deviation = (torch.tensor(each).view(1, -1, 1, 1) for each in (processor.image_mean, processor.image_std))
        values = (values - mean) / deviation
    return values


def _encoded(row: Row, processor: Any) -> list[Encoded] | DataError:
    try:
        image = load_image(row["image"])
        pixels = resized(image, processor)
    except DataError as error:
        return error
    return [Encoded(length=image.width * image.height, parts=pixels.shape, content=pixels.tobytes(), **answer_of(row))]
