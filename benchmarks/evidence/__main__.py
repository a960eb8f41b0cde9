"""Does training gain from what is selected? See the package's docstring."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.balance import embed
from benchmarks.evidence import training
from benchmarks.evidence.figure import draw
from benchmarks.evidence.gains import KEY, print_table
from benchmarks.evidence.pools import POOLS, pool_of
from benchmarks.evidence.ways import UNTRAINED, WAYS, Asked
from benchmarks.machine import print_machine
from curated_data.cache.publishing import atomic_path
from curated_data.programs import described_parser
from curated_data.selection.metrics import entropy


def main() -> None:
    """Add the lines that are missing, one per training, and print the table of all."""
    options = parse_options()
    torch.set_num_threads(1)
    lines = read_lines(options.out)
    done = {tuple(line[name] for name in KEY) for line in lines}
    for seed in range(options.seeds):  # all ways of a seed before the next: gains are paired
        for name in options.pools:
            for ratio in options.ratios:
                for share in options.shares:
                    for way in options.ways:
                        cell = (name, options.largest, ratio, share, way, options.steps, seed)
                        if cell in done or time.monotonic() > options.until:
                            continue
                        line = dict(zip(KEY, cell)) | measure(cell, options.packages)
                        append(options.out, line)
                        lines.append(line)
                        print(json.dumps(line), flush=True)
    print_table(lines)
    if options.figure:
        shown = [line for line in lines if line["pool"] in options.pools and line["way"] in options.ways]
        draw(shown, options.against).savefig(options.figure, dpi=150)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = described_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="lines that a later run goes on from")
    parser.add_argument("--packages", type=Path, required=True, help="folder that pools are made in")
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[100.0], help="largest class / smallest")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1], help="of the pool, selected")
    parser.add_argument("--largest", type=int, default=1000, help="images of the largest class")
    parser.add_argument("--steps", type=int, default=400, help=f"of {training.BATCH} images (default: 400)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no training after so many")
    parser.add_argument("--figure", type=Path, help="draw the gains of these pools and ways there")
    parser.add_argument("--against", choices=("ratio", "share"), default="ratio")
    options = parser.parse_args()
    options.until = time.monotonic() + 60 * options.minutes
    print_machine()
    return options


def measure(cell: tuple[Any, ...], packages: Path) -> dict[str, Any]:
    """Select, train and evaluate; figures in percent."""
    name, largest, ratio, share, way, steps, seed = cell
    pool = pool_of(name, ratio, largest, packages)
    asked = Asked(
        pool,
        round(share * len(pool.labels)),
        seed,
        lambda: embedded(pool.images, packages / f"evidence_{name}.npz"),
        lambda places: embedded(pool.bank[places], packages / f"evidence_{name}.npz"),
    )
    ids = np.asarray(WAYS[way](asked))
    started = time.process_time()
    net = training.pretrain(training.halved(pool.images[ids]), 0 if way == UNTRAINED else steps, seed)
    seconds = time.process_time() - started
    bank, test = (training.features(net, training.halved(part)) for part in (pool.bank, pool.test))
    figures = training.accuracies(bank, pool.bank_labels, test, pool.test_labels, pool.rarest)
    own = training.features(net, training.halved(pool.images[ids]))
    near = training.neighbours(own, pool.labels[ids], test, pool.test_labels)
    figures |= {"own": 100 * near.mean(), "own_rare": 100 * near[pool.rarest].mean()}
    counts = np.bincount(pool.labels[ids], minlength=pool.n_classes)
    return {
        "selected": len(ids),
        "rare": int(counts[pool.rarest].sum()),
        "entropy": round(entropy(counts), 4),
        **{figure: round(value, 3) for figure, value in figures.items()},
        "cpu_seconds": round(seconds, 1),
    }


def embedded(images: np.ndarray, file: Path, spec: str = "efficientnet_lite0:32") -> np.ndarray:
    """(n, d) float32 of images; kept by their pixels, so that cuts of a pool share them."""
    keys = [image.tobytes() for image in images]
    known: dict[bytes, np.ndarray] = {}
    if file.exists():
        with np.load(file) as content:
            known = {image.tobytes(): row for image, row in zip(content["images"], content["rows"])}
    missing = [place for place, key in enumerate(keys) if key not in known]
    if missing:
        known |= dict(zip((keys[place] for place in missing), embed(images[missing], spec)))
        stored = [np.frombuffer(key, np.uint8).reshape(images.shape[1:]) for key in known]
        with atomic_path(file) as temporary, temporary.open("wb") as target:
            np.savez(target, images=np.stack(stored), rows=np.stack(list(known.values())))
    return np.stack([known[key] for key in keys]).astype(np.float32)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What earlier runs wrote; a last line that a kill cut short is removed."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def append(file: Path, line: dict[str, Any]) -> None:
    """One more line, on disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as target:
        target.write(json.dumps(line) + "\n")
        target.flush()
        os.fsync(target.fileno())


if __name__ == "__main__":
    main()
