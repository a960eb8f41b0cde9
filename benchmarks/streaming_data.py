"""What the stream's benchmark reads: photo-like JPEGs in shards, and the same in each peer's own format."""

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.machine import made
from curated_data.pool import ShardPool, ShardWriter

N_SAMPLES, N_SHARDS, SIDE = 20_000, 20, 256


def a_tenth() -> np.ndarray:
    """The 10 % that are selected."""
    return np.sort(np.random.default_rng(0).choice(N_SAMPLES, N_SAMPLES // 10, replace=False))


def make_shards(folder: Path) -> None:
    """The shards; what is there already is kept."""

    def make(target: Path) -> None:
        print(f"making {N_SAMPLES} JPEGs in {folder}")
        with ShardWriter(target, max_samples=N_SAMPLES // N_SHARDS) as writer:
            for i, data in enumerate(photos()):
                writer.write({"__key__": f"{i:06d}", "jpg": data, "cls": i % 100})

    made(folder / "tar", make)
    pool = ShardPool(str(folder / "tar" / "shard-*.tar"), cache_dir=folder / "cache")
    size = pool.sizes(np.arange(N_SAMPLES), ["jpg"]).mean()
    print(f"{len(pool)} samples in {len(pool.urls)} shards, {size / 1e3:.1f} KB a JPEG", flush=True)


def make_formats(folder: Path, names: list[str]) -> None:
    """What each peer reads, from the shards; what is there already is kept."""
    pool = ShardPool(str(folder / "tar" / "shard-*.tar"), cache_dir=folder / "cache")

    def samples() -> Iterator[tuple[int, bytes]]:
        for start in range(0, N_SAMPLES, 500):
            yield from enumerate((s["jpg"] for s in pool.read(range(start, start + 500), ["jpg"])), start)

    def images(target: Path) -> None:
        for i, data in samples():
            path = target / f"class-{i // 200:03d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def mosaic(target: Path) -> None:
        import streaming

        with streaming.MDSWriter(out=str(target), columns={"jpg": "bytes"}, size_limit=1 << 26) as writer:
            for _, data in samples():
                writer.write({"jpg": data})

    def litdata(target: Path) -> None:
        from litdata import optimize

        optimize(
            fn=functools.partial(_read_file, str(folder / "images")),
            inputs=list(range(N_SAMPLES)),
            output_dir=str(target),
            chunk_bytes="64MB",
            num_workers=1,
        )

    made(folder / "images", images)
    if "mosaicml-streaming" in names:
        made(folder / "mds", mosaic)
    if "litdata" in names:
        made(folder / "litdata", litdata)


def _read_file(images: str, i: int) -> bytes:
    return Path(images, f"class-{i // 200:03d}", f"{i:06d}.jpg").read_bytes()


def photos() -> Iterator[bytes]:
    """JPEGs with the spectrum of photographs (amplitude about 1 / frequency), colours, and some edges."""
    rng = np.random.default_rng(0)
    canvases = []
    for _ in range(6):
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(1024), np.fft.rfftfreq(1024), indexing="ij"))
        frequency[0, 0] = 1
        noise = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
        layers = np.fft.irfft2(noise / frequency**1.1)
        layers /= layers.std(axis=(1, 2), keepdims=True)
        canvas = 0.8 * layers[:1] + 0.3 * layers[1:] + 0.5 * np.sign(layers[1:2] + 0.3)
        canvases.append(np.moveaxis(canvas, 0, 2))
    for _ in range(N_SAMPLES):
        canvas = canvases[rng.integers(len(canvases))]
        top, left = rng.integers(0, 1024 - SIDE, 2)
        tone = canvas[top : top + SIDE, left : left + SIDE, rng.permutation(3)]
        image = np.clip(tone * rng.uniform(30, 60) + rng.uniform(90, 160), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(60, 91)))
        yield buffer.getvalue()
