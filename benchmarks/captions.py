"""Captions to labels: how fast class names are found, and how often the sense of a name is told right.

    python -m benchmarks.captions speed --wordnet /usr/share/wordnet [--captions 10000000]
    python -m benchmarks.captions senses --wordnet /usr/share/wordnet [--classes 1000 --seed 0]

speed: against regular expressions, captions per CPU second, and agreement. Captions are the glosses of
WordNet's nouns, over and over; classes are the 1,000 nouns with the most captions. The regular expression is
timed on a part of the captions, it is slow.

senses: captions are the example sentences of WordNet, of which it is known in what sense each uses its word
("a rise in the cost of living" for one of the ten senses of "rise"). Classes are noun senses, one of each
word, by names and definition; a sentence that uses the word in another sense (another noun's, a verb's) must
not get its label. Precision and recall of every rule of `label_captions`, with MiniLM.
"""

import argparse
import itertools
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import print_machine
from curated_data.programs import described_parser
from curated_data.selection.captions import CaptionBlock, label_captions
from curated_data.selection.names import CaptionClass, NameMatcher, read_wordnet
from curated_data.selection.text import TextEmbedder, resolve_text_embedder


def main() -> None:
    parser = described_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("speed", "senses"):
        command = commands.add_parser(name)
        command.add_argument("--wordnet", default="/usr/share/wordnet", help="folder of WordNet's data files")
        command.add_argument("--classes", type=int, default=1_000)
        if name == "speed":
            command.add_argument("--captions", type=int, default=10_000_000)
            command.add_argument("--peer-captions", type=int, default=2_000)
        else:
            command.add_argument("--embedder", default="minilm")
            command.add_argument("--seed", type=int, default=0, help="of the choice of senses")
    parsed = parser.parse_args()
    print_machine()
    (speed if parsed.command == "speed" else senses)(parsed)


def speed(parsed: argparse.Namespace) -> None:
    """Print rates and agreement."""
    nouns = read_wordnet(parsed.wordnet)
    glosses = [noun.definition for noun in nouns]
    label = NameMatcher(nouns).match(glosses)
    counts = np.bincount(label[label >= 0], minlength=len(nouns))
    classes = [nouns[i] for i in np.argsort(-counts, kind="stable")[: parsed.classes]]
    matcher = NameMatcher(classes)

    found = np.zeros(2, np.int64)
    seconds = 0.0
    left = parsed.captions
    stream = itertools.cycle(glosses)
    while left:
        block = list(itertools.islice(stream, min(left, 100_000)))
        start = time.process_time()
        label = matcher.match(block)
        seconds += time.process_time() - start
        found += (label >= 0).sum(), (label == NameMatcher.SEVERAL).sum()
        left -= len(block)

    sample = glosses[: parsed.peer_captions]
    start = time.process_time()
    expected = by_expression(matcher, sample)
    peer = len(sample) / (time.process_time() - start)
    rate = parsed.captions / seconds
    agree = (expected == matcher.match(sample)).mean()
    print(f"{len(classes):,} classes with {len(matcher.names):,} names; {parsed.captions:,} captions")
    print(f"{found[0] / parsed.captions:.1%} name one class, {found[1] / parsed.captions:.1%} several")
    print(f"{seconds:.0f} CPU s, {rate:,.0f} captions/s; by expressions {peer:,.0f}/s: x {rate / peer:.0f}")
    print(f"of {len(sample):,} captions both agree on {agree:.2%}")


@dataclass(frozen=True)
class Sense:
    """A synset of WordNet: its words, definition and example sentences."""

    id: str
    words: frozenset[str]
    definition: str
    examples: tuple[str, ...]


