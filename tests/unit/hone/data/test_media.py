"""Pictures and sounds: decoded as they should be, and named when they are broken."""

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from hone.data import media
from hone.data.files import DataFile, find_files
from hone.data.media import audio_seconds, check_media, load_audio, load_image, read_media
from hone.data.parts import Part, cut
from hone.data.rows import ReadRow, read_rows
from hone.errors import DataError

RED, GREY = (255, 0, 0), (100, 100, 100)
Order = Literal["<", ">"]


def picture(form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30), *, colour: Any = RED, **options: Any) -> bytes:
    return saved(Image.new(mode, size, colour), form, **options)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noisy_picture(form: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), form, **options)


def tone(hz: float, rate: int, seconds: float = 1.0, amplitude: float = 0.5) -> npt.NDArray[np.float32]:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def sound(samples: npt.NDArray[Any] | None = None, rate: int = 16_000, form: str = "WAV", subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, tone(440, rate) if samples is None else samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds one byte of it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def wav(
    data: bytes, *, riff: int | None = None, said: int | None = None, rate: int = 16_000, order: Order = "<", after: bytes = b""
) -> bytes:
    """16 bits, one channel, with the sizes that are asked for, by default the true ones."""
    head = struct.pack(order + "HHIIHH", 1, 1, rate, 2 * rate % 2**32, 2, 16)
    body = b"WAVEfmt " + struct.pack(order + "I", 16) + head
    body += b"data" + struct.pack(order + "I", len(data) if said is None else said) + data + after
    return (b"RIFF" if order == "<" else b"RIFX") + struct.pack(order + "I", len(body) if riff is None else riff) + body


SOUND_BYTES = np.random.default_rng(0).integers(-9000, 9000, 4000, dtype="<i2").tobytes()


def said_of(content: bytes, kind: str) -> str:
    """What is wrong with it; empty if it is fine."""
    try:
        check_media(content, kind)
    except DataError as error:
        return error.message
    return ""


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_picture_of_every_format_is_rgb(form: str) -> None:
    image = load_image(picture(form))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.allclose(image.getpixel((20, 15)), RED, atol=3)


@pytest.mark.parametrize(
    ("form", "mode", "colour", "rgb"),
    [
        ("PNG", "1", 1, (255, 255, 255)),
        ("PNG", "L", 100, GREY),
        ("PNG", "LA", (100, 255), GREY),
        ("PNG", "LA", (100, 0), (255, 255, 255)),
        ("PNG", "RGBA", (*RED, 255), RED),
        ("PNG", "RGBA", (*RED, 0), (255, 255, 255)),
        ("PNG", "RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("WEBP", "RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("PNG", "P", 0, (0, 0, 0)),
        ("JPEG", "L", 100, GREY),
        ("JPEG", "CMYK", (0, 255, 255, 0), RED),
        ("JPEG", "YCbCr", (100, 128, 128), GREY),
    ],
)
def test_every_kind_of_pixel_becomes_rgb_and_what_is_transparent_white(form: str, mode: str, colour: Any, rgb: tuple[int, ...]) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.allclose(load_image(picture(form, mode, colour=colour, **options)).getpixel((20, 15)), rgb, atol=3)


def test_a_palette_with_a_transparent_colour_is_laid_on_white() -> None:
    for form in ("PNG", "GIF"):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((0, 0), 0)
        made = load_image(saved(image, form, transparency=0))
        assert (made.getpixel((0, 0)), made.getpixel((5, 5))) == ((255, 255, 255), RED)


def test_one_colour_of_an_rgb_png_can_be_transparent() -> None:
    assert load_image(picture("PNG", transparency=RED)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_of_grey_are_scaled_by_their_full_range() -> None:
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(load_image(saved(Image.fromarray(grey), "PNG")))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_photograph_is_turned_as_its_exif_data_say() -> None:
    image = Image.new("RGB", (40, 30), "blue")
    image.paste("red", (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    made = load_image(saved(image, "JPEG", exif=exif, quality=95))
    assert made.size == (30, 40)
    assert np.allclose(made.getpixel((15, 5)), RED, atol=6)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_photograph_with_broken_exif_data_is_read_as_it_is_stored(exif: bytes) -> None:
    assert load_image(picture("JPEG", exif=exif)).size == (40, 30)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        content = saved(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.allclose(load_image(content).getpixel((5, 5)), RED, atol=3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png_header(10_000, 9_000), r"the picture has 10,000 x 9,000 = 90 megapixels; at most 89 are decoded, so make it smaller"),
        (png_header(100_000, 100_000), "over 179 megapixels"),
        (png_header(2**31 - 1, 2**31 - 1), "over 179 megapixels"),
        (b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\0\0\0" + b";", "picture"),
        (b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0), "over 179 megapixels"),
        (png_header(0, 5), "picture"),
        (b"", "the file is empty"),
        (b"no picture at all", "this is no picture that can be read; save it as one of JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (b"\x89PNG\r\n\x1a\n", "no picture"),
        (wav(SOUND_BYTES), "no picture"),
        (saved(Image.new("RGB", (4, 4)), "TIFF"), "no picture"),
        (saved(Image.new("RGB", (4, 4)), "PPM"), "no picture"),
    ],
)
def test_what_is_no_picture_or_too_large_is_said(content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_media(content, "image")


@pytest.mark.parametrize(
    "content",
    [
        noisy_picture("JPEG"),
        noisy_picture("JPEG", progressive=True),
        noisy_picture("PNG"),
        noisy_picture("GIF"),
        noisy_picture("BMP"),
        noisy_picture("WEBP"),
        noisy_picture("WEBP", lossless=True),
    ],
    ids=["jpeg", "progressive", "png", "gif", "bmp", "webp", "lossless"],
)
def test_a_picture_that_was_cut_short_is_found_wherever_it_was_cut(content: bytes) -> None:
    whole = np.asarray(load_image(content))
    for share in (0.3, 0.6, 0.9, 0.98):
        assert "picture" in said_of(content[: int(len(content) * share)], "image")
    for lost in range(1, 30):  # the last bytes may stand behind the last pixel
        with contextlib.suppress(DataError):
            assert np.array_equal(np.asarray(load_image(content[:-lost])), whole)


def test_a_file_of_too_many_bytes_is_refused_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "LARGEST_MEDIA", 100)
    (tmp_path / "a.png").write_bytes(noisy_picture("PNG"))
    for value in (noisy_picture("PNG"), str(tmp_path / "a.png")):
        with pytest.raises(DataError, match=r"the file has 0 MiB; at most 0 MiB are read"):
            read_media(value, LocalFileSystem())


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 0.03),
        ("WAVEX", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_a_sound_of_every_format_has_its_samples(form: str, subtype: str, tolerance: float) -> None:
    content = sound(form=form, subtype=subtype)
    made = load_audio(content, sampling_rate=16_000)
    assert (made.dtype, made.shape) == (np.float32, (16_000,))
    assert np.abs(made - tone(440, 16_000))[:-200].max() <= tolerance  # libsndfile's Opus loses the last 5 ms when it writes
    assert audio_seconds(content) == 1.0
    assert said_of(content, "audio") == ""


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_a_tone_keeps_its_pitch_and_loudness_at_another_rate(rate: int) -> None:
    made = load_audio(sound(tone(1_000, rate), rate, subtype="FLOAT"), sampling_rate=16_000)
    assert made.shape == (16_000,)
    assert np.abs(made - tone(1_000, 16_000))[800:-800].max() < 2e-3
    spectrum = np.abs(np.fft.rfft(made))
    assert spectrum.argmax() == 1_000  # bins of 1 Hz


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_what_the_new_rate_cannot_hold_is_filtered_out(rate: int) -> None:
    made = load_audio(sound(tone(10_000, rate), rate, subtype="FLOAT"), sampling_rate=16_000)
    inner = made[800:-800]  # a tone that begins suddenly is no pure tone there
    assert 20 * np.log10(np.sqrt(np.mean(inner**2)) / np.sqrt(0.125)) < -60


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    content = sound(tone(440, 44_100), 44_100)
    whole = load_audio(content, sampling_rate=16_000)
    monkeypatch.setattr(media, "BLOCK_SAMPLES", 777)
    assert np.array_equal(load_audio(content, sampling_rate=16_000), whole)


def test_channels_are_averaged() -> None:
    left, right = tone(440, 16_000), tone(880, 16_000, amplitude=0.2)
    made = load_audio(sound(np.stack([left, right], axis=1), subtype="FLOAT"), sampling_rate=16_000)
    assert np.allclose(made, (left + right) / 2, atol=1e-7)


def test_a_wav_of_a_big_endian_machine_and_one_with_more_chunks_are_fine() -> None:
    for content in (
        wav(np.frombuffer(SOUND_BYTES, "<i2").astype(">i2").tobytes(), order=">"),
        wav(SOUND_BYTES, after=b"LIST" + struct.pack("<I", 5) + b"INFO!\0"),
        wav(SOUND_BYTES, after=b"LIST" + struct.pack("<I", 5) + b"INFO!"),  # without the byte of padding
    ):
        assert np.array_equal(load_audio(content, sampling_rate=16_000) * 32768, np.frombuffer(SOUND_BYTES, "<i2"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (wav(SOUND_BYTES)[:-1], r"the WAV's header says 8,044 bytes and there are 8,043; it was cut short|'data' chunk says 8,000"),
        (wav(SOUND_BYTES)[:-500], "the WAV's header says 8,044 bytes and there are 7,544; it was cut short"),
        (wav(SOUND_BYTES, riff=8_036 + 999), "the WAV's header says 9,043 bytes and there are 8,044; it was cut short"),
        (wav(SOUND_BYTES, riff=5_000), "the WAV's header says 5,008 bytes and there are 8,044; save it anew"),
        (wav(SOUND_BYTES) + b"more", "the WAV's header says 8,044 bytes and there are 8,048"),
        (wav(SOUND_BYTES, said=9_000), "the WAV's 'data' chunk says 9,000 bytes and there are 8,000; it was cut short"),
        (wav(SOUND_BYTES, said=6_000), "2,000 bytes of the WAV are in none of its chunks"),
        (wav(SOUND_BYTES, said=7_996), "4 bytes of the WAV are in none of its chunks"),
        (wav(SOUND_BYTES, riff=2**32 - 1, said=2**32 - 1), "does not say how long it is"),
        (wav(SOUND_BYTES, riff=0, said=0), "does not say how long it is"),
        (wav(b""), "the sound is empty"),
        (wav(SOUND_BYTES[:200]), "the sound lasts 6.2 ms; a model needs at least 25 ms"),
        (wav(SOUND_BYTES, rate=1), "the header says 1 samples a second; known are 1,000 to 384,000"),
        (wav(SOUND_BYTES, rate=2**31 - 1), "the header says 2,147,483,647 samples a second"),
        (wav(SOUND_BYTES, rate=0), "no sound"),
        (b"RIFF", "the WAV ends inside its header"),
        (b"", "the file is empty"),
        (b"no sound at all", "this is no sound that can be read .*; save it as one of WAV"),
        (picture(), "no sound"),
        (picture("WEBP"), "no sound"),
        (sound(form="AIFF"), "sounds of format AIFF are not read"),
        (sound(np.array([np.nan] * 1000, np.float32), subtype="FLOAT"), "samples that are NaN or infinite"),
        (sound(np.array([0.1] * 999 + [np.inf], np.float32), subtype="FLOAT"), "samples that are NaN or infinite"),
        (sound(tone(440, 16_000) * 32767, subtype="FLOAT"), "samples of 16,384; as floats they go from -1 to 1"),
        (sound(np.full(1000, 1e300), subtype="DOUBLE"), "NaN or infinite"),
    ],
)
def test_what_is_no_sound_or_lies_about_itself_is_said(content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_media(content, "audio")


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "IMA_ADPCM"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_a_sound_that_was_cut_short_is_found(form: str, subtype: str | None) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000).astype(np.float32)
    content = sound(noise, form=form, subtype=subtype)
    assert said_of(content, "audio") == ""
    for share in (0.1, 0.5, 0.9):
        assert said_of(content[: int(len(content) * share)], "audio")


def test_a_flac_that_does_not_say_its_length_is_refused() -> None:
    content = bytearray(sound(form="FLAC"))
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # the last 36 bits before the MD5 sum
    assert "s by its header" in said_of(bytes(content), "audio")


def test_an_hour_of_silence_in_a_small_file_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "LONGEST_S", 1.0)
    assert "the sound lasts 20 s by its header; at most 1 s are read" in said_of(sound(np.zeros(320_000), form="FLAC"), "audio")


def good_and_bad(rows: list[ReadRow]) -> list[Any]:
    return [row.row or row.error for row in rows]


def read_table(path: Path, **options: Any) -> list[Any]:
    return good_and_bad(list(read_rows(cut(find_files(str(path))), **options)))


def test_a_table_of_paths_names_each_bad_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(picture())
    (tmp_path / "in" / "cut.jpg").write_bytes(noisy_picture("JPEG")[:900])
    (tmp_path / "out").symlink_to("/etc")
    paths = ["in/good.png", "in/cut.jpg", "in/none.png", "in", "../up.png", "out/passwd", "http://a.b/c.png", "x" * 5000, "cut\0.png"]
    table = tmp_path / "rows.csv"
    table.write_text("image,label\n" + "".join(f"{path},a\n" for path in paths))
    good, *bad = read_table(table)
    assert good == {"image": str(tmp_path / "in" / "good.png"), "label": "a"}
    said = [
        "'image' 'in/cut.jpg': the picture cannot be decoded",
        "'image' 'in/none.png': there is no such file",
        "'image' 'in': this is not a file",
        "'image' '../up.png' leads out of",
        "'image' 'out/passwd' is a link that leads out of",
        "'image' 'http://a.b/c.png' is an address, which is not fetched",
        "cannot be looked up (File name too long)",
        "NUL character",
    ]
    for error, expected in zip(bad, said, strict=True):
        assert expected in error
        assert len(error) < 600


def test_a_parquet_table_of_datasets_has_bytes_or_paths(tmp_path: Path) -> None:
    good, lie = wav(SOUND_BYTES), wav(SOUND_BYTES, said=9_000)
    (tmp_path / "a.wav").write_bytes(good)
    cells = [
        {"bytes": good, "path": "x.wav"},
        {"bytes": None, "path": "a.wav"},
        {"bytes": lie, "path": "a.wav"},
        {"bytes": b"", "path": ""},
    ]
    pq.write_table(pa.table({"audio": cells, "label": [0, 1, 0, 1]}), tmp_path / "rows.parquet")
    first, second, third, fourth = read_table(tmp_path / "rows.parquet")
    assert first == {"audio": good, "label": "0"}
    assert second == {"audio": str(tmp_path / "a.wav"), "label": "1"}
    assert third == "the WAV's 'data' chunk says 9,000 bytes and there are 8,000; it was cut short"
    assert "must be the bytes of a file or a path" in fourth


def test_a_bad_file_of_a_class_folder_is_a_bad_row(tmp_path: Path) -> None:
    for name, content in {"cat/1.png": picture(), "cat/2.png": b"", "dog/3.png": b"text", "dog/4.png": png_header(10**5, 10**5)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    good, empty, text, bomb = read_table(tmp_path)
    assert good == {"image": str(tmp_path / "cat" / "1.png"), "label": "cat"}
    assert (empty, text[:18], bomb[:22]) == ("the file is empty", "this is no picture", "the picture has over 1")


def test_a_path_in_a_table_of_an_object_store_is_beside_that_table(tmp_path: Path) -> None:
    (tmp_path / "bucket" / "set" / "in").mkdir(parents=True)
    (tmp_path / "bucket" / "set" / "in" / "a.png").write_bytes(picture())
    table = tmp_path / "bucket" / "set" / "rows.jsonl"
    table.write_text("".join(f'{{"image": "in/{name}.png", "label": 1}}\n' for name in "ab"))
    store = SubTreeFileSystem(str(tmp_path), LocalFileSystem())  # whose paths have no root, like those of S3
    file = DataFile("s3://bucket/set/rows.jsonl", "bucket/set/rows.jsonl", store, table.stat().st_size, None, "jsonl")
    good, bad = good_and_bad(list(read_rows([Part(file)])))
    assert good == {"image": "s3://bucket/set/in/a.png", "label": "1"}
    assert read_media(good["image"], store) == picture()
    assert bad == "'image' 'in/b.png': there is no such file"


def test_rows_of_texts_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hone.data.rows.check_media", None)
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1, "image": "none.png"}\n')
    assert read_table(tmp_path / "rows.jsonl", shape="labelled-text") == [{"text": "a", "label": "1"}]


WHOLE = {
    "image": [picture(), *(noisy_picture(form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP")), noisy_picture("JPEG", progressive=True)],
    "audio": [
        wav(SOUND_BYTES),
        *(sound(tone(440, 16_000, 0.1), form=form) for form in ("FLAC", "OGG", "MP3")),
        sound(tone(440, 16_000, 0.1), subtype="FLOAT"),
        sound(tone(440, 16_000, 0.1), form="WAVEX"),
    ],
}
SIGNATURES = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"fLaC", b"OggS", b"ID3"]
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def is_decoded_or_refused(content: bytes) -> None:
    """With both, as files have any name; the check and the decoding say the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = {kind: said_of(content, kind) for kind in WHOLE}
        with contextlib.suppress(DataError):
            assert load_image(content).mode == "RGB"
        with contextlib.suppress(DataError):
            made = load_audio(content, sampling_rate=16_000)
            assert said["audio"] == ""
            assert len(made)
            assert np.isfinite(made).all()


@FUZZ
@given(st.binary(max_size=400), st.sampled_from(SIGNATURES))
def test_no_bytes_crash_a_decoder(content: bytes, signature: bytes) -> None:
    is_decoded_or_refused(signature + content)


@FUZZ
@given(st.sampled_from(WHOLE["image"] + WHOLE["audio"]), st.data())
def test_no_change_of_a_good_file_crashes_a_decoder(content: bytes, data: st.DataObject) -> None:
    changed = bytearray(content)
    in_header = st.integers(0, min(200, len(content) - 1))
    for at in data.draw(st.lists(in_header | st.integers(0, len(content) - 1), max_size=8)):
        changed[at] = data.draw(st.integers(0, 255))
    is_decoded_or_refused(bytes(changed[: data.draw(st.none() | st.integers(0, len(content)))]))
