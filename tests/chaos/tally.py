"""Outcomes of attacks, counted by kind."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

GOOD = ("equal", "one clear error", "counted", "taken as it is")
BAD = ("different without a word", "lost", "hung", "unclear", "escaped")
_SHORT = {"different without a word": "different", "one clear error": "one error"}


@dataclass
class Tally:
    """How often each kind of attack came to each outcome, and what was bad.

    "Taken as it is" are damaged inputs that nothing can tell from others: pixels without a checksum, ids,
    labels and settings of a user, and files whose checksums were forged to fit.
    """

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    bad: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str, what: str = "", said: str = "") -> None:
        assert outcome in GOOD + BAD, outcome
        self.counts[kind][outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{kind}: {outcome}: {what}\n{said}")

    def total(self, outcomes: tuple[str, ...] = GOOD + BAD) -> int:
        return sum(counter[outcome] for counter in self.counts.values() for outcome in outcomes)

    def table(self) -> str:
        """Kinds by outcomes, in Markdown."""
        names = [_SHORT.get(name, name) for name in GOOD + BAD]
        lines = ["| kind | cases | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        for kind, counter in sorted(self.counts.items()):
            cells = [str(counter[name]) for name in GOOD + BAD]
            lines.append(f"| {kind} | {counter.total()} | " + " | ".join(cells) + " |")
        cells = [str(self.total((name,))) for name in GOOD + BAD]
        lines.append(f"| all | {self.total()} | " + " | ".join(cells) + " |")
        return "\n".join(lines)
