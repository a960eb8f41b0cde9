"""Pools of sounds as pictures of their spectrograms: speech by language, notes by instrument."""

import io
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import wavfile
from scipy.signal import spectrogram

from benchmarks.pools.base import SIZE, Labelled, debian, split

Parts = tuple[Labelled, Labelled]


def picture_of_sound(wave: np.ndarray, rate: int) -> np.ndarray:
    """Log-power spectrogram of 128 ms frames up to 8 kHz, the lowest frequency at the foot."""
    wave = wave.astype(np.float64)
    wave = wave if wave.ndim == 1 else wave.mean(axis=1)
    wave = np.pad(wave, (0, max(0, rate // 4 - len(wave))))
    frequencies, _, power = spectrogram(wave, rate, nperseg=512, noverlap=384)
    level = 10 * np.log10(power[frequencies <= 8000] + 1e-9)
    level = np.clip((level - level.max() + 70) / 70, 0, 1)
    image = Image.fromarray((255 * level[::-1]).astype(np.uint8)).resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR
    )
    return np.asarray(image.convert("RGB"))


def speech(folder: Path) -> Parts:
    """Numbers spoken by espeak-ng, by language; pitch, speed and voice vary."""
    rng = np.random.default_rng(0)
    table = subprocess.run(["espeak-ng", "--voices"], check=True, capture_output=True, text=True).stdout
    # Greenlandic ("kl") ends espeak-ng 1.51 with a segmentation fault on some numbers.
    languages = sorted({line.split()[1] for line in table.splitlines()[1:]} - {"kl"})[::4]

    def say(language: str, number: int, pitch: int, speed: int, voice: int) -> np.ndarray:
        command = ["espeak-ng", "-v", f"{language}+{'mf'[voice % 2]}{voice // 2 % 4 + 1}", "-p", f"{pitch}"]
        command += ["-s", f"{speed}", "--stdout", f"{number}"]
        sound = subprocess.run(command, check=True, capture_output=True).stdout
        rate = int.from_bytes(sound[24:28], "little")
        return picture_of_sound(np.frombuffer(sound[44:], np.int16)[: 2 * rate], rate)

    largest, names, jobs = 700, [], []
    order = rng.permutation(len(languages))
    for language, place in zip(languages, order.tolist()):
        n = round(largest * 50 ** (-place / (len(languages) - 1))) + 20
        names += [language] * n
        jobs += [
            (language, int(rng.integers(0, 1000)), int(rng.integers(20, 80)), int(rng.integers(130, 220)),
             int(rng.integers(0, 8)))
            for _ in range(n)
        ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        items = list(pool.map(lambda job: say(*job), jobs))
    return split(items, names)


def notes(folder: Path, seed: int = 0) -> Parts:
    """Notes of a General MIDI soundfont by instrument family, 16 of them; pitch, loudness and length vary."""
    rng = np.random.default_rng(0)
    soundfont = next(debian("timgm6mb-soundfont", folder).rglob("*.sf2"))
    items, names = [], []
    step = 1.5  # seconds from note to note
    for program in range(128):
        events = [
            (int(rng.integers(36, 90)), int(rng.integers(50, 127)), rng.uniform(0.2, 1.2)) for _ in range(110)
        ]
        with tempfile.TemporaryDirectory() as scratch:
            midi, wav = Path(scratch) / "notes.mid", Path(scratch) / "notes.wav"
            midi.write_bytes(midi_of(program, events, step))
            subprocess.run(
                ["fluidsynth", "-ni", "-r", "16000", "-F", wav, soundfont, midi],
                check=True,
                capture_output=True,
            )
            rate, wave = wavfile.read(wav)
        for place in range(len(events)):
            start = round(place * step * rate)
            items.append(picture_of_sound(wave[start : start + round(1.3 * rate)], rate))
            names.append(f"{program // 8}")
    return split(items, names, seed, 50)


def midi_of(program: int, events: list[tuple[int, int, float]], step: float) -> bytes:
    """A MIDI file of one track: 480 ticks a quarter of half a second."""
    ticks = lambda seconds: round(seconds * 960)  # noqa: E731
    track = io.BytesIO()

    def write(delta: int, message: list[int]) -> None:
        parts = [delta & 0x7F]
        while delta := delta >> 7:
            parts.insert(0, delta & 0x7F | 0x80)
        track.write(bytes(parts) + bytes(message))

    write(0, [0xC0, program])
    for pitch, loudness, length in events:
        write(0, [0x90, pitch, loudness])
        write(ticks(length), [0x80, pitch, 0])
        write(ticks(step) - ticks(length), [0xB0, 64, 0])
    write(0, [0xFF, 0x2F, 0])
    body = track.getvalue()
    head = b"MThd" + (6).to_bytes(4, "big") + bytes([0, 0, 0, 1]) + (480).to_bytes(2, "big")
    return head + b"MTrk" + len(body).to_bytes(4, "big") + body
