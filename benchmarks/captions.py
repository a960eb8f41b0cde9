"""Finding class names in captions, against regular expressions: captions a CPU second, and agreement.

    python benchmarks/captions.py --wordnet /usr/share/wordnet [--captions 10000000]

Captions are the glosses of WordNet's nouns, over and over; classes are the 1,000 nouns with the most
captions. The regular expression is timed on a part of the captions, it is slow.
"""

import argparse
import itertools
import re
import time

import numpy as np

from curated_data.selection.names import NameMatcher, read_wordnet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wordnet", default="/usr/share/wordnet", help="folder of WordNet's data.noun")
    parser.add_argument("--captions", type=int, default=10_000_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--peer-captions", type=int, default=2_000)
    parsed = parser.parse_args()

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
