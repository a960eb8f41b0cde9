"""Pools of text: glosses by topic, descriptions of packages by section."""

import subprocess
from pathlib import Path

import numpy as np

from benchmarks.pools.base import Labelled, debian, split

Parts = tuple[Labelled, Labelled]


def glosses_of(folder: Path) -> list[tuple[str, str]]:
    """(gloss, topic) of every noun of WordNet."""
    root = debian("wordnet-base", folder) / "usr/share/wordnet"
    entries = [line for line in (root / "data.noun").read_text().splitlines() if line[:1] != " "]
    return [(line.split("|", 1)[1].strip(), line.split()[1]) for line in entries]


def glosses(folder: Path) -> Parts:
    """Glosses of WordNet's nouns by topic."""
    texts, names = zip(*glosses_of(folder))
    kept = np.random.default_rng(0).permutation(len(texts))[:9000]
    return split([texts[row] for row in kept], [names[row] for row in kept], most=5000)


def packages(folder: Path) -> Parts:
    """Descriptions of Debian's packages by section."""
    dump = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    texts, names = [], []
    for entry in dump.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line and line[0] != " ")
        if "Section" in fields and (text := fields.get("Description") or fields.get("Description-en")):
            texts.append(text)
            names.append(fields["Section"].split("/")[-1])
    kept = np.random.default_rng(0).permutation(len(texts))[:9000]
    return split([texts[row] for row in kept], [names[row] for row in kept], most=5000)
