"""Clustering a long-tailed set by training: SP²OT, P²OT and balanced OT from one pretrained backbone.

    python -m benchmarks.deep_clustering --seeds 3 --out deep_clustering.json

For each seed SimCLR pretrains a small ResNet on the long-tailed Fashion-MNIST shards of recipes/data, without
labels; from its weights each method trains the last blocks and its prototypes, as the papers do from DINO's.
Held-out images (balanced) are then clustered by the best head and compared with their classes, beside k-means
on the same starting features. k-NN (k = 10, bank: the training images) says what became of the features.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.machine import print_machine
from benchmarks.pretraining import Images, Labelled, build, fit, load, score
from lightning_modules import SP2OT
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.online import embed_share, evaluation_mode
from lightning_modules.pretraining.base import PretrainingModule

N_CLUSTERS = 10
NETWORK = {
    "backbone": "resnet18",
    "image_size": 28,
    "small_images": True,
    "backbone_options": {"width": 16},
    "augmentation": {"jitter": [0.4, 0.4, 0.0, 0.0], "grey": 0.0, "scale": [0.3, 1.0]},  # images are grey
}
Sets = tuple[Images, Images]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--frozen-blocks", type=int, default=3, help="of the ResNet's 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keep what is measured; a second run continues from it")
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(options.threads)
    kept = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    sets = load("fashion-lt50-train-*.tar"), load("fashion-test-*.tar")
    for seed in range(options.seeds):
        if str(seed) not in kept:
            kept[str(seed)] = run(sets, seed, options)
            if options.out:
                options.out.write_text(json.dumps(kept, indent=1))
        print(f"seed {seed}: {json.dumps(kept[str(seed)])}", flush=True)
    print("\n| method | class average | NMI | ARI | 10-NN | CPU minutes |\n|---|---|---|---|---|---|")
    for method in kept["0"]:
        rows = np.array([kept[str(seed)][method] for seed in range(options.seeds)])
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(rows.mean(0), rows.std(0), strict=True)]
        print(f"| {method} | {' | '.join(cells)} |")


def run(sets: Sets, seed: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Each method's figures from one pretraining."""
    L.seed_everything(seed, verbose=False)
    simclr, batch_size, _ = build("simclr", len(sets[0][0]), **NETWORK)
    seconds = fit(simclr, sets[0][0], batch_size, options.pretraining_epochs)
    began = time.process_time()
    train, test = (features(simclr, *some) for some in sets)
    unit = [torch.nn.functional.normalize(some, dim=1).numpy() for some in (train, test)]
    found = KMeans(N_CLUSTERS, n_init=1, random_state=seed).fit(unit[0]).predict(unit[1])
    minutes = (time.process_time() - began) / 60
    figures = {
        "k-means on SimCLR's features": row(found, sets, simclr, minutes),
        "(SimCLR itself)": [float("nan")] * 3 + [score(simclr, *sets)[10], seconds / 60],
    }
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "simclr.pt"
        torch.save(simclr.backbone.net.state_dict(), weights)
        for name, method in (("balanced OT", "ot"), ("P²OT", "p2ot"), ("SP²OT", "sp2ot")):
            L.seed_everything(seed, verbose=False)
            module = SP2OT(
                N_CLUSTERS,
                **NETWORK,
                method=method,
                pretrained=str(weights),
                frozen_blocks=options.frozen_blocks,
                buffer_size=1280,
            )
            seconds = fit(module, sets[0][0], 128, options.epochs)
            with evaluation_mode(module):
                loader = DataLoader(Labelled(*sets[1], module), 256)
                found = torch.cat([module.assign(batch["image"]) for batch in loader]).numpy()
            figures[name] = row(found, sets, module, seconds / 60)
    return figures


def row(found: np.ndarray, sets: Sets, module: PretrainingModule, minutes: float) -> list[float]:
    agreement = clustering(found, sets[1][1].numpy())
    return [agreement.class_accuracy, agreement.nmi, agreement.ari, score(module, *sets)[10], minutes]


def features(module: PretrainingModule, images: Tensor, labels: Tensor) -> Tensor:
    with evaluation_mode(module):
        return embed_share(module, Labelled(images, labels, module))[0]


if __name__ == "__main__":
    main()
