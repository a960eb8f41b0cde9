"""Clusters of long-tailed image embeddings: SP²OT, P²OT and balanced OT beside k-means.

    python -m benchmarks.transport_clustering SHARDS... [--embedder efficientnet_lite0:128] [--seeds 3]

Reads WebDataset shards with `.png` and `.cls`, embeds the images, clusters them into as many clusters as
there are classes, and prints class-averaged accuracy under the best matching, accuracy, NMI, and class
averages of head, medium
and tail: mean and deviation over seeds. k-means is scikit-learn's, k-means++ and one start a seed, on the
same normalised embeddings.
"""

import argparse
import io
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans

from benchmarks.machine import print_machine
from curated_data.embedding.embedders import resolve_embedder
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.transport_clustering import cluster_embeddings


def embedded(shards: list[str], embedder_name: str) -> tuple[np.ndarray, np.ndarray]:
    embedder = resolve_embedder(embedder_name)
    images, labels = [], []
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                content = archive.extractfile(member).read()
                if member.name.endswith(".png"):
                    pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
                    images.append(torch.from_numpy(pixels).permute(2, 0, 1))
                elif member.name.endswith(".cls"):
                    labels.append(int(content))
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), 128):
            batch = torch.stack([embedder.preprocess(image) for image in images[start : start + 128]])
            parts.append(embedder(batch).float())
    return torch.cat(parts).numpy(), np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--embedder", default="efficientnet_lite0:128")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="file for the embeddings, read if it is there")
    arguments = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    if arguments.keep and arguments.keep.exists():
        stored = np.load(arguments.keep)
        x, y = stored["x"], stored["y"]
    else:
        x, y = embedded(arguments.shards, arguments.embedder)
        if arguments.keep:
            np.savez(arguments.keep, x=x, y=y)
    counts = np.bincount(y)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    methods = {
        "k-means": lambda seed: KMeans(len(counts), n_init=1, random_state=seed).fit_predict(unit),
        **{
            name: lambda seed, m=m: cluster_embeddings(x, len(counts), method=m, seed=seed).assignment
            for name, m in (("balanced OT", "ot"), ("P²OT", "p2ot"), ("SP²OT", "sp2ot"))
        },
    }
    print(
        f"{len(y)} images, {len(counts)} classes of {counts.max()} to {counts.min()}, {arguments.seeds} "
        f"seeds\n"
    )
    print("| method | class average | accuracy | NMI | head | medium | tail | CPU s a run |")
    print("|---|---|---|---|---|---|---|---|")
    for name, method in methods.items():
        start, rows = time.process_time(), []
        for seed in range(arguments.seeds):
            result = clustering(method(seed), y, train_counts=counts)
            rows.append([result.class_accuracy, result.accuracy, result.nmi, *result.groups.values()])
        seconds = (time.process_time() - start) / arguments.seeds
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(np.mean(rows, 0), np.std(rows, 0))]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
