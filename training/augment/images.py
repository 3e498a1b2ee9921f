"""Pictures mirrored, cropped, and with other colours. What size they have in the end is for the model's own processor to say."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Pair = tuple[float, float]


def augment_image(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    flip: float,
    crop_scale: Pair,
    crop_ratio: Pair,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> Image.Image:
    """The picture, perhaps mirrored, a part of it, in colours that are a little off.

    Args:
        image: RGB.
        rng: What is drawn from.
        flip: Probability that left and right are exchanged. Not for pictures of writing or of hands.
        crop_scale: Least and most share of the area that is kept, at most 1; any share between is as likely. (1, 1) keeps all.
        crop_ratio: Least and most by which the crop is wider for its height than the picture is: 0.75 to 1.33 changes its shape by a third
            either way, and is drawn evenly on a log scale. It is drawn from what of this range fits into the picture. The processor then
            squeezes crops as it squeezes whole pictures, which one of a fixed shape would not be.
        brightness: The pixels are multiplied by a factor from 1 - this (0 at least) to 1 + this.
        contrast: The differences to the mean grey are, likewise.
        saturation: The differences to the grey of each pixel are, likewise.
        hue: Most by which colours are turned either way, in turns of the colour wheel; at most 0.5.

    Colours are what torchvision's ColorJitter defines on pictures of Pillow, changed in an order that is drawn.
    """
    if rng.random() < flip:
        image = ImageOps.mirror(image)
    image = _cropped(image, rng, crop_scale, crop_ratio)
    changes: list[tuple[float, Callable[[Image.Image], Image.Image]]] = [
        (brightness, lambda picture: ImageEnhance.Brightness(picture).enhance(_factor(rng, brightness))),
        (contrast, lambda picture: ImageEnhance.Contrast(picture).enhance(_factor(rng, contrast))),
        (saturation, lambda picture: ImageEnhance.Color(picture).enhance(_factor(rng, saturation))),
        (hue, lambda picture: _turned(picture, rng.uniform(-hue, hue))),
    ]
    for n in rng.permutation(len(changes)):
        strength, change = changes[n]
        if strength:
            image = change(image)
    return image


def _cropped(image: Image.Image, rng: np.random.Generator, scale: Pair, ratio: Pair) -> Image.Image:
    share = rng.uniform(*scale)
    low, high = np.clip(np.log(ratio), np.log(share), -np.log(share))  # beyond, one side would be longer than the picture's
    stretch = np.exp(low + (high - low) * rng.random())  # `uniform` refuses to draw from 0.0 to -0.0, as it may be at a share of 1
    width, height = (
        min(side, max(1, round(side * part)))
        for side, part in zip(image.size, (np.sqrt(share * stretch), np.sqrt(share / stretch)), strict=True)
    )
    left, top = (int(rng.integers(whole - kept + 1)) for whole, kept in zip(image.size, (width, height), strict=True))
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def _factor(rng: np.random.Generator, strength: float) -> float:
    return rng.uniform(max(0.0, 1 - strength), 1 + strength)


def _turned(image: Image.Image, turns: float) -> Image.Image:
    """Every colour further on round the colour wheel; Pillow parts it into 256 steps."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(round(turns * 256) % 256)  # beyond 255 it begins again, as the wheel does
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
