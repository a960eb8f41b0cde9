r"""Does dataset B rank architectures as dataset A does? Train each one on both, correlate the accuracies.

    uv run recipes/rank_architectures.py --small            # two halves of Fashion-MNIST's classes
    uv run recipes/rank_architectures.py --b cifar10-lt100  # against a folder of *train*.tar and *test*.tar
    uv run recipes/rank_architectures.py --train-a 'a-train-{00..99}.tar' --test-a a-test.tar \
        --train-b 'b-train-{00..99}.tar' --test-b b-test.tar --image-size 64
    uv run recipes/rank_architectures.py --selection-a curated.npy --selection-b random.npy
    uv run recipes/rank_architectures.py --known published.csv

All trainings have the same number of steps, and so the same budget on datasets of different sizes. Accuracies
are cached: a killed run continues with the next training, and several runs of the same command share the
work. Accuracies given by --known replace trainings: a CSV with the columns model, accuracy_a, accuracy_b (in
0..1; one row per seed; a model without a value for a dataset is trained on it), or JSON, {"a": {model:
accuracy or list}, "b": ...}. Writes accuracies.csv (in that form), ranking.csv, ranking.json, table.md and
ranking.png to --out. The question and the statistics are those of ImageNot (arXiv 2404.02112).

Time: --small takes a few minutes on 2 CPU cores; the six default families need a GPU.
"""

import argparse
import csv
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torchvision.transforms import v2

from curated_data import CuratedDataModule, LoaderOptions
from curated_data.cache.artifacts import fingerprint, open_cache, read_json
from curated_data.cache.locks import locked
from curated_data.cache.paths import local_path
from curated_data.cache.publishing import atomic_path, atomic_write_json
from curated_data.datasets.ranking import SIDES, Data, open_data
from curated_data.errors import ConfigError, CuratedDataError
from curated_data.programs import described_parser
from curated_data.progress import log_to_terminal, progress
from lightning_modules.evaluation.ranking import RankingResult, ranking
from lightning_modules.supervised import Supervised, build_classifier

log = logging.getLogger("rank_architectures")

FASHION = Path(__file__).parent / "data" / "fashion-lt50"

FAMILIES = ["alexnet", "vgg11", "resnet18", "densenet121", "efficientnet_b0", "convnext_tiny"]
SMALL_FAMILIES = ["resnet10:16", "resnet18:16", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5",
                  "regnet_y_400mf"]  # fmt: skip
Accuracies = dict[str, dict[str, list[float]]]  # by side and model, one for each seed


