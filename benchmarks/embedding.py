"""Embedding on a CPU: `embed_pool` beside the network alone, a DataLoader, and lightly-train's `embed`.

    python -m benchmarks.embedding                                     # EfficientNet-Lite0 at 64 px
    python -m benchmarks.embedding --embedder efficientnet_lite0:224 --samples 256
    python -m benchmarks.embedding --timm vit_tiny_patch16_224 --size 64    # of timm, with random weights

Images per CPU second of one thread, the best of several rounds. The network alone is given tensors, in
batches of 4 to 256 and both memory formats; the best of these, by turns with the others, is the limit. What
`embed_pool` does beside it is to read, decode, resize, check and store: its share of the limit counts that
too. lightly-train embeds PNG files by the same network of timm, if it is installed. The last table is in
seconds on the clock, on all cores: with threads that each embed their own pieces of a batch, and with all
cores in each operation.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torchvision.io import ImageReadMode, decode_image

from curated_data import ShardPool
from curated_data.cache.artifacts import open_cache
from curated_data.embedding import ModuleEmbedder, resolve_embedder
from curated_data.embedding.embedders import ImagePreprocess
from curated_data.embedding.extract import embed_pool
from curated_data.programs import described_parser

DATA = Path(__file__).parents[1] / "recipes" / "data" / "fashion-lt50"
SIZES = (4, 8, 32, 256)
FORMATS = {"rows": torch.contiguous_format, "channels_last": torch.channels_last}


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--embedder", default="efficientnet_lite0:64")
    parser.add_argument("--timm", help="instead of --embedder, a network of timm")
    parser.add_argument("--size", type=int, default=224, help="of the images, with --timm")
    parser.add_argument("--samples", type=int, default=1000, help="of the network alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    embedder = of_timm(options.timm, options.size) if options.timm else resolve_embedder(options.embedder)
    assert isinstance(embedder, ModuleEmbedder)
    embedder.eval()
    pool = ShardPool(sorted(DATA.glob("fashion-lt50-train-*.tar"))[:1], num_workers=0)
    shape = embedder.preprocess(torch.zeros(3, 28, 28, dtype=torch.uint8)).shape
    inputs = torch.rand(options.samples, *shape)

    def plain() -> None:
        samples = pool.read(range(len(pool)), ["png"])
        images = [embedder.preprocess(decode(sample["png"])) for sample in samples]
        with torch.inference_mode():
            for batch in torch.utils.data.DataLoader(images, batch_size=256):  # type: ignore[arg-type]
                embedder(batch)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            embed_pool(pool, embedder, open_cache(folder), num_workers=0, device="cpu")

    alone: dict[str, Callable[[], object]] = {}
    for name, memory_format in FORMATS.items():
        for size in SIZES:
            parts = inputs.contiguous(memory_format=memory_format).split(size)
            forward(embedder, parts[:1])
            alone[f"network alone, batches of {size}, {name}"] = partial(forward, embedder, parts)
    found = by_turns(alone, len(inputs), options.rounds)
    best = max(found, key=found.__getitem__)
    with tempfile.TemporaryDirectory() as folder:
        whole: dict[str, Callable[[], object]] = {"a DataLoader of batches of 256": plain, "embed_pool": ours}
        if options.timm and find_spec("lightly_train"):
            peer = lightly_train(pool, options.timm, options.size, Path(folder))
            whole["lightly-train's `embed`"] = peer
        whole[best] = lambda: [alone[best]() for _ in range(len(pool) // len(inputs) + 1)]
        n = {name: len(pool) for name in whole} | {best: len(inputs) * (len(pool) // len(inputs) + 1)}
        found |= by_turns(whole, n, options.rounds)
    limit = found[best]
    print(f"{embedder.name}, inputs of {tuple(shape)}, one thread")
    print("| way | images per CPU second | share of the limit |")
    print("|---|---|---|")
    for name, images in found.items():
        print(f"| {name} | {images:.0f} | {images / limit:.2f} |")

    if cores > 1:
        torch.set_num_threads(cores)

        def threaded(own: bool) -> None:
            embedder.thread_safe = own
            ours()

        ways = {"a piece for each thread": True, "all threads in each operation": False}
        clocked = by_turns(
            {name: partial(threaded, own) for name, own in ways.items()},
            len(pool),
            options.rounds,
            time.perf_counter,
        )
        print(f"\n{embedder.name}, {cores} threads")
        print("| embed_pool with | images per second |")
        print("|---|---|")
        for name, images in clocked.items():
            print(f"| {name} | {images:.0f} |")


def by_turns(
    ways: Mapping[str, Callable[[], object]],
    n: int | Mapping[str, int],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Of n images, those of a second in the best round of each way."""
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, run in ways.items():
            before = clock()
            run()
            images = n if isinstance(n, int) else n[name]
            best[name] = max(best[name], images / (clock() - before))
    return best


def forward(network: torch.nn.Module, parts: tuple[torch.Tensor, ...]) -> None:
    with torch.inference_mode():
        for part in parts:
            network(part)


def of_timm(name: str, size: int) -> ModuleEmbedder:
    """A network with random weights for images of any size."""
    sizes = {"img_size": size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=0, **sizes)
    return ModuleEmbedder(network, ImagePreprocess(size), name=name, thread_safe=True)


def lightly_train(pool: ShardPool, name: str, size: int, folder: Path) -> Callable[[], object]:
    """lightly-train's `embed` of the pool as files, by a checkpoint of an epoch of 32 images."""
    import lightly_train as peer

    few = folder / "few"
    few.mkdir()
    for number, sample in enumerate(pool.read(range(len(pool)), ["png"])):
        file = folder / "all" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(sample["png"])
        if number < 32:
            os.link(file, few / file.name)
    common = {"num_workers": 0, "accelerator": "cpu", "overwrite": True}
    arguments = {"img_size": size} if "vit" in name else {}
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        peer.pretrain(
            out=folder / "out",
            data=few,
            model=f"timm/{name}",
            model_args={"pretrained": False, **arguments},
            method="simclr",
            epochs=1,
            batch_size=16,
            transform_args={"image_size": (size, size)},
            **common,
        )
    checkpoint = folder / "out" / "checkpoints" / "last.ckpt"
    return lambda: peer.embed(
        out=folder / "rows.pt", data=folder / "all", checkpoint=checkpoint, image_size=size, **common
    )


def decode(data: bytes) -> torch.Tensor:
    """An image file as uint8 (3, H, W)."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


if __name__ == "__main__":
    main()
