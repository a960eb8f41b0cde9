"""Whether the settings that `curated-data tune` takes are better on labels that it has not seen.

    python -m benchmarks.pools --out FOLDER                  # make the pools, once
    python -m benchmarks.tuning --pools FOLDER               # 30 draws of 300 labels per pool

For each draw the settings are chosen by its labels. Then their gain in class entropy over the default is
estimated from all other labels, on the tree on which they were chosen and on those of another seed. `best` is
what has the most gain by all labels.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.balance import embedded, is_text
from benchmarks.machine import print_machine
from curated_data import curate_embeddings
from curated_data.cache.artifacts import atomic_write_json
from curated_data.config import load_config
from curated_data.pipeline.tune import SETTINGS, Chances, chances, compare, verdict
from curated_data.programs import described_parser


def main() -> None:
    """A row per pool; what a pool's settings select is kept in FOLDER."""
    parser = described_parser(__doc__)
    parser.add_argument("--pools", type=Path, required=True, help="made by benchmarks.pools")
    parser.add_argument("--only", nargs="+", help="pools (default: all of images)")
    parser.add_argument("--share", type=float, default=0.1, help="to select (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=300, help="per draw (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=30, help="of labels (default: %(default)s)")
    parser.add_argument("--embedder", default="efficientnet_lite0:64", help="(default: %(default)s)")
    options = parser.parse_args()
    logging.getLogger("curated_data").setLevel(logging.WARNING)
    print_machine()
    torch.set_num_threads(1)
    head = ("pool", "changes the default", "of these better, same tree", "another", "mean gain, same tree",
            "another", "most gain taken, another tree", "best")  # fmt: skip
    print("| " + " | ".join(head) + " |" + "\n" + "|---" * len(head) + "|")
    names = options.only or sorted(file.parent.name for file in options.pools.glob("*/pool.npz"))
    for name in names:
        if options.only or not is_text(options.pools / name):
            print(row(name, options), flush=True)


def row(name: str, options: argparse.Namespace) -> str:
    """Of the table."""
    x, labels, *_ = embedded(options.pools / name, options.embedder)
    found = [selected(name, options, x, seed) for seed in (0, 1)]
    everything = [{line.name: line for line in compare(one, labels)} for one in found]
    best = max(everything[1].values(), key=lambda line: line.gain)
    rng = np.random.default_rng(0)
    gains, greedy = [], []
    for _ in range(options.draws):
        shown = rng.choice(len(labels), options.labels, replace=False)
        hidden = labels.copy()
        hidden[shown] = -1
        given = np.full_like(labels, -1)
        given[shown] = labels[shown]
        rows = compare(found[0], given)
        chosen = verdict(rows)[0].name
        most = max(rows, key=lambda line: line.gain).name
        held_out = [{line.name: line.gain for line in compare(one, hidden)} for one in found]
        greedy.append(held_out[1][most])
        if chosen != "default":
            gains.append([one[chosen] for one in held_out])
    table = np.array(gains).reshape(-1, 2)
    better = [f"{int((table[:, k] > 0).sum())}" for k in (0, 1)]
    means = [f"{table[:, k].mean():+.3f}" if len(table) else "" for k in (0, 1)]
    cells = [name, f"{len(table)} of {options.draws}", *better, *means]
    cells += [f"{np.mean(greedy):+.3f}", f"{best.name} {best.gain:+.3f}"]
    return "| " + " | ".join(cells) + " |"


def selected(name: str, options: argparse.Namespace, x: np.ndarray, seed: int) -> dict[str, Chances]:
    """What each setting selects of a pool."""
    kept = options.pools / name / f"tuning_{options.embedder.replace(':', '_')}_{options.share}_{seed}.json"
    if not kept.exists():
        config = load_config({"target_size": round(options.share * len(x)), "seed": seed})
        with tempfile.TemporaryDirectory() as cache:
            tried = chances(lambda settings: curate_embeddings(x, settings, cache_dir=cache), config, len(x))
        atomic_write_json(kept, {one: [way.settings, way.chance.tolist()] for one, way in tried.items()})
    content = json.loads(kept.read_text())
    return {one: Chances(content[one][0], np.array(content[one][1])) for one in SETTINGS}


if __name__ == "__main__":
    main()
