"""Folders of one file a record: pictures, sound and text."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from format_samples import SAMPLES, png, read, sine, write_wav
from PIL import Image, ImageOps
from wav_samples import chunk, extensible_fmt, fmt, riff

from conclave.base.errors import BadInputError
from conclave.data.formats.config import WavFolderConfig
from conclave.data.values.config import PictureConfig
from conclave.data.values.kinds import group_number
from conclave.data.values.log_mel import log_mel, mel_bands
from conclave.data.values.picture import picture_from
from conclave.data.values.schema import ImageSchema, TextSchema

DRAW = np.random.default_rng(0)
PICTURE = {"kind": "image-folder", "height": 4, "width": 5, "labels": ["cat", "dog"]}
SOUND = {"kind": "wav-folder", "rate": 8000, "seconds": 0.5, "classes": 2}
DAMAGED_PICTURE = "must be an undamaged picture (PNG, JPEG or BMP)"
DAMAGED_SOUND = "must be an undamaged WAV file of PCM samples or floats"


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def reasons(data):
    return {row.where: row.why for row in data.bad}


def test_pictures_take_their_label_from_their_sub_folder(tmp_path):
    grey = DRAW.integers(0, 256, (4, 4, 5)).astype(np.uint8)
    for number, (label, suffix, kind) in enumerate(
        [("cat", "png", "PNG"), ("cat", "BMP", "BMP"), ("dog", "Png", "PNG"), ("dog", "bmp", "BMP")]
    ):
        put(tmp_path, f"{label}/{number}.{suffix}", png(grey[number], kind))
    put(tmp_path, "cat/notes.txt", b"no picture, and none by its name")
    put(tmp_path, "cat/.DS_Store.png", b"another program's")
    put(tmp_path, ".trash/9.png", b"another program's")
    data = read(tmp_path, **PICTURE)
    assert data.schema == ImageSchema(image=(1, 4, 5), classes=2)
    np.testing.assert_array_equal(data.records["image"][:, 0].numpy(), grey.astype(np.float32) / 255)
    assert data.records["label"].tolist() == [0, 0, 1, 1]
    assert set(data.records) == {"image", "label"}
    assert data.bad == ()


def test_pictures_become_grey_or_coloured_and_are_resized(tmp_path):
    colour = np.zeros((8, 10, 3), dtype=np.uint8)
    colour[:, :5] = 200, 100, 50
    put(tmp_path, "cat/1.png", png(colour))
    coloured = read(tmp_path, **PICTURE, channels=3).records["image"][0]
    assert coloured.shape == (3, 4, 5)
    torch.testing.assert_close(coloured[:, :, 0], torch.tensor([[200.0], [100.0], [50.0]]).expand(3, 4) / 255)
    assert (coloured[:, :, 4] == 0).all()
    assert ((coloured[:, :, 2] > 0.0) & (coloured[:, :, 2] < torch.tensor([[200.0], [100.0], [50.0]]) / 255)).all()
    grey = read(tmp_path, **PICTURE).records["image"][0]
    luma = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255  # ITU-R 601
    torch.testing.assert_close(grey[0, :, 0], torch.full((4,), luma), atol=1 / 255, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_pictures_of_16_bits_keep_them(channels, tmp_path):
    deep = DRAW.integers(0, 65536, (4, 5)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    put(tmp_path, "cat/1.png", png(deep))
    image = read(tmp_path, **PICTURE, channels=channels).records["image"][0]
    np.testing.assert_allclose(image.numpy(), np.stack([deep / 65535] * channels), atol=1e-6)
    large = read(tmp_path, **PICTURE | {"height": 9, "width": 9}).records["image"]
    assert (large.min(), large.max()) >= (0.0, 0.0)
    assert float(large.max()) <= 1.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_usual_mode_of_colour_can_be_read(mode, tmp_path):
    path = tmp_path / "cat" / ("1.jpg" if mode == "CMYK" else "1.png")
    path.parent.mkdir()
    image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    image.save(path, transparency=bytes([0, 255])) if mode == "P" else image.save(path)
    for channels in (1, 3):
        data = read(tmp_path, **PICTURE, channels=channels)
        torch.testing.assert_close(data.records["image"], torch.ones(1, channels, 4, 5), atol=0.02, rtol=0)


ARROW = np.zeros((4, 5), dtype=np.uint8)  # no two of its eight turns look alike
ARROW[0, :], ARROW[1, 0], ARROW[3, 4] = 255, 128, 64
TURNS = {  # what a viewer does to what is stored: EXIF 2.32, 4.6.4, rows and columns of the stored picture
    1: ARROW, 2: ARROW[:, ::-1], 3: ARROW[::-1, ::-1], 4: ARROW[::-1],
    5: ARROW.T, 6: ARROW[::-1].T, 7: ARROW[::-1, ::-1].T, 8: ARROW[:, ::-1].T,
}  # fmt: skip


def turned(orientation: object, kind: str = "PNG", mode: str = "L", array: np.ndarray = ARROW) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(array)
    image = image if mode == "I;16" else image.convert(mode)
    image.save(file, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_was_held(orientation, kind):
    config = PictureConfig(height=TURNS[orientation].shape[0], width=TURNS[orientation].shape[1])
    content = turned(orientation, kind)
    found = picture_from(content, config)[0]
    np.testing.assert_allclose(found, TURNS[orientation] / 255, atol=0.05 if kind == "JPEG" else 1e-6)
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(image), dtype=np.float32) / 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_every_mode_are_turned_before_they_are_resized(mode):
    wide = np.zeros((10, 20), dtype=np.uint16 if mode == "I;16" else np.uint8)
    wide[:, :10] = np.iinfo(wide.dtype).max  # the left half is above once it is upright
    found = picture_from(turned(6, mode=mode, array=wide), PictureConfig(height=20, width=10))[0]
    np.testing.assert_allclose(found, np.repeat([[1.0], [0.0]], 10, axis=0) * np.ones(10), atol=1e-6)
    small = picture_from(turned(6, mode=mode, array=wide), PictureConfig(height=4, width=4, channels=3))
    assert small[:, 0].min() > 0.99
    assert small[:, 3].max() < 0.01


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_what_is_no_orientation_leaves_a_picture_as_it_is(orientation):
    found = picture_from(turned(orientation), PictureConfig(height=4, width=5))
    np.testing.assert_array_equal(found[0], ARROW.astype(np.float32) / 255)


def test_damaged_exif_leaves_a_picture_as_it_is():
    whole = turned(6, "JPEG")
    at = whole.index(b"Exif\0\0") + 6
    for damage in (b"XX", b"MM\xff\xff\xff\xff\xff\xff", b"II*\0\xff\xff\xff\x7f"):
        content = whole[:at] + damage + whole[at + len(damage) :]
        found = picture_from(content, PictureConfig(height=4, width=5))
        np.testing.assert_allclose(found[0], ARROW / 255, atol=0.05)


def test_of_several_pictures_in_a_file_the_first_is_taken():
    """Telephones write two into a JPEG file (MPO), browsers several into PNG files that move (APNG)."""
    for kind in ("MPO", "PNG"):
        file = io.BytesIO()
        Image.fromarray(ARROW).convert("RGB").save(
            file, kind, save_all=True, append_images=[Image.new("RGB", (5, 4), "white")], quality=100
        )
        found = picture_from(file.getvalue(), PictureConfig(height=4, width=5))
        np.testing.assert_allclose(found[0], ARROW / 255, atol=0.05)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_is_dropped_and_lays_nothing_over_a_background(mode):
    """The colours that are stored count, also where nothing of them is seen."""
    hidden = Image.new("RGBA", (5, 4), (200, 200, 200, 0))
    file = io.BytesIO()
    if mode == "P":
        hidden.convert("RGB").quantize(2).save(file, "PNG", transparency=0)
    else:
        hidden.convert(mode).save(file, "PNG")
    for channels in (1, 3):
        found = picture_from(file.getvalue(), PictureConfig(height=4, width=5, channels=channels))
        np.testing.assert_allclose(found, 200 / 255, atol=1e-6)


def bomb() -> bytes:
    """A PNG file of less than 1 kB that says it has 50,000 × 50,000 pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_every_kind_of_bad_picture_is_told_apart_and_left_out(tmp_path):
    good = png(np.zeros((4, 5), dtype=np.uint8))
    files = {
        "cat/1 empty.png": (b"", DAMAGED_PICTURE),
        "cat/2 text.jpg": (b"no picture", DAMAGED_PICTURE),
        "cat/3 cut.png": (png(DRAW.integers(0, 256, (20, 30)).astype(np.uint8))[:400], DAMAGED_PICTURE),
        "cat/4 bomb.png": (bomb(), DAMAGED_PICTURE),
        "cat/5 large.png": (png(np.zeros((30, 40), np.uint8)), "must be a picture of at most 1199 pixels"),
        "cat/6 gif.png": (png(np.zeros((4, 5), np.uint8), "GIF"), DAMAGED_PICTURE),
        "cat/7 tiff.png": (png(np.zeros((4, 5), np.uint8), "TIFF"), DAMAGED_PICTURE),
        "mouse/8.png": (good, "the label must be one of labels, or a number below classes"),
        "9.png": (good, "must lie in a sub-folder that is named like its label"),
        "dog/10.png": (good, None),
    }
    for name, (content, _) in files.items():
        put(tmp_path, name, content)
    data = read(tmp_path, **PICTURE, max_pixels=1199)
    assert reasons(data) == {name: why for name, (_, why) in files.items() if why is not None}
    assert data.records["label"].tolist() == [1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_damaged_pictures_are_bad_rows_or_read_but_never_a_traceback(kind, tmp_path):
    whole = png(DRAW.integers(0, 256, (12, 10, 3)).astype(np.uint8), kind)
    put(tmp_path, "cat/0.png", whole)
    for trial in range(1, 150):
        content = bytearray(whole)
        if trial % 3 == 0:
            del content[DRAW.integers(len(content)) :]
        for place in DRAW.integers(len(whole), size=1 + trial % 4):
            content[place % max(len(content), 1) : place % max(len(content), 1) + 1] = bytes([DRAW.integers(256)])
        put(tmp_path, f"cat/{trial}.png", content)
    data = read(tmp_path, **PICTURE, channels=3)
    assert len(data.bad) + len(data.records["image"]) == 150
    assert {row.why for row in data.bad} <= {DAMAGED_PICTURE, "must be a picture of at most 67108864 pixels"}
    assert 0 < len(data.bad) < 150
    assert ((data.records["image"] >= 0) & (data.records["image"] <= 1)).all()


def test_groups_of_pictures_are_folders_within_the_labels_or_files(tmp_path):
    path, document = SAMPLES["image-folder"](tmp_path)
    data = read(path, "group", **document)
    assert data.records["label"].tolist() == [0, 0, 1, 1]
    assert data.records["group"].tolist() == [group_number(name) for name in ("ann", "eve", "ann", "bob")]
    put(path, "cat/1.png", png(np.zeros((4, 5), dtype=np.uint8)))
    data = read(path, "group", **document)
    assert reasons(data) == {"cat/1.png": "must lie in a folder of its group"}
    data = read(path, "group", **document | {"group_by": "file"})
    assert data.records["group"].tolist()[0] == group_number("cat/1.png")
    assert len(data.records["group"].unique()) == 5


def test_names_may_tell_label_and_group(tmp_path):
    good = png(np.zeros((4, 5), dtype=np.uint8))
    for name in ("x/dog-ann-1.png", "y/z/cat-bob.png", "cat-.png", "bird-ann.png", "other.png", "dog-ann-1x.png"):
        put(tmp_path, name, good)
    data = read(tmp_path, "group", **PICTURE, pattern=r"(?P<label>[a-z]+)-(?P<group>[a-z]*)(-\d+)?")
    assert reasons(data) == {
        "bird-ann.png": "the label must be one of labels, or a number below classes",
        "cat-.png": "the group is missing, must be given",
        "dog-ann-1x.png": "must have a name that pattern fits",
        "other.png": "must have a name that pattern fits",
    }
    assert data.records["label"].tolist() == [1, 0]
    assert data.records["group"].tolist() == [group_number("ann"), group_number("bob")]
    for file in tmp_path.glob("*.png"):
        file.unlink()
    data = read(tmp_path, "group", **PICTURE, pattern=r"(?P<label>[a-z]+)-.*", group_by="folder")
    assert data.records["group"].tolist() == [group_number("x"), group_number("y")]
    data = read(tmp_path, "record", **PICTURE | {"labels": ["x", "y"]}, pattern=r".*-(?P<group>[a-z]+)(-\d+)?")
    assert data.records["label"].tolist() == [0, 1]
    assert "group" in data.records


@pytest.mark.parametrize("kind", ["image-folder", "wav-folder", "text-folder"])
def test_all_that_lies_below_a_persons_folder_is_one_group(kind, tmp_path):
    """In studies and sides of several labels, and whatever form of Unicode a file system keeps."""
    places = ("1/jos\u00e9/left/a", "1/jos\u00e9/right/2020/b", "0/jose\u0301/c", "0/eve/d/d")
    for place in places:
        place = place.partition("/")[2] if kind == "text-folder" else place
        if kind == "wav-folder":
            write_wav(tmp_path / f"{place}.wav", np.zeros(4000, dtype=np.int64))
        else:
            content = png(np.zeros((4, 5), np.uint8)) if kind == "image-folder" else b"abcd"
            put(tmp_path, f"{place}.{'png' if kind == 'image-folder' else 'txt'}", content)
    document = {
        "image-folder": PICTURE | {"labels": ["0", "1"]},
        "wav-folder": SOUND,
        "text-folder": {"kind": kind, "window": 4},
    }
    data = read(tmp_path, "group", **document[kind], group_by="folder")
    assert sorted(data.records["group"].tolist()) == sorted(map(group_number, ["jos\u00e9"] * 3 + ["eve"]))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_every_width_gives_the_same_picture(width, channels, tmp_path):
    sound = sine(1000)
    stored = np.round(sound * (2 ** (8 * width - 1) - 1)) + (128 if width == 1 else 0)
    stored = stored.astype(np.int64)
    if channels == 2:  # the mean of both is the sound
        stored = np.stack([stored, stored], axis=1)
    write_wav(tmp_path / "1" / "a.wav", stored, width=width)
    data = read(tmp_path, **SOUND)
    assert data.schema == ImageSchema(image=(1, 32, 30), classes=2)
    assert data.records["label"].tolist() == [1]
    truth = picture_by_hand(sound, **SOUND)
    image = data.records["image"][0, 0].numpy()
    loud = truth > 0.6  # 32 dB below full scale: rounding to 8 bits makes a floor of noise at -50 dB
    np.testing.assert_allclose(image[loud], truth[loud], atol=0.01)
    assert (image[~loud] < 0.6).all()
    if width > 2:
        np.testing.assert_allclose(image, truth, atol=0.02)


def test_two_channels_are_mixed(tmp_path):
    left, right = (np.round(sine(hertz) * 32767).astype(np.int64) for hertz in (500, 2000))
    write_wav(tmp_path / "1" / "a.wav", np.stack([left, right], axis=1))
    image = read(tmp_path, **SOUND).records["image"][0, 0].numpy()
    truth = picture_by_hand((left + right) / 2 / 32768, **SOUND)
    np.testing.assert_allclose(image, truth, atol=1e-3)


def picture_by_hand(sound, *, rate, seconds, mels=32, fft=256, hop=128, **_):
    """The formula written out: every frame's windowed Fourier sum, every band's triangle, decibels of full scale."""
    samples = round(rate * seconds)
    sound = np.concatenate([sound[:samples], np.zeros(max(0, samples - len(sound)))])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft) / fft)
    corner = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, 2595 * np.log10(1 + rate / 1400), mels + 2)]
    frames = []
    for start in range(0, samples - fft + 1, hop):
        part = sound[start : start + fft] * window
        power = []
        for k in range(fft // 2 + 1):
            total = (part * np.exp(-2j * np.pi * k * np.arange(fft) / fft)).sum() * 2 / window.sum()
            power.append(abs(total) ** 2)
        band = []
        for m in range(mels):
            total = 0.0
            for k, p in enumerate(power):
                f = k * rate / fft
                rising = (f - corner[m]) / (corner[m + 1] - corner[m])
                falling = (corner[m + 2] - f) / (corner[m + 2] - corner[m + 1])
                total += p * max(0.0, min(rising, falling))
            band.append(min(1.0, max(0.0, 1 + 10 * np.log10(max(total, 1e-30)) / 80)))
        frames.append(band)
    return np.array(frames).T


@pytest.mark.parametrize("options", [{}, {"mels": 20, "fft": 128, "hop": 100}, {"mels": 8, "fft": 512, "hop": 512}])
def test_the_picture_is_the_documented_formula(options):
    sound = DRAW.normal(0, 0.1, 4000) + sine(700)
    config = WavFolderConfig(**SOUND | {"kind": "wav-folder"} | options)
    picture = log_mel(torch.from_numpy(sound).float(), config)
    truth = picture_by_hand(sound, **SOUND | options)
    assert picture.shape == (1, config.mels, config.frames) == (1, *truth.shape)
    np.testing.assert_allclose(picture[0].numpy(), truth, atol=1e-4)


def test_silence_is_0_and_a_full_sine_on_a_bands_middle_is_1():
    config = WavFolderConfig(**SOUND)
    assert (log_mel(torch.zeros(4000), config) == 0).all()
    bands = mel_bands(8000, 256, 32)
    band, place = divmod(int(bands.argmax()), bands.shape[1])
    loud = log_mel(torch.from_numpy(sine(place * 8000 / 256, amplitude=1.0)).float(), config)[0]
    assert (loud.argmax(dim=0) == band).all()
    assert (loud[band] > 0.98).all()
    assert float(loud.max()) <= 1.0


def test_sound_is_cut_or_followed_by_silence(tmp_path):
    for name, seconds in (("short", 0.25), ("exact", 0.5), ("long", 3.0)):
        write_wav(tmp_path / "1" / f"{name}.wav", np.round(sine(1000, seconds=seconds) * 32767).astype(np.int64))
    exact, long, short = read(tmp_path, **SOUND).records["image"][:, 0]
    assert torch.equal(exact, long)
    assert torch.equal(short[:, :14], exact[:, :14])
    assert (short[:, 16:] == 0).all()


def test_other_rates_are_bad_rows_unless_they_are_resampled(tmp_path):
    for rate in (8000, 4000, 16_000, 44_100):
        write_wav(tmp_path / "1" / f"{rate:05}.wav", np.round(sine(500, rate=rate) * 32767).astype(np.int64), rate=rate)
    data = read(tmp_path, **SOUND)
    assert reasons(data) == {f"1/{rate:05}.wav": "must have 8000 samples a second" for rate in (4000, 16_000, 44_100)}
    data = read(tmp_path, **SOUND, resample=True)
    assert data.bad == ()
    slow, right, *fast = data.records["image"][:, 0, :, :29]  # the last frame may lack a sample
    loud = right > 0.5
    for other in (slow, *fast):
        torch.testing.assert_close(other[loud], right[loud], atol=0.04, rtol=0)


def test_what_is_resampled_ends_where_the_sound_ends(tmp_path):
    """A sound that stops while it is loud: the last value must not go on as a constant."""
    write_wav(tmp_path / "1" / "a.wav", np.full(4000, 20_000), rate=16_000)
    image = read(tmp_path, **SOUND, resample=True).records["image"][0, 0]
    assert (image[:, 16:] == 0).all()
    assert (image[0, :14] > 0.5).all()


@pytest.mark.parametrize(("width", "silence"), [(1, 128), (2, 0), (3, 0), (4, 0)])
def test_silence_of_every_width_is_silence(width, silence, tmp_path):
    write_wav(tmp_path / "1" / "a.wav", np.full(4000, silence), width=width)
    assert (read(tmp_path, **SOUND).records["image"] == 0).all()


def test_a_sound_is_what_its_samples_are_however_they_are_stored(tmp_path):
    """The headers are in :mod:`test_formats_wav`; here a float file and one under the longer header become pictures."""
    sound = np.round(sine(1000) * (2**23 - 1)).astype(np.int64)
    write_wav(tmp_path / "1" / "0.wav", sound, width=3)
    stored = (tmp_path / "1" / "0.wav").read_bytes()
    raw, floats = stored[44:], (sound / 2**23).astype("<f4").tobytes()
    put(tmp_path, "1/1.wav", riff(extensible_fmt(1, bits=24), chunk(b"data", raw)))
    put(tmp_path, "1/2.wav", riff(fmt(3, bits=32), chunk(b"data", floats)))
    pictures = read(tmp_path, **SOUND).records["image"]
    assert len(pictures) == 3
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_every_kind_of_bad_sound_is_told_apart_and_left_out(tmp_path):
    write_wav(tmp_path / "0" / "good.wav", np.round(sine(1000) * 32767).astype(np.int64))
    good = (tmp_path / "0" / "good.wav").read_bytes()
    write_wav(tmp_path / "0" / "silent.wav", np.zeros(0, dtype=np.int64))
    silent = (tmp_path / "0" / "silent.wav").read_bytes()
    too_short = "must have the samples that it announces, and one at least"
    floats = good[:20] + b"\x03\x00" + good[22:]
    files = {
        "0/cut.wav": (good[:3000], too_short),
        "0/silent.wav": (silent, too_short),
        "0/empty.wav": (b"", DAMAGED_SOUND),
        "0/text.wav": (b"no sound", DAMAGED_SOUND),
        "0/header.wav": (good[:30], DAMAGED_SOUND),
        "0/floats.wav": (floats, "must have samples of 8, 16, 24 or 32 bits, or floats of 32 or 64"),
        "7/label.wav": (good, "the label must be one of labels, or a number below classes"),
        "nowhere.wav": (good, "must lie in a sub-folder that is named like its label"),
    }
    for name, (content, _) in files.items():
        put(tmp_path, name, content)
    data = read(tmp_path, **SOUND)
    assert reasons(data) == {name: why for name, (_, why) in files.items()}
    assert len(data.records["image"]) == 1


def test_damaged_sounds_never_end_in_a_traceback(tmp_path):
    write_wav(tmp_path / "1" / "0.wav", np.round(sine(1000, seconds=0.01) * 32767).astype(np.int64))
    whole = (tmp_path / "1" / "0.wav").read_bytes()
    for trial in range(1, 300):
        content = bytearray(whole)
        for place in DRAW.integers(48, size=1 + trial % 4):
            content[place] = DRAW.integers(256)
        put(tmp_path, f"1/{trial}.wav", content)
    data = read(tmp_path, **SOUND, resample=True)
    assert len(data.bad) + len(data.records["image"]) == 300
    assert 0 < len(data.bad) < 300
    assert data.records["image"].isfinite().all()


def test_text_files_are_cut_into_windows_and_each_is_a_group(tmp_path):
    path, document = SAMPLES["text-folder"](tmp_path)
    put(path, "short.txt", b"abc")
    put(path, "empty.txt", b"")
    put(path, "picture.png", b"no text by its name")
    data = read(path, "group", **document)
    assert data.schema == TextSchema(window=4)
    texts = (b"that is the question", b"To be, or not to be")
    expected = [text[i : i + 4] for text in texts for i in range(0, len(text) - 3, 4)]
    assert [bytes(row.tolist()) for row in data.records["text"]] == expected
    assert data.records["group"].tolist() == [group_number("2.TXT")] * 5 + [group_number("ann/1.txt")] * 4
    assert set(data.records) == {"text", "group"}
    short = "must have the 4 bytes of a window at least"
    assert reasons(data) == {"empty.txt": short, "short.txt": short}
    by_folder = read(path, "group", **document, group_by="folder")
    assert set(by_folder.records["group"].tolist()) == {group_number("ann")}
    assert by_folder.bad[0].why == "must lie in a folder of its group"
    by_name = read(path, "group", **document, pattern=r"(?P<group>\d).*")
    assert set(by_name.records["group"].tolist()) == {group_number("1"), group_number("2")}


def test_marks_that_editors_put_before_text_are_no_text(tmp_path):
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        put(tmp_path, f"{encoding}.txt", "abcdefgh".encode(encoding))
    data = read(tmp_path, kind="text-folder", window=4)
    assert [bytes(row.tolist()) for row in data.records["text"]] == [b"abcd", b"efgh"]
    assert reasons(data) == dict.fromkeys(
        ["utf-16.txt", "utf-32.txt"], "must be text in UTF-8, not UTF-16 or UTF-32: save it as that"
    )


@pytest.mark.parametrize("name", ["image-folder", "wav-folder", "text-folder"])
def test_what_is_no_folder_of_such_files_is_one_sentence(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    with pytest.raises(BadInputError, match="must be a folder"):
        read(tmp_path / "missing", **document)
    file = next(file for file in path.rglob("*") if file.is_file())
    with pytest.raises(BadInputError, match="must be a folder"):
        read(file, **document)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="must be a file or a folder with files that end in"):
        read(tmp_path / "empty", **document)


@pytest.mark.parametrize("name", ["image-folder", "wav-folder", "text-folder"])
def test_a_pipe_is_not_waited_for_and_a_broken_link_is_no_file(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    before = read(path, **document)
    suffix = next(file for file in path.rglob("*") if file.is_file()).suffix
    os.mkfifo(path / f"0{suffix}")
    (path / f"1{suffix}").symlink_to(tmp_path / "nothing")
    after = read(path, **document)
    assert all(torch.equal(tensor, after.records[key]) for key, tensor in before.records.items())
    assert after.bad == before.bad
