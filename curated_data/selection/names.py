"""Classes with their names, and finding these names in captions: whole words, ignoring case."""

import io
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curated_data.cache.checksums import open_regular, read_bytes
from curated_data.cache.removal import shown
from curated_data.errors import ConfigError, printable


@dataclass(frozen=True)
class CaptionClass:
    """A class to look for.

    Attributes:
        id: any string, such as WordNet's "n02084071".
        names: words or phrases for it; the first one is embedded.
        definition: one sentence; may be empty.
    """

    id: str
    names: tuple[str, ...]
    definition: str = ""

    def __post_init__(self) -> None:
        if not self.names or isinstance(self.names, str):
            raise ConfigError(f"class {self.id!r} needs a tuple of at least one name, got {self.names!r}")

    @property
    def text(self) -> str:
        """The text that captions are compared with."""
        return f"{self.names[0]}: {self.definition}" if self.definition else self.names[0]


class NameMatcher:
    """Finds the classes whose names occur in captions, as whole words, ignoring case.

    Words are runs of letters and digits, without the accents of Latin and Greek letters ("Café" is "cafe"),
    and with the symbols of "C++", "C#" and ".NET", which are other words than "C" and "net". The longest name
    at a place counts: "hot dog" is no "dog". The words of a name may be separated by spaces, hyphens,
    underscores or apostrophes, and by other punctuation only if the name has it too ("St. Bernard" is found
    as it is written and without the full stop). A caption without the first word of any name, as nearly all
    are, costs one set look-up per word.

    Args:
        classes: names that belong to several of them name none, and are listed in `ambiguous`.
    """

    NONE, SEVERAL = -1, -2

    def __init__(self, classes: Sequence[CaptionClass]) -> None:
        if len({c.id for c in classes}) < len(classes):
            raise ConfigError(
                f"class id {Counter(c.id for c in classes).most_common(1)[0][0]!r} is given twice"
            )
        owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
        written: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
        for i, c in enumerate(classes):
            for name in c.names:
                words = tuple(_normal(name).split())
                if words:
                    owners[words].add(i)
                    written[words] |= {words, tuple(_words(_normal(name)))}
        self.ambiguous = sorted(
            " ".join(words).translate(_READABLE) for words, who in owners.items() if len(who) > 1
        )
        self.names = {form: min(owners[words]) if len(owners[words]) == 1 else self.SEVERAL
                      for words, forms in written.items() for form in forms}  # fmt: skip
        self.nameless = sorted(set(range(len(classes))) - set(self.names.values()))
        self._first = frozenset(words[0] for words in self.names)
        lengths: dict[str, set[int]] = defaultdict(set)
        for words in self.names:
            lengths[words[0]].add(len(words))
        self._lengths = {first: sorted(n, reverse=True) for first, n in lengths.items()}

    def match(self, captions: Sequence[str]) -> np.ndarray:
        """(n,) int64: the only class that each caption names, NONE, or SEVERAL."""
        label = np.full(len(captions), self.NONE, np.int64)
        for i, caption in enumerate(captions):
            text = _normal(caption)
            if self._first.isdisjoint(text.split()):
                continue
            classes = self._classes(text)
            if classes:
                label[i] = classes.pop() if len(classes) == 1 else self.SEVERAL
        return label

    def holds(self, text: str, label: int) -> bool:
        """Whether a text contains a name of a class."""
        return label in self._classes(_normal(text))

    def _classes(self, text: str) -> set[int]:
        classes, words, end = set(), _words(text), 0
        for at, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                owner = self.names.get(tuple(words[at : at + length]))
                if owner is not None:
                    if at + length > end and owner != self.SEVERAL:  # not within a longer name before
                        classes.add(owner)
                    end = max(end, at + length)
                    break
        return classes


def sharing_a_name(classes: Sequence[CaptionClass], others: Sequence[CaptionClass]) -> list[list[int]]:
    """For each class, the indices of those `others` that share a name with it and have another id."""
    users: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, other in enumerate(others):
        for name in other.names:
            users[tuple(_normal(name).split())].append(i)
    return [
        sorted({i for name in c.names for i in users[tuple(_normal(name).split())] if others[i].id != c.id})
        for c in classes
    ]