def senses(parsed: argparse.Namespace) -> None:
    """Print precision and recall of every rule."""
    torch.set_num_threads(1)
    known = [s for part in ("noun", "verb", "adj", "adv") for s in read_senses(Path(parsed.wordnet), part)]
    users: dict[str, list[Sense]] = defaultdict(list)  # senses of each word that have a sentence with it
    for sense in known:
        for word in sense.words:
            if any(holds(sentence, word) for sentence in sense.examples):
                users[word].append(sense)
    rng = np.random.default_rng(parsed.seed)
    words = sorted(w for w, own in users.items() if len(own) > 1 and any(s.id[0] == "n" for s in own))
    chosen: dict[str, Sense] = {}
    for word in rng.permutation(words).tolist():
        nouns = [s for s in users[word] if s.id[0] == "n"]
        sense = nouns[rng.integers(len(nouns))]
        if len(chosen) < parsed.classes:
            chosen.setdefault(sense.id, sense)
    classes = [CaptionClass(s.id, tuple(sorted(s.words)), s.definition) for s in chosen.values()]
    captions, truth = [], []
    matcher = NameMatcher(classes)
    for sense in known:
        label = matcher.match(sense.examples)
        for i in np.flatnonzero(label >= 0):
            of = classes[label[i]]
            # Another word of the sentence may be a class's name too: in what sense is not known.
            if any(name in sense.words and holds(sense.examples[i], name) for name in of.names):
                captions.append(sense.examples[i])
                truth.append(sense.id == of.id)
    right = np.array(truth)
    others = [CaptionClass(s.id, tuple(sorted(s.words)), s.definition) for s in known]
    print(f"{len(classes):,} classes, one sense of a word each; {len(right):,} sentences with one class's "
          f"word, {right.sum():,} of them in its sense\n")  # fmt: skip
    print("| rule | kept | precision | recall | F1 | classes left |\n|---|---|---|---|---|---|")
    embed = remembered(resolve_text_embedder(parsed.embedder))
    rules: dict[str, dict[str, Any]] = {"every sentence with the word": {"threshold": -1.0}}
    rules |= {f"threshold {t}": {"threshold": t} for t in (0.2, 0.3, 0.4, 0.5, 0.6)}
    rules |= {f"margin {m:g}" + " (default)" * (m == 0): {"margin": m} for m in (-0.1, -0.05, 0.0, 0.05, 0.1)}
    rules["threshold 0.3 and margin 0"] = {"threshold": 0.3, "margin": 0.0}
    for m in (None, 0.0, 0.05):
        rules["nearest of the word's senses" + ("" if m is None else f", margin {m:g}")] = {
            "rivals": others, "margin": m,
        }  # fmt: skip
    for name, rule in rules.items():
        block = CaptionBlock(np.arange(len(captions)), captions)
        found = label_captions([block], classes, embedder=embed, min_per_class=1, **rule)
        hits = right[found.ids].sum()
        precision, recall = hits / max(len(found.ids), 1), hits / right.sum()
        print(f"| {name} | {len(found.ids):,} | {precision:.3f} | {recall:.3f} | "
              f"{2 * hits / (len(found.ids) + right.sum()):.3f} | {len(found.classes)} |")  # fmt: skip


def read_senses(folder: Path, part: str) -> list[Sense]:
    """The synsets of `data.noun`, `data.verb`, ..."""
    found = []
    for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        data, _, gloss = line.partition("|")
        fields = data.split()
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        names = frozenset(word.partition("(")[0].replace("_", " ").lower() for word in words)
        examples = tuple(re.findall(r'"([^"]+)"', gloss))
        found.append(Sense(part[0] + fields[0], names, gloss.partition('; "')[0].strip(), examples))
    return found


def holds(sentence: str, word: str) -> bool:
    """Whether a sentence holds a word, whole."""
    return word in sentence.lower() and bool(re.search(rf"\b{re.escape(word)}\b", sentence.lower()))


def remembered(embed: TextEmbedder) -> TextEmbedder:
    """The embedder, asked once for each text."""
    rows: dict[str, np.ndarray] = {}

    def one(texts: Sequence[str]) -> np.ndarray:
        new = sorted(set(texts) - rows.keys())
        if new:
            rows.update(zip(new, np.asarray(embed(new)), strict=True))
        return np.stack([rows[text] for text in texts])

    return one


def by_expression(matcher: NameMatcher, captions: list[str]) -> np.ndarray:
    """Each class's names in one expression, every caption searched for every class's."""
    names: dict[int, list[str]] = {}
    for words, owner in matcher.names.items():
        names.setdefault(owner, []).append(r"[\s\-_'’`]+".join(map(re.escape, words)))
    expressions = {
        owner: re.compile(rf"(?<![^\W_])(?:{'|'.join(some)})(?![^\W_])", re.IGNORECASE)
        for owner, some in names.items()
    }
    label = np.full(len(captions), NameMatcher.NONE)
    for i, caption in enumerate(captions):
        held = [owner for owner, expression in expressions.items() if expression.search(caption)]
        if held:
            label[i] = held[0] if len(held) == 1 else NameMatcher.SEVERAL
    return label


if __name__ == "__main__":
    main()
