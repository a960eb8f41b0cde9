"""What the clusters on the report page are called, and which of them need a second look."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from curated_data.clustering.tree import ClusterTree
from curated_data.selection.metrics import selected_sizes

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation

_WORDS = 3  # of a name
_LEAST_SHARE = 0.1  # of a cluster's captions that have a word of its name


def cluster_names(
    tree: ClusterTree,
    shown: np.ndarray,
    *,
    captions: Sequence[str | None] | None = None,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    vocabulary: tuple[Sequence[str], np.ndarray] | None = None,
) -> list[dict[int, str]]:
    """For each level, the names of clusters above the samples shown; those without a name are left out.

    Args:
        shown: (m,) ids.
        captions: of the samples shown: a cluster is called by the words that set its captions apart.
        labels: (n,) place of each sample's class in `class_names`, -1 for none: without captions, a cluster
            is called by its most frequent classes.
        rows: (m, d) embeddings of the samples shown, if there is a vocabulary.
        vocabulary: words and their embeddings; with it a cluster is called by the nearest, see
            `nearest_words`.
    """
    names = []
    for level in range(1, tree.n_levels + 1):
        of_level: dict[int, str] = {}
        if labels is not None and class_names is not None:
            of_level |= _by_class(tree.assignment(level), labels, class_names)
        if captions is not None:
            of_level |= distinctive_words(tree.assignment(level, shown), captions)
        if vocabulary is not None and rows is not None:
            of_level |= nearest_words(tree.assignment(level, shown), rows, *vocabulary)
        present = set(np.unique(tree.assignment(level, shown)).tolist()) - {-1}
        names.append({cluster: name for cluster, name in of_level.items() if cluster in present})
    return names


def distinctive_words(cluster: np.ndarray, captions: Sequence[str | None]) -> dict[int, str]:
    """The words that set each cluster's captions apart from all others, by TF-IDF, as "red, truck, road".

    The weight of a word is the share of the cluster's captions that have it, times the logarithm of how much
    rarer it is in all captions.

    Args:
        cluster: (m,) of each caption, -1 for none.
    """
    used = [place for place, text in enumerate(captions) if text and cluster[place] >= 0]
    if not used:
        return {}
    vectorizer = CountVectorizer(
        binary=True, stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{3,}\b", max_features=50_000
    )
    try:
        has_word = vectorizer.fit_transform([captions[place] for place in used])
    except ValueError:  # not one word in all of them
        return {}
    found, row = np.unique(cluster[used], return_inverse=True)
    group = sparse.csr_array((np.ones(len(used)), (row, np.arange(len(used)))), (len(found), len(used)))
    count = sparse.csr_array(group @ has_word)
    sizes = np.bincount(row)
    rarity = np.log((1 + len(used)) / (1 + np.asarray(has_word.sum(axis=0)).ravel()))
    words = vectorizer.get_feature_names_out()
    names = {}
    for number, of_cluster in enumerate(found.tolist()):
        inside = slice(count.indptr[number], count.indptr[number + 1])
        place, share = count.indices[inside], count.data[inside] / sizes[number]
        weight = np.where(share >= _LEAST_SHARE, share * rarity[place], 0)
        best = np.lexsort((words[place], -weight))[:_WORDS]
        chosen = [str(words[place[one]]) for one in best if weight[one] > 0]
        if chosen:
            names[of_cluster] = ", ".join(chosen)
    return names


def nearest_words(
    cluster: np.ndarray, rows: np.ndarray, words: Sequence[str], vectors: np.ndarray
) -> dict[int, str]:
    """The words of a vocabulary that each cluster is nearer to than all clusters are, as "truck, road".

    By the cosine of their embeddings with the mean of the cluster's, less that with the mean of all.

    Args:
        cluster: (m,) of each sample, -1 for none.
        rows: (m, d) embeddings.
        words: k of them.
        vectors: (k, d) their embeddings, comparable by cosine with those of the samples.
    """
    used = (cluster >= 0) & np.isfinite(rows).all(axis=1)
    if not used.any():
        return {}
    found, group = np.unique(cluster[used], return_inverse=True)
    unit = _unit(rows[used])
    one = sparse.csr_array((np.ones(len(unit)), (group, np.arange(len(unit)))), (len(found), len(unit)))
    means = (one @ unit) / np.bincount(group)[:, None]
    score = (means - unit.mean(axis=0)) @ _unit(vectors).T
    best = np.argsort(-score, axis=1, kind="stable")[:, :2]
    names = {}
    for number, of_cluster in enumerate(found.tolist()):
        chosen = [words[word] for word in best[number].tolist() if score[number, word] > 0]
        if chosen:
            names[of_cluster] = ", ".join(chosen)
    return names


def _unit(rows: np.ndarray) -> np.ndarray:
    wide = np.asarray(rows, np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _by_class(cluster: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[int, str]:
    """Each cluster's most frequent classes, with their shares of its labelled samples."""
    used = (cluster >= 0) & (labels >= 0)
    pair, count = np.unique(cluster[used] * len(names) + labels[used], return_counts=True)
    of_cluster, label = np.divmod(pair, len(names))
    total = np.bincount(of_cluster, count) if len(pair) else np.zeros(0)
    order = np.lexsort((-count, of_cluster))
    found: dict[int, list[str]] = {}
    for one in order.tolist():
        share = count[one] / total[of_cluster[one]]
        parts = found.setdefault(int(of_cluster[one]), [])
        if not parts and share >= 0.9:
            parts += [names[label[one]], ""]
        elif len(parts) < 2 and (not parts or share >= 0.2):
            parts.append(f"{names[label[one]]} {100 * share:.0f} %")
    return {cluster: ", ".join(filter(None, parts)) for cluster, parts in found.items()}


def catch_all_clusters(curation: "Curation", most: int = 5) -> list[dict[str, Any]]:
    """Lowest clusters that are large and wide, and of which nearly nothing was kept, the largest first.

    Large is three times the median size and at least 20 samples, wide 1.25 times the median of the clusters'
    mean distances to their centroids, and nearly nothing a quarter of the share that the whole pool keeps.
    """
    tree = curation.tree
    if tree.distance is None:
        return []
    leaf, sizes = tree.parent[1], tree.sizes(1)
    inside = (leaf >= 0) & np.isfinite(tree.distance)
    width = np.bincount(leaf[inside], tree.distance[inside], len(sizes)) / np.maximum(sizes, 1)
    several = sizes > 1
    if not several.any():
        return []
    kept = selected_sizes(tree, np.unique(curation.ids))[1]
    share = kept.sum() / max(sizes.sum(), 1)
    typical = np.median(width[several])
    is_wide = width > 1.25 * typical
    is_large = sizes >= max(20, 3 * np.median(sizes[several]))
    found = np.flatnonzero(is_wide & is_large & (kept < 0.25 * share * sizes))
    found = found[np.argsort(-sizes[found], kind="stable")][:most]
    return [
        {
            "cluster": int(one),
            "size": int(sizes[one]),
            "kept": int(kept[one]),
            "width": float(width[one] / typical),
        }
        for one in found
    ]


def central_samples(tree: ClusterTree, level: int, clusters: Sequence[int]) -> dict[int, int]:
    """For each of a few clusters the sample nearest to the centroid of its lowest cluster."""
    assignment = tree.assignment(level)
    found = {}
    for cluster in clusters:
        members = np.flatnonzero(assignment == cluster)
        if len(members):
            distance = np.zeros(len(members)) if tree.distance is None else tree.distance[members]
            found[int(cluster)] = int(members[np.argmin(np.nan_to_num(distance, nan=np.inf))])
    return found