def read_classes(path: str | Path) -> list[CaptionClass]:
    """Classes from a JSON file: a list of objects with `id`, `names` and `definition`.

    Raises:
        ConfigError: the file cannot be read, or an entry is incomplete.
    """
    try:
        entries = json.loads(read_bytes(Path(path)))
    except Exception as error:  # a parser's own, such as of text nested too deeply
        raise ConfigError(f"{path}: not a readable JSON list of classes ({printable(error)})") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: expected a list of classes, found {type(entries).__name__}")
    classes = []
    for i, entry in enumerate(entries):
        names = entry.get("names") if isinstance(entry, dict) else None
        names = [names] if isinstance(names, str) else names
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(name, str) and name.strip() for name in names)
            or "id" not in entry
        ):
            raise ConfigError(f"{path}: class {i} needs an id and at least one name, found {shown(entry)}")
        classes.append(CaptionClass(str(entry["id"]), tuple(names), str(entry.get("definition") or "")))
    return classes


def read_wordnet(path: str | Path, ids: Collection[str] | None = None) -> list[CaptionClass]:
    """Classes from WordNet's `data.noun` file. Ids are "n" and the eight-digit offset.

    Args:
        path: of the file, or of its folder. `data.verb`, `data.adj` and `data.adv` can be read too (ids "v",
            "a" or "s", "r"), as rivals for `label_captions`.
        ids: which to read, in file order; None for all.

    Raises:
        ConfigError: no such file, or one of the ids is not in it.
    """
    path = Path(path) / "data.noun" if Path(path).is_dir() else Path(path)
    wanted = None if ids is None else set(ids)
    classes = []
    try:
        with open_regular(path) as file:
            for line in io.TextIOWrapper(file, encoding="utf-8"):
                if line.startswith(" "):  # the licence
                    continue
                data, _, gloss = line.partition("|")
                fields = data.split()
                id = fields[2] + fields[0]  # part of speech and offset
                if wanted is not None and id not in wanted:
                    continue
                n_words = int(fields[3], 16)
                words = fields[4 : 4 + 2 * n_words : 2]  # adjectives may end in a marker, as "afraid(p)"
                names = tuple(word.partition("(")[0].replace("_", " ") for word in words)
                definition = gloss.partition('; "')[0].strip()
                classes.append(CaptionClass(id, names, definition))
    except (OSError, IndexError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable WordNet data file ({error})") from error
    missing = set() if wanted is None else wanted - {c.id for c in classes}
    if missing:
        raise ConfigError(
            f"{path}: has no synset {sorted(missing)[0]} ({len(missing)} of {len(wanted or ())} missing)"
        )
    return classes


def _words(text: str) -> list[str]:
    """The words of a normalised text, with a line end between phrases."""
    words: list[str] = []
    for phrase in text.split("\n"):
        if own := phrase.split():
            words += ["\n", *own] if words else own
    return words


_PLUS, _HASH, _DOT = "\ue000", "\ue001", "\ue002"  # symbols that are part of a word
_READABLE = str.maketrans({_PLUS: "+", _HASH: "#", _DOT: "."})
_AFTER = re.compile(r"(?<=\w)(?:\+\+|\+(?!\w)|#(?![\w#]))")  # of C++, C# and 18+, not of dog+cat
_BEFORE = re.compile(r"(?<![^\s(\"'])\.(?=[^\W\d_])")  # of .NET, not of 3.5 or of the end of a sentence
_PLAIN = str.maketrans({"ø": "o", "đ": "d", "ð": "d", "ł": "l", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th"})


class _Separators(dict[int, int]):
    """For `str.translate`: keeps letters and digits, turns separators within a name to spaces, and all other
    characters to line ends, which end a phrase.
    """

    def __missing__(self, code: int) -> int:
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "LNM" or character in _PLUS + _HASH + _DOT:
            self[code] = code
        elif character.isspace() or category == "Pd" or character in "_'’`":
            self[code] = ord(" ")
        else:
            self[code] = ord("\n")
        return self[code]


_SEPARATORS = _Separators()


def _normal(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = text.casefold()
    if not text.isascii():
        text = _without_accents(text)
    if "+" in text or "#" in text:
        text = _AFTER.sub(lambda found: found[0].replace("+", _PLUS).replace("#", _HASH) + " ", text)
    if "." in text:
        text = _BEFORE.sub(_DOT, text)
    return text.translate(_SEPARATORS)


def _without_accents(text: str) -> str:
    """Latin and Greek letters without their accents; in other scripts marks make other letters."""
    kept: list[str] = []
    base = ""
    for character in unicodedata.normalize("NFD", text):
        if not unicodedata.combining(character):
            base = character
        elif "\u0300" <= character <= "\u036f" and unicodedata.name(base, "").startswith(("LATIN", "GREEK")):
            continue
        kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept)).translate(_PLAIN)
