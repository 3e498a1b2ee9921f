"""Pictures and sounds: their bytes read from wherever a row says, checked whole before any GPU is leased, and decoded for a model.

What the check lets through, `load_image` and `load_audio` decode; both go the same way. The libraries behind them are imported when
they are first needed, as a team that tunes on texts needs none of them.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hone.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from soundfile import SoundFile

LARGEST_MEDIA = 256 * 2**20
"""Bytes of one picture or sound, which are held in memory whole."""
PICTURES = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
"""What may be decoded. Every format more is one more decoder that meets files from anywhere."""
MOST_PIXELS = 89_478_485
"""Width times height, at which Pillow too suspects a bomb: 256 MiB once decoded, at 3 bytes each."""
SOUNDS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
SHORTEST_S = 0.025
"""One window of the speech models (Whisper's and wav2vec2's have 400 samples at 16 kHz); of less they make no feature."""
LONGEST_S = 3600.0
SLOWEST_HZ, FASTEST_HZ = 1_000, 384_000
"""Sampling rates from recordings of hearts to those of bats. A header with another one is broken."""
LOUDEST = 1000.0
"""60 dB above full scale, which is 1. Samples that large are integers that somebody saved as floats."""
BLOCK_SAMPLES = 2**20
"""Samples decoded at a time, over all channels: 4 MiB, however long the sound is."""
MP3_SLACK_FRAMES = 2 * 1152
"""Two frames of MPEG audio. Encoders do not agree on whether the one with the header counts, and what pads the ends."""
UNKNOWN_LENGTHS = (0, 2**32 - 1)
"""What a program writes for the length of a WAV before it knows it, and leaves there if it writes to a pipe."""
URI = re.compile(r"[a-z][a-z0-9+.-]*://")


def read_media(value: bytes | str, filesystem: Any) -> bytes:
    """The bytes of a picture or sound.

    Args:
        value: The bytes themselves; or a path as the file system knows it, which may have its scheme in front (`s3://bucket/a.png`).
        filesystem: The `pyarrow.fs.FileSystem` of the file that the row is in, with its region and credentials.

    Raises:
        DataError: there is no such file, it cannot be read, or it is empty or too large.
    """
    if isinstance(value, bytes):
        _check_size(len(value))
        return value
    from pyarrow import ArrowException
    from pyarrow.fs import FileType

    path = URI.sub("", value, count=1)
    try:
        info = filesystem.get_file_info(path)
        if info.type == FileType.NotFound:
            raise DataError("there is no such file")
        if not info.is_file:
            raise DataError("this is not a file")
        _check_size(info.size)
        with filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"the file cannot be read ({_first_line(error)})") from None


def check_media(content: bytes, kind: str) -> None:
    """Decode all of it, as nothing less finds a file that was cut short.

    Costs what decoding costs, on one core: about 10 ms for a megapixel of JPEG, 25 ms for one of PNG or WebP, and 1 to 5 ms for 10 s of
    sound at 16 kHz. What stands behind the last pixel may be missing. An OGG that was cut exactly between two pages, or an MP3 whose
    header does not say its length, cannot be told from one that ends there.

    Args:
        content: The bytes of a file.
        kind: `image` or `audio`.

    Raises:
        DataError: what is wrong with it.
    """
    if kind == "image":
        load_image(content)
        return
    with _decoding("sound"), _opened(content) as sound:
        for _ in _mono(sound):
            pass


def load_image(content: bytes) -> "Image.Image":
    """The picture as RGB, 8 bits each, the way up that its EXIF orientation says; of an animation the first frame.

    Transparent pixels are laid on white, as a page shows them. 16 bits of grey are scaled to 8 by their full range.
    """
    from PIL import Image, UnidentifiedImageError

    _check_size(len(content))
    with _decoding("picture"):
        try:
            with Image.open(io.BytesIO(content), formats=PICTURES) as image:  # reads the header alone
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise _too_many_pixels(f"{width:,} x {height:,} = {width * height / 1e6:,.0f}")
                image.load()
                _turn_upright(image)
                return _as_rgb(image)
        except UnidentifiedImageError:
            raise DataError(f"this is no picture that can be read; save it as one of {', '.join(PICTURES)}") from None
        except Image.DecompressionBombError:
            raise _too_many_pixels(f"over {2 * MOST_PIXELS / 1e6:,.0f}") from None


def load_audio(content: bytes, *, sampling_rate: int) -> npt.NDArray[np.float32]:
    """The sound at this sampling rate (Hz), one channel that is the mean of all: float32 [frames], full scale from -1 to 1.

    Resampled by soxr's HQ recipe: what the new rate cannot hold is filtered out rather than folded back. Memory is that of the result.
    """
    import soxr

    with _decoding("sound"), _opened(content) as sound:
        if sound.samplerate == sampling_rate:
            return np.concatenate(list(_mono(sound)))
        stream = soxr.ResampleStream(sound.samplerate, sampling_rate, num_channels=1, dtype="float32", quality="HQ")
        pieces = [stream.resample_chunk(block) for block in _mono(sound)]
        pieces.append(stream.resample_chunk(np.empty(0, dtype=np.float32), last=True))
        return np.concatenate(pieces)


def audio_seconds(content: bytes) -> float:
    """How long the sound lasts, by its header; seconds."""
    with _decoding("sound"), _opened(content) as sound:
        return float(sound.frames / sound.samplerate)


def _check_size(size: int) -> None:
    if not size:
        raise DataError("the file is empty")
    if size > LARGEST_MEDIA:
        raise DataError(f"the file has {size / 2**20:,.0f} MiB; at most {LARGEST_MEDIA / 2**20:.0f} MiB are read as one picture or sound")


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Whatever a decoder raises is a DataError, and what it warns of (odd EXIF data, say) is nothing that a row is refused for.

    Python's filters of warnings belong to the process: a thread beside this one may have its own warnings swallowed meanwhile.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # SyntaxError, struct.error, IndexError, MemoryError: decoders of broken bytes raise anything
            raise DataError(f"the {what} cannot be decoded ({_first_line(error)}); was it cut short?") from None


def _too_many_pixels(size: str) -> DataError:
    return DataError(f"the picture has {size} megapixels; at most {MOST_PIXELS / 1e6:.0f} are decoded, so make it smaller")


def _turn_upright(image: "Image.Image") -> None:
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # EXIF data that cannot be parsed: browsers show such a picture as it is stored, and so it is read
        return


def _as_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I"):  # which Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image.convert("RGB")


@contextmanager
def _opened(content: bytes) -> Iterator["SoundFile"]:
    """The sound, by its header as it should be."""
    from soundfile import LibsndfileError, SoundFile

    _check_size(len(content))
    if content[:4] in (b"RIFF", b"RIFX"):
        _check_riff(content)
    elif content[:4] == b"OggS":
        _check_last_page(content)
    try:
        sound = SoundFile(io.BytesIO(content))
    except LibsndfileError as error:
        raise DataError(f"this is no sound that can be read ({error.error_string}); save it as one of {', '.join(SOUNDS)}") from None
    with sound:
        _check_header(sound)
        yield sound


def _check_header(sound: "SoundFile") -> None:
    if sound.format not in SOUNDS:
        raise DataError(f"sounds of format {sound.format} are not read; save it as one of {', '.join(SOUNDS)}")
    if not SLOWEST_HZ <= sound.samplerate <= FASTEST_HZ:
        raise DataError(f"the header says {sound.samplerate:,} samples a second; known are {SLOWEST_HZ:,} to {FASTEST_HZ:,}")
    seconds = sound.frames / sound.samplerate
    if not sound.frames:
        raise DataError("the sound is empty: its header is followed by no samples")
    if seconds < SHORTEST_S:
        raise DataError(f"the sound lasts {seconds * 1000:.1f} ms; a model needs at least {SHORTEST_S * 1000:.0f} ms")
    if seconds > LONGEST_S:  # libsndfile says 2^63 - 1 frames of a FLAC that does not say
        raise DataError(f"the sound lasts {seconds:,.0f} s by its header; at most {LONGEST_S:,.0f} s are read as one, so split it")


def _mono(sound: "SoundFile") -> Iterator[npt.NDArray[np.float32]]:
    """Its samples, mean over the channels, a block [frames] at a time; they are as many as the header says."""
    frames, at_once = 0, max(1, BLOCK_SAMPLES // sound.channels)
    while len(block := sound.read(at_once, dtype="float32", always_2d=True)):
        loudest = float(np.abs(block).max())
        if not np.isfinite(loudest):
            raise DataError("the sound holds samples that are NaN or infinite")
        if loudest > LOUDEST:
            raise DataError(f"the sound holds samples of {loudest:,.0f}; as floats they go from -1 to 1, so divide them by full scale")
        frames += len(block)
        yield block.mean(axis=1)
    if abs(sound.frames - frames) > (MP3_SLACK_FRAMES if sound.format == "MP3" else 0):
        raise DataError(f"the header says {sound.frames:,} frames and there are {frames:,}; the sound was cut short")


def _check_riff(content: bytes) -> None:
    """The sizes in a WAV add up to the file. libsndfile would read what is there and say nothing."""
    word = struct.Struct("<I" if content[:4] == b"RIFF" else ">I")
    if len(content) < 12:
        raise DataError("the WAV ends inside its header; it was cut short")
    [said] = word.unpack_from(content, 4)
    if said in UNKNOWN_LENGTHS:
        raise DataError("the WAV's header does not say how long it is, as if written to a pipe; save it anew as a file")
    if said + 8 > len(content) + 1:  # some writers count a last byte of padding and leave it out
        raise DataError(f"the WAV's header says {said + 8:,} bytes and there are {len(content):,}; it was cut short")
    if said + 8 < len(content) - 1:
        raise DataError(f"the WAV's header says {said + 8:,} bytes and there are {len(content):,}; save it anew")
    at = 12
    while at < len(content):
        name = content[at : at + 4]
        if len(content) - at < 8 or not all(32 <= byte < 127 for byte in name):
            raise DataError(f"{len(content) - at:,} bytes of the WAV are in none of its chunks, as if it held more than its header says")
        [size] = word.unpack_from(content, at + 4)
        if at + 8 + size > len(content):
            there = len(content) - at - 8
            raise DataError(f"the WAV's {name.decode()!r} chunk says {size:,} bytes and there are {there:,}; it was cut short")
        at += 8 + size + size % 2


def _check_last_page(content: bytes) -> None:
    """The last page of an OGG (https://datatracker.ietf.org/doc/html/rfc3533#section-6) is all there. libsndfile would leave it out."""
    page = content[content.rindex(b"OggS") :]
    header = 27 + page[26] if len(page) > 26 else 27
    if len(page) < header + sum(page[27:header]):
        raise DataError("the last page of the OGG is not all there; it was cut short")


def _first_line(error: BaseException) -> str:
    what = getattr(error, "error_string", None) or str(error)  # soundfile's own text begins with the address of a BytesIO
    return (what.splitlines() or [type(error).__name__])[0][:200]
