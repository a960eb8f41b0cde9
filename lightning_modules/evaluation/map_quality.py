"""What a map keeps of the classes: neighbours, boundaries, clusters, and how far they lie apart."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_modules.evaluation.inputs import Array, checked_features, checked_labels
from lightning_modules.evaluation.result import Result


@dataclass(frozen=True)
class MapQuality(Result):
    """Figures of a map, as in t-SimCNE's paper (arXiv 2210.09879).

    Attributes:
        knn: accuracy of the majority of the nearest neighbours.
        logistic: accuracy of a logistic regression on the coordinates.
        ari, ami: adjusted Rand index and adjusted mutual information of HDBSCAN's clusters with the classes;
            points that it calls noise are a cluster of their own.
        silhouette: mean silhouette of the classes, -1..1.
        n_clusters: clusters that HDBSCAN found.
        n_samples: labelled points.
    """

    knn: float
    logistic: float
    ari: float
    ami: float
    silhouette: float
    n_clusters: int
    n_samples: int

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "k-NN": self.knn,
                "logistic": self.logistic,
                "ARI": self.ari,
                "AMI": self.ami,
                "silhouette": self.silhouette,
                "clusters": self.n_clusters,
                "points": self.n_samples,
            }
        ]


def map_quality(
    coordinates: Array,
    labels: Array,
    test_coordinates: Array | None = None,
    test_labels: Array | None = None,
    *,
    k: int = 15,
    min_cluster_size: int | None = None,
    max_samples: int = 10_000,
    seed: int = 0,
) -> MapQuality:
    """Judge a map by the classes of its points.

    With test points, both accuracies are of these, learned from the others; without, they are means over five
    stratified folds. Clusters and silhouettes are of the first set. Ranks are not joined: give the whole map.

    Args:
        coordinates: (n, 2), or of any dimension; labels: (n,) classes >= 0; points without one are left out
            by the caller.
        test_coordinates, test_labels: of images that the map was not trained on.
        k: neighbours, one vote each.
        min_cluster_size: of HDBSCAN; None takes a hundredth of the points that are clustered, at least 5.
        max_samples: at most this many points, drawn at random, are clustered and have their silhouettes
            computed: both compare all pairs.
        seed: of the folds and the draw.

    Raises:
        TypeError: labels that are not integers.
        ValueError: shapes that do not match, values that are not finite, negative labels, fewer than two
            classes, a class that has fewer than five points where there are no test points, or k larger than
            what is learned from.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import map_quality
        >>> result = map_quality(features[:, :2], labels)
        >>> result.knn
        1.0
    """
    # Here, because scikit-learn takes seconds to import and no other evaluation needs all of it.
    from sklearn.cluster import HDBSCAN
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, silhouette_score
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = checked_features("map", coordinates, "cpu").double().numpy()
    y = checked_labels("map", labels, len(x)).numpy()
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a map is judged by two classes or more, got {len(classes)}")
    if (test_coordinates is None) != (test_labels is None):
        raise ValueError("test_coordinates and test_labels belong together: give both or neither")
    test = None
    if test_coordinates is not None and test_labels is not None:
        test_x = checked_features("test", test_coordinates, "cpu").double().numpy()
        if test_x.shape[1] != x.shape[1]:
            raise ValueError(f"the map has {x.shape[1]} dimensions, the test points {test_x.shape[1]}")
        test = test_x, checked_labels("test", test_labels, len(test_x)).numpy()
    elif counts.min() < 5:
        raise ValueError(
            f"class {classes[counts.argmin()]} has {counts.min()} points, and each of five folds needs one: "
            "leave the class out, or give test points"
        )
    learned_from = len(x) if test else len(x) - -(-len(x) // 5)
    if not 0 < k <= learned_from:
        raise ValueError(f"k={k}: needs 1 to {learned_from}, the points that neighbours are taken from")

    def accuracy(classifier: Any) -> float:
        if test:
            return float(classifier.fit(x, y).score(*test))
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        return float(cross_val_score(classifier, x, y, cv=folds).mean())

    chosen = np.random.default_rng(seed).permutation(len(x))[:max_samples]
    some, classes_of_some = x[chosen], y[chosen]
    clusters = HDBSCAN(min_cluster_size=min_cluster_size or max(5, len(some) // 100), copy=False).fit_predict(
        some
    )
    n_present = len(np.unique(classes_of_some))
    return MapQuality(
        knn=accuracy(KNeighborsClassifier(k)),
        logistic=accuracy(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))),
        ari=float(adjusted_rand_score(classes_of_some, clusters)),
        ami=float(adjusted_mutual_info_score(classes_of_some, clusters)),
        silhouette=float(silhouette_score(some, classes_of_some))
        if 1 < n_present < len(some)
        else float("nan"),
        n_clusters=len(np.unique(clusters[clusters >= 0])),
        n_samples=len(x),
    )
