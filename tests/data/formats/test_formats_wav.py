"""WAV files as recorders, editors and streams write them; what the standard library's reader can read, it is asked."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from wav_samples import GUID, chunk, ds64, extensible_fmt, fmt, riff

from conclave.data.values.rows import BadValueError
from conclave.data.values.wav import wav_of

DRAW = np.random.default_rng(0)
VALUES = DRAW.integers(-(2**15), 2**15, 500)
RAW = VALUES.astype("<i2").tobytes()
TRUTH = (VALUES / 2**15)[:, np.newaxis]
DAMAGED = "must be an undamaged WAV file of PCM samples or floats"
PLAIN = riff(fmt(), chunk(b"data", RAW))
FEWER = "must have the samples that it announces, and one at least"
OTHER_WIDTH = "must have samples of 8, 16, 24 or 32 bits, or floats of 32 or 64"
STREAM = 0xFFFFFFFF
DATA, STREAMED = chunk(b"data", RAW), chunk(b"data", RAW, size=STREAM)
INFO = chunk(b"LIST", b"INFO")
NOT_FINITE = np.array([0, np.nan], "<f4").tobytes()


def samples(content: bytes) -> np.ndarray:
    wav = wav_of(content)
    return wav.samples(content, wav.frames)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        riff(chunk(b"bext", bytes(5000)), fmt(), DATA),
        riff(chunk(b"JUNK", bytes(70_001)), chunk(b"LIST", b"INFOISFT"), fmt(), chunk(b"fact", bytes(4)), DATA),
        riff(chunk(b"odd ", b"abc"), fmt(), DATA),
        riff(chunk(b"odd ", b"abc", pad=False), fmt(), DATA),
        riff(chunk(b"note", b"data and fmt are words"), fmt(), DATA, INFO),
        riff(extensible_fmt(), DATA),
        riff(extensible_fmt(valid=12), DATA),
        riff(chunk(b"bext", bytes(5000)), extensible_fmt(), DATA),
        riff(fmt(), STREAMED, size=STREAM),
        riff(fmt(), chunk(b"data", RAW, size=0), size=0),
        riff(fmt(), chunk(b"data", RAW, size=0x7FFFF000), size=0x7FFFF024),
        riff(fmt(), chunk(b"data", RAW, size=0x80000000)),
        riff(fmt(), chunk(b"data", RAW + b"\x01", size=STREAM, pad=False)),
        riff(ds64(1000), fmt(), STREAMED, name=b"RF64", size=STREAM),
        riff(ds64(1000), fmt(), STREAMED, INFO, name=b"BW64", size=STREAM),
        riff(ds64(1000, (b"big ", 6)), chunk(b"big ", b"sixsix", size=STREAM), fmt(), STREAMED, name=b"RF64"),
        riff(ds64(0), fmt(), STREAMED, name=b"RF64"),
        riff(fmt(), fmt(bits=8, rate=1), DATA, chunk(b"data", b"another")),
        PLAIN + b"ID3 and what else was put at the end",
    ],
)  # fmt: skip
def test_the_same_samples_are_found_under_every_header(content):
    wav = wav_of(content)
    assert (wav.rate, wav.channels, wav.width, wav.frames) == (8000, 1, 2, 500)
    np.testing.assert_array_equal(samples(content), TRUTH)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_what_the_standard_library_reads_is_read_alike(width, channels):
    raw = DRAW.integers(0, 256, 40 * width * channels, dtype=np.uint8).tobytes()
    content = riff(fmt(bits=8 * width, channels=channels), chunk(b"data", raw))
    with wave.open(io.BytesIO(content)) as other:
        assert (other.getnframes(), other.getnchannels()) == (40, channels)
        read = other.readframes(40)
    assert read == raw
    whole = [read[at : at + width] for at in range(0, len(read), width)]
    numbers = [one[0] - 128 if width == 1 else int.from_bytes(one, "little", signed=True) for one in whole]
    truth = np.array(numbers).reshape(40, channels) / 2 ** (8 * width - 1)
    np.testing.assert_array_equal(samples(content), truth)
    np.testing.assert_array_equal(samples(riff(extensible_fmt(bits=8 * width, channels=channels), content[36:])), truth)


@pytest.mark.parametrize("bits", [32, 64])
def test_floats_are_read_and_cut_off_at_full_scale(bits):
    raw = np.array([0.0, 0.25, -1.0, 1.5, -3e30]).astype(f"<f{bits // 8}").tobytes()
    for header in (fmt(3, bits=bits), extensible_fmt(3, bits=bits)):
        assert samples(riff(header, chunk(b"data", raw)))[:, 0].tolist() == [0.0, 0.25, -1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (riff(fmt(6, bits=8), DATA), f"{DAMAGED}, not A-law"),
        (riff(fmt(7, bits=8), DATA), f"{DAMAGED}, not mu-law"),
        (riff(extensible_fmt(7, bits=8), DATA), f"{DAMAGED}, not mu-law"),
        (riff(fmt(2, bits=4), DATA), f"{DAMAGED}, not ADPCM"),
        (riff(fmt(0x55, bits=0), DATA), f"{DAMAGED}, not MP3"),
        (riff(fmt(0x1234), DATA), f"{DAMAGED}, not another encoding"),
        (riff(extensible_fmt(tail=GUID[::-1]), DATA), f"{DAMAGED}, not another encoding"),
        (riff(fmt(), DATA, name=b"RIFX"), f"{DAMAGED}, little-endian (RIFF, not RIFX)"),
        (riff(fmt(bits=64), DATA), OTHER_WIDTH),
        (riff(fmt(3), DATA), OTHER_WIDTH),
        (riff(fmt(), chunk(b"data", b"")), FEWER),
        (riff(fmt(), chunk(b"data", b""), INFO), FEWER),
        (riff(fmt(), chunk(b"data", b"\1", pad=False)), FEWER),
        (riff(fmt(), chunk(b"data", RAW, size=2000)), FEWER),
        (PLAIN[:-1], FEWER),
        (riff(fmt(3, bits=32), chunk(b"data", NOT_FINITE)), "must have samples that are finite numbers"),
        (riff(DATA, fmt()), DAMAGED),
        (riff(fmt()), DAMAGED),
        (riff(chunk(b"fmt ", bytes(8)), DATA), DAMAGED),
        (riff(fmt(channels=0), DATA), DAMAGED),
        (riff(chunk(b"ds64", bytes(8)), fmt(), DATA), DAMAGED),
        (riff(*[chunk(b"JUNK", b"")] * 100_000, fmt(), DATA), DAMAGED),
        (b"", DAMAGED),
        (b"RIFF\0\0\0\0AVI LIST", DAMAGED),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_to_be_what_it_is(content, why):
    with pytest.raises(BadValueError) as caught:
        samples(content)
    assert str(caught.value) == why


def test_only_as_much_as_is_needed_is_made_of_a_long_sound():
    content = riff(fmt(channels=2), chunk(b"data", bytes(4 * 1_000_000)))
    wav = wav_of(content)
    assert wav.frames == 1_000_000
    assert wav.samples(content, 10).shape == (10, 2)


def test_damaged_headers_are_one_sentence():
    header = riff(chunk(b"bext", bytes(30)), extensible_fmt(), ds64(1000), chunk(b"data", RAW[:40]))
    read = 0
    for trial in range(3000):
        content = bytearray(header[: DRAW.integers(len(header))] if trial % 3 == 0 else header)
        for place in DRAW.integers(len(header), size=1 + trial % 4):
            content[place : place + 1] = bytes([DRAW.integers(256)])
        try:
            found = samples(bytes(content))
        except BadValueError:
            continue
        read += 1
        assert np.isfinite(found).all()
        assert (np.abs(found) <= 1.0).all()
    assert 0 < read < 3000
