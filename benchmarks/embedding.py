"""Embedding on a CPU: `embed_pool` beside the network alone and a plain loop over a DataLoader, in one run.

    python -m benchmarks.embedding                                     # EfficientNet-Lite0 at 64 px, one core
    python -m benchmarks.embedding --embedder efficientnet_lite0:224 --samples 300

Images per CPU second, the best of several rounds. The network alone is given tensors, in batches of 4 to 256
and both memory formats; its best is the limit. What `embed_pool` does beside it is to read, decode, resize,
check and store: its share of the limit counts that too.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_image

from curated_data import ShardPool
from curated_data.cache.artifacts import open_cache
from curated_data.embedding import resolve_embedder
from curated_data.embedding.extract import embed_pool
from curated_data.programs import described_parser

DATA = Path(__file__).parents[1] / "recipes" / "data" / "fashion-lt50"


def rate(run: Callable[[], object], n: int, rounds: int) -> float:
    """Of n images, those of a CPU second in the best round."""
    best = 0.0
    for _ in range(rounds):
        before = time.process_time()
        run()
        best = max(best, n / (time.process_time() - before))
    return best


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--embedder", default="efficientnet_lite0:64")
    parser.add_argument("--samples", type=int, default=1000, help="of the network alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    embedder = resolve_embedder(options.embedder)
    assert isinstance(embedder, torch.nn.Module)
    network = embedder.eval()
    shards = sorted(DATA.glob("fashion-lt50-train-*.tar"))[:1]
    pool = ShardPool(shards, num_workers=0)
    example = embedder.preprocess(torch.zeros(3, 28, 28, dtype=torch.uint8))
    inputs = torch.rand(options.samples, *example.shape)

    alone: dict[tuple[int, str], float] = {}
    with torch.inference_mode():
        for name, form in (("rows", torch.contiguous_format), ("channels_last", torch.channels_last)):
            for size in (4, 8, 32, 256):
                parts = inputs.contiguous(memory_format=form).split(size)
                network(parts[0])
                alone[size, name] = rate(
                    lambda parts=parts: [network(part) for part in parts], len(inputs), options.rounds
                )

    def plain() -> None:
        samples = pool.read(range(len(pool)), ["png"])
        images = [embedder.preprocess(decode(sample["png"])) for sample in samples]
        with torch.inference_mode():
            for batch in torch.utils.data.DataLoader(images, batch_size=256):  # type: ignore[arg-type]
                network(batch)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            embed_pool(pool, embedder, open_cache(folder), num_workers=0, device="cpu")

    limit = max(alone.values())
    print(f"{options.embedder}, inputs of {tuple(example.shape)}, one thread; images per CPU second")
    print("| way | images/s | share of the limit |")
    print("|---|---|---|")
    for (size, name), found in alone.items():
        print(f"| network alone, batches of {size}, {name} | {found:.0f} | {found / limit:.2f} |")
    for name, run in (("a DataLoader of batches of 256", plain), ("embed_pool", ours)):
        found = rate(run, len(pool), options.rounds)
        print(f"| {name} | {found:.0f} | {found / limit:.2f} |")


def decode(data: bytes) -> torch.Tensor:
    """An image file as uint8 (3, H, W)."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


if __name__ == "__main__":
    main()
