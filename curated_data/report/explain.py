"""Explain why a sample was or was not selected, for any sample of a pool, from the tree."""

from typing import TYPE_CHECKING

import numpy as np

from curated_data.config import CurationConfig
from curated_data.selection.metrics import selected_sizes
from curated_data.selection.quota_rules import quotas_of
from curated_data.selection.quotas import Quotas
from curated_data.selection.removed import Removed
from curated_data.selection.retrieved import load_retrieved

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation


def explain(curation: "Curation", sample: int) -> list[str]:
    """A sample's path through the curation in sentences, from the top of the tree down.

    Args:
        curation: from `curate`.
        sample: an id of the pool.

    Raises:
        ValueError: no such sample.
    """
    tree, ids = curation.tree, curation.ids
    if not 0 <= sample < tree.n_samples:
        raise ValueError(f"sample {sample}: the pool has ids 0 to {tree.n_samples - 1}")
    failure = curation.embeddings.failure(sample)
    if failure is not None:
        return [f"Sample {sample} took no part: {failure['reason']}."]
    if tree.parent[1][sample] < 0:
        return [f"Sample {sample} took no part: {_why_removed(curation, sample)}."]

    path = []
    node = sample
    for level in range(1, tree.n_levels + 1):
        node = int(tree.parent[level][node])
        if node < 0:
            break
        path.append((level, node))
    lines = []
    share = len(ids)
    gave = selected_sizes(tree, ids)
    config = curation.config
    rules = quotas_of(config, tree) if isinstance(config, CurationConfig) else None
    for level, cluster in reversed(path):
        held, given = int(tree.sizes(level)[cluster]), int(gave[level][cluster])
        if level == tree.n_levels:
            siblings = int((tree.sizes(level) > 0).sum())
        else:
            same_parent = tree.parent[level + 1] == tree.parent[level + 1][cluster]
            siblings = int((same_parent & (tree.sizes(level) > 0)).sum())
        lines.append(
            f"Level {level}: cluster {cluster}, one of {siblings} that share {share:,}, holds "
            f"{held:,} samples and gave {given:,}{_rule(rules, level, cluster)}."
        )
        share = given
    times = int((ids == sample).sum())
    outcome = {0: "was not selected", 1: "was selected"}.get(times, f"was selected {times} times")
    strategy = getattr(config, "strategy", "random")
    how = "drawn at random" if strategy == "random" else f"the {strategy}"
    if getattr(config, "sampling", None) == "sparse":
        how = "drawn by how alone they lie among their neighbours"
    elif getattr(config, "sampling", None) == "greedy":
        how = "taken one after the other by how much nearer they bring the selection to all samples"
    if share >= held:
        how = "all of them"
    place = ""
    if tree.distance is not None:
        distance = tree.distance[tree.parent[1] == tree.parent[1][sample]]
        rank = int((distance < tree.distance[sample]).sum()) + 1
        place = f" It is number {rank:,} of {held:,} by distance to the centroid."
    lines.append(f"Sample {sample} {outcome}: its cluster gave {share:,} of {held:,}, {how}.{place}")
    if sample in getattr(config, "include", ()):
        lines.append("It was to be included, and counts in the quota of its cluster.")
    lines += _why_retrieved(curation, sample)
    nested = getattr(curation, "nested", {})
    if nested and times:
        inside = [f"{size:,}" for size, some in sorted(nested.items()) if sample in some]
        which = f"those of {', '.join(inside)}" if inside else "none"
        lines.append(f"Of the nested selections, it is in {which}.")
    return lines


def _why_retrieved(curation: "Curation", sample: int) -> list[str]:
    folder = curation.folders.get("retrieval")
    if folder is None or curation.config.retrieval.method == "weights":
        return []
    found = load_retrieved(folder, curation.tree.n_samples)
    place = int(np.searchsorted(found.ids, sample))
    if place == len(found.ids) or found.ids[place] != sample:
        return ["No seed set retrieved it."]
    name, rank = found.names[int(found.seed_set[place])], int(found.rank[place]) + 1
    if found.cluster[place] >= 0:
        how = f"number {rank:,} that cluster {found.cluster[place]} gave"
    else:
        how = f"number {rank:,} by nearness to seed {found.seed[place]}, "
        how += f"at a cosine of {found.cosine[place]:.4f}"
    return [f"It was retrieved for the seed set {name!r}: {how}."]


def _rule(rules: Quotas | None, level: int, cluster: int) -> str:
    """What quotas say of a cluster."""
    if rules is None:
        return ""
    parts = []
    if rules.temperature is not None:
        parts.append(f"quotas by size ** {rules.temperature:g}")
    if level == rules.level and rules.weights is not None:
        parts.append(f"weight {rules.weights[cluster]:g}")
    if level == rules.level and rules.cap is not None:
        cap = f"{rules.cap:,.0f}" if rules.cap >= 1 else f"{rules.cap:.1%} of the selection"
        parts.append(f"at most {cap}")
    return f" ({', '.join(parts)})" if parts else ""


def _why_removed(curation: "Curation", sample: int) -> str:
    folder = curation.folders.get("near_duplicates")
    if folder is None and "fresh_embeddings" in curation.folders:
        return "the new features of it could not be made, or are zero"
    if folder is None:
        return "the clustering excluded it, as its embedding is zero, which has no direction"
    removed = Removed.load(folder)
    if removed.keep[sample]:
        return "the clustering excluded it, as its embedding is zero, which has no direction"
    near, held_out = int(removed.near[sample]), int(removed.held_out[sample])
    if near < 0 and held_out < 0:
        return "it was left out before the clustering"
    where = f"sample {held_out} of the held-out pool" if near < 0 else f"sample {near}, which stayed"
    return f"it is a near-duplicate of {where}, at a cosine of {removed.cosine[sample]:.4f}"
