"""How the report page opens: what the selection changed, in words and figures, and by which groups."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curated_data.report.clusters import central_samples
from curated_data.selection.metrics import ClassBalance, selected_sizes

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation

_SHOWN = 16  # groups in the picture
_EXPECTED = 4  # samples of a cluster in a random selection, from which its share says something


def opening(
    curation: "Curation",
    balance: ClassBalance | None,
    class_names: Sequence[str] | None,
    names: Sequence[Mapping[int, str]],
) -> dict[str, Any]:
    """The claim in sentences, and the shares of groups in the pool and the selection.

    Args:
        balance: of the classes, which are the groups then; without, they are the clusters of a level.
        class_names: one for each class of `balance`.
        names: of the clusters of each level.
    """
    if balance is not None and class_names is not None and len(class_names) > 1:
        kind, level = "class", 0
        ids, before, after = np.arange(len(class_names)), balance.before, balance.after
        called = dict(enumerate(class_names))
    else:
        kind, level = "cluster", _level(curation)
        before = curation.tree.sizes(level)
        after = selected_sizes(curation.tree, curation.ids)[level]
        ids = np.arange(len(before))
        called = dict(names[level - 1])
    held = before > 0
    ids, before, after = ids[held], before[held] / max(before.sum(), 1), after[held] / max(after.sum(), 1)
    order = np.argsort(-before, kind="stable")
    several = "classes" if kind == "class" else "clusters"
    shown = order if len(order) <= _SHOWN else np.concatenate([order[: _SHOWN // 2], order[-_SHOWN // 2 :]])
    central = {} if kind == "class" else central_samples(curation.tree, level, ids[shown].tolist())
    sentences = []
    if len(order) > 1:
        fell = int(np.argmin(after - before))
        name = called.get(int(ids[fell]), "")
        if kind == "cluster":
            name = f"the cluster “{name}”" if name else f"cluster {ids[fell]}"
        sentences.append(f"{name} falls from {_percent(before[fell])} to {_percent(after[fell])}")
    if len(order) >= 6:
        rare = order[-3:]
        sentences.append(_change(f"the rarest three {several}", before[rare].sum(), after[rare].sum()))
    sentences += _against_random(curation)
    text = "; ".join(sentences)
    return {
        "claim": text[:1].upper() + text[1:] + "." if text else "",
        "kind": kind,
        "level": level,
        "left_out": len(order) - len(shown),
        "rows": [
            {
                "id": int(ids[one]),
                "name": called.get(int(ids[one]), ""),
                "central": central.get(int(ids[one]), -1),
                "before": float(before[one]),
                "after": float(after[one]),
            }
            for one in shown.tolist()
        ],
    }


def _level(curation: "Curation") -> int:
    """The highest level with enough clusters to compare."""
    tree = curation.tree
    levels = range(tree.n_levels, 0, -1)
    return next((level for level in levels if (tree.sizes(level) > 0).sum() >= 4), 1)


def _against_random(curation: "Curation") -> list[str]:
    """How many lowest clusters give far less, or far more, than a random selection would take."""
    sizes = curation.tree.sizes(1)
    given = selected_sizes(curation.tree, curation.ids)[1]
    expected = sizes * (given.sum() / max(sizes.sum(), 1))
    large = expected >= _EXPECTED
    if not large.any():
        return []
    less, more = int((given < expected / 2)[large].sum()), int((given > 2 * expected)[large].sum())
    which = "" if large.sum() == (sizes > 0).sum() else " large enough to tell"
    counts = {"less than half": less, "more than double": more}
    parts = [f"{n:,} {'gives' if n == 1 else 'give'} {what}" for what, n in counts.items() if n]
    if not parts:
        return []
    both = " and ".join(parts)
    return [f"of {int(large.sum()):,} clusters{which}, {both} of what a random selection takes"]


def _change(what: str, before: float, after: float) -> str:
    if before <= 0 or after <= 0:
        return f"{what} go from {_percent(before)} to {_percent(after)}"
    factor = after / before
    verb = "rise" if factor > 1.05 else "fall" if factor < 0.95 else "stay at about the same share:"
    times = f", {factor:.1f} times their share" if factor > 1.05 else ""
    return f"{what} {verb} from {_percent(before)} to {_percent(after)}{times}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"