@dataclass(frozen=True)
class Budget:
    """The settings that all trainings share."""

    steps: int
    batch_size: int
    image_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not known, and report; returns 0, or 2 for bad input."""
    options = parse_options(arguments)
    log_to_terminal()
    for noisy in ("lightning", "lightning.pytorch", "lightning.fabric", "curated_data.streaming"):
        logging.getLogger(noisy).setLevel(logging.ERROR)  # they log lines for every training
    try:
        run(options)
    except CuratedDataError as error:
        print(f"rank_architectures: {error}", file=sys.stderr)
        return 2
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, with the defaults of --small."""
    parser = described_parser(__doc__)
    parser.add_argument("--a", help="folder of shards *train*.tar and *test*.tar (default: Fashion-MNIST)")
    parser.add_argument("--b", help="(default: the other half of A's classes, or A's other selection)")
    for side in SIDES:
        parser.add_argument(f"--train-{side}", nargs="+", help="patterns of shards, instead of a folder")
        parser.add_argument(f"--test-{side}", nargs="+", help="likewise")
        parser.add_argument(f"--selection-{side}", help=".npy of the ids to train on (default: all)")
        parser.add_argument(f"--classes-{side}", type=int, nargs="+", help="labels to use (default: all)")
        parser.add_argument(f"--name-{side}", help="for the figure's axis")
        parser.add_argument(f"--n-test-{side}", type=int, help="number of test images of known accuracies")
    parser.add_argument("--architectures", nargs="+", help="names in torchvision; resnet18:16 has width 16")
    parser.add_argument("--known", help="CSV or JSON of accuracies to use instead of trainings")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 0 1 2; with --small: 0)")
    parser.add_argument("--steps", type=int, help="of each training (default: 3000; with --small: 300)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="in pixels (default: %(default)s)")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adamw"])
    parser.add_argument("--learning-rate", type=float, default=0.02, help="peak (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="(default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="quick architectures, few steps, one seed")
    parser.add_argument("--workers", type=int, default=1, help="loader processes (default: %(default)s)")
    parser.add_argument("--cache-dir", default="runs/cache", help="(default: %(default)s)")
    parser.add_argument("--out", default="runs/ranking", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or ([0] if options.small else [0, 1, 2])
    options.steps = options.steps if options.steps is not None else (300 if options.small else 3000)
    return options


def run(options: argparse.Namespace) -> RankingResult:
    """Find the accuracies of every architecture on both datasets, then write statistics, table and figure."""
    budget = Budget(**{name: getattr(options, name) for name in Budget.__dataclass_fields__})
    check_options(options)
    known = (
        read_known(local_path(options.known, "--known")) if options.known else {side: {} for side in SIDES}
    )
    if options.architectures:
        models = options.architectures
    elif options.known:
        models = list(dict.fromkeys(name for side in SIDES for name in known[side]))
    else:
        models = SMALL_FAMILIES if options.small else FAMILIES
    if len(set(models)) < 3 or len(set(models)) < len(models):
        raise ConfigError(f"a ranking needs three architectures or more, each once; got {', '.join(models)}")
    untrained = [name for name in models if not all(known[side].get(name) for side in SIDES)]
    for name in untrained:  # build each once, before hours of training
        try:
            build_classifier(name, 2, image_size=options.image_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    cache = open_cache(options.cache_dir)
    trained = [side for side in SIDES if not all(known[side].get(name) for name in models)]
    data = open_data(options, trained, cache, default=FASHION) if trained else {}
    accuracies = {side: {name: list(known[side].get(name, [])) for name in models} for side in SIDES}
    fill(accuracies, data, budget, options, cache)
    n_test = {side: getattr(options, f"n_test_{side}") for side in SIDES}
    names = {side: getattr(options, f"name_{side}") or side.upper() for side in SIDES}
    for side, opened in data.items():
        n_test[side] = n_test[side] or opened.n_test
        names[side] = getattr(options, f"name_{side}") or opened.name
    try:
        result = ranking(accuracies["a"], accuracies["b"], n_test_a=n_test["a"], n_test_b=n_test["b"],
                         confidence=options.confidence)  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from error
    report(result, accuracies, names, local_path(options.out, "--out"))
    return result


def check_options(options: argparse.Namespace) -> None:
    """Raise a ConfigError that names the first option out of range."""
    for name, least in (("steps", 1), ("batch_size", 2), ("image_size", 1), ("workers", 0)):
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: expected at least {least}, got {getattr(options, name)}")
    if not 0 < options.confidence < 1:
        raise ConfigError(f"--confidence: expected a number between 0 and 1, got {options.confidence}")
    if not options.learning_rate > 0 or not options.weight_decay >= 0:
        raise ConfigError(
            f"--learning-rate {options.learning_rate}, --weight-decay {options.weight_decay}: expected a "
            "positive rate, a decay from 0"
        )
    for side in SIDES:
        if (n_test := getattr(options, f"n_test_{side}")) is not None and n_test < 1:
            raise ConfigError(f"--n-test-{side}: expected at least 1, got {n_test}")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise ConfigError(f"--seeds: expected different numbers from 0, got {options.seeds}")


def read_known(path: Path) -> Accuracies:
    """Accuracies from a CSV or JSON file, in the form described at the top.

    Raises:
        ConfigError: an unreadable file, a column or side that is missing, a cell that is not a number.
    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            return {side: {m: list(map(float, np.atleast_1d(v))) for m, v in content[side].items()}
                    for side in SIDES}  # fmt: skip
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        known: Accuracies = {side: {} for side in SIDES}
        for row in rows:
            for side in SIDES:
                runs = known[side].setdefault(row["model"], [])
                if cell := (row[f"accuracy_{side}"] or "").strip():
                    runs.append(float(cell))
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--known {path}: {type(error).__name__}: {error}; expected a CSV with columns model, "
            'accuracy_a, accuracy_b, or JSON {"a": {model: accuracy or list}, "b": {...}}'
        ) from error
    return known


def fill(
    accuracies: Accuracies, data: Mapping[str, Data], budget: Budget, options: argparse.Namespace, cache: Path
) -> None:
    """Train wherever an accuracy is missing; finished trainings are read from the cache.

    A training that another run is working on is locked: do the others first, then wait for it.
    """
    jobs = {}
    for side, table in accuracies.items():
        for spec in [name for name, runs in table.items() if not runs]:
            for seed in options.seeds:
                of = data[side]
                key = fingerprint(
                    train=of.train.state, test=of.test.state, ids=of.ids, classes=of.classes,
                    architecture=spec, seed=seed, budget=asdict(budget), version=1,
                )  # fmt: skip
                jobs[side, spec, seed] = cache / "accuracies" / f"{key}.json"
    found: dict[tuple[str, str, int], float] = {}
    with progress("training", len(jobs)) as advance:
        for wait in (False, True):
            for job, path in jobs.items():
                if job in found:
                    continue
                side, spec, seed = job
                with locked(path, wait=wait) as held:
                    if path.exists():
                        found[job] = float(read_json(path)["accuracy"])
                    elif held:
                        found[job] = train(spec, data[side], seed, budget, options.workers)
                        content = {"accuracy": found[job], "architecture": spec, "seed": seed}
                        content |= {"dataset": data[side].name, "n_test": data[side].n_test}
                        atomic_write_json(path, content | asdict(budget))
                    else:
                        continue
                log.info("%s on %s, seed %d: accuracy %.3f", spec, data[side].name, seed, found[job])
                advance(note=spec)
    for side, spec, seed in jobs:  # in the order of the seeds
        accuracies[side][spec].append(found[side, spec, seed])


def train(spec: str, data: Data, seed: int, budget: Budget, n_workers: int) -> float:
    """Train once; returns the accuracy on the test images of the dataset's classes."""
    lightning.seed_everything(seed, verbose=False)
    module = Supervised(
        build_classifier(spec, len(data.classes), image_size=budget.image_size),
        data.classes,
        optimizer=budget.optimizer,
        learning_rate=budget.learning_rate,
        weight_decay=budget.weight_decay,
    )
    plain = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    size = [budget.image_size] * 2
    augmentation = [v2.RandomCrop(size, padding=budget.image_size // 8), v2.RandomHorizontalFlip()]
    stream = CuratedDataModule(
        data.train,
        selection=data.ids,
        val_pool=data.test,
        views=v2.Compose([v2.Resize(size), *augmentation, *plain]),
        eval_transform=v2.Compose([v2.Resize(size), *plain]),
        batch_size=min(budget.batch_size, len(data.ids)),
        seed=seed,
        loader=LoaderOptions(num_workers=n_workers, eval_batch_size=256),
    )
    settings: dict[str, Any] = {
        "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # advice about features that are off on purpose
        # Without clipping, networks without normalisation diverge at learning rates that suit the others.
        lightning.Trainer(
            max_epochs=-1,
            max_steps=budget.steps,
            gradient_clip_val=5.0,
            limit_val_batches=0,
            log_every_n_steps=1,
            enable_model_summary=False,
            **settings,
        ).fit(module, stream)
        if not torch.isfinite(module.loss):
            log.warning("%s on %s, seed %d: diverged; lower --learning-rate", spec, data.name, seed)
        lightning.Trainer(**settings).validate(module, stream, verbose=False)
    return module.accuracy


def report(result: RankingResult, accuracies: Accuracies, names: Mapping[str, str], out: Path) -> None:
    """Print the table; write accuracies, statistics and figure, each file atomically."""
    out.mkdir(parents=True, exist_ok=True)
    text = f"A: {names['a']}; B: {names['b']}\n\n{result.table()}\n"
    for swap in result.swaps:
        verdict = "significant" if swap["significant"] else "within noise"
        p_values = f"p {swap['p_a']:.2g} on A, {swap['p_b']:.2g} on B"
        text += f"\n- {' and '.join(swap['models'])} swap: {verdict} ({p_values})"
    Console(width=None if sys.stdout.isatty() else 140).print(Markdown(text))
    for name, write in (
        ("accuracies.csv", lambda path: write_accuracies(path, accuracies)),
        ("ranking.csv", result.to_csv),
        ("ranking.json", result.to_json),
        ("table.md", lambda path: path.write_text(text + "\n")),
        ("ranking.png", lambda path: result.plot(path, name_a=names["a"], name_b=names["b"])),
    ):
        with atomic_path(out / name) as temporary:
            write(temporary)
        print(out / name)


def write_accuracies(path: Path, accuracies: Accuracies) -> None:
    """Write one row for each model and seed, in the form of --known."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "accuracy_a", "accuracy_b"])
        for name, runs in accuracies["a"].items():
            others = accuracies["b"][name]
            for i in range(max(len(runs), len(others))):
                writer.writerow([name, *(r[i] if i < len(r) else "" for r in (runs, others))])


if __name__ == "__main__":
    sys.exit(main())
