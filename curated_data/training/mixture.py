"""What a stream mixes: components, each a selection of a pool with a weight."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from curated_data.checks import check_choice, whole_number
from curated_data.config import CurationConfig, load_config
from curated_data.errors import ConfigError
from curated_data.streaming.mixture import Weights, checked_weights
from curated_data.streaming.order import Shuffle
from curated_data.training.arguments import Ids, Pool, is_column
from curated_data.training.options import check_fields

Batches = Literal["mixed", "own"]


@dataclass(frozen=True, eq=False)
class Component:
    """One component of a `Mixture`: a pool, or a selection of it.

    Args:
        name: by which the log, errors and `RecurationCallback` refer to it.
        pool: its shards, as for `CuratedDataModule`. Components may share a pool.
        weight: its share of the stream, in proportion to those of the others; left out if the mixture has
            `weights` that change.
        selection: ids of the pool, or a `.npy` file of them; None: a curation's, or the whole pool.
        labels: replace the pool's labels: one for each id of `selection`, or without one for each sample of
            the pool; or the column that they are taken from, as for `CuratedDataModule`.
        curation: what to select, as for `CuratedDataModule`.
        embedder: for the curation; None takes the data module's.
        views: of its samples; None takes the data module's.
        batches: "mixed" with those of other components, or "own": whole global batches of this component.
        shuffle: "full", "block" or "none", within this component; None takes the data module's.
        stratify_level: give every run of its samples the clusters of this level in the proportions of its
            selection.

    Raises:
        ConfigError: settings that contradict each other or are out of range.

    Examples:
        >>> from curated_data import Component
        >>> Component("web", "pool-{000..001}.tar", 0.9).weight
        0.9
    """

    name: str
    pool: Pool
    weight: float | None = None
    _: dataclasses.KW_ONLY
    selection: Ids | None = None
    labels: Ids | None = None
    curation: CurationConfig | Mapping[str, Any] | None = None
    embedder: Any = None
    views: Callable[[Tensor], Any] | None = None
    batches: Batches = "mixed"
    shuffle: Shuffle | None = None
    stratify_level: int | None = None

    def __post_init__(self) -> None:
        where = f"mixture, component {self.name!r}, " if self.name else ""  # or a data module's one selection
        check_choice(f"{where}batches", self.batches, get_args(Batches))
        if self.shuffle is not None:
            check_choice(f"{where}shuffle", self.shuffle, get_args(Shuffle))
        if self.views is not None and not callable(self.views):
            raise ConfigError(f"{where}views: expected a function of an image, found {self.views!r}")
        if self.selection is not None and self.curation is not None:
            raise ConfigError(f"{where}selection: given together with curation, which makes one")
        if self.labels is not None and self.curation is not None and not is_column(self.labels):
            raise ConfigError(
                f"{where}labels: given together with curation; give the `selection` they fit, or a column"
            )
        if self.stratify_level is not None and self.curation is None:
            raise ConfigError(f"{where}stratify_level: needs a curation, whose tree has the clusters")
        if self.curation is not None:
            try:
                object.__setattr__(self, "curation", load_config(self.curation))
            except ConfigError as error:
                raise ConfigError(f"{where}curation: {error}" if where else str(error)) from error


class Mixture:
    """Several selections in one stream, by weights; for `CuratedDataModule(mixture=...)`.

    Of the first t samples of the stream, a component with a share w of all weights has given w t, within one
    sample. A component with batches of its own has given as many of the first t global batches, and what
    the others give together are the batches between. A component that ends begins again, in another order.

    Args:
        components: at least one; each a `Component`, or a mapping of its fields.
        epoch_size: samples of an epoch, over all ranks; None: as many as the components hold together at
            first. An epoch is a whole number of global batches, rounded down, or up with `last_batch="pad"`;
            the next one continues where it ended, so that no sample is left out.
        weights: of the components, instead of their `weight`, which change: at certain global batches,
            counted from the start of training, `{0: [0.9, 0.1], 100_000: [0.7, 0.3]}`. In between they change
            linearly, afterwards they stay.

    Raises:
        ConfigError: no component, two of the same name, a field that does not exist, or weights that are no
            positive numbers, are missing, or given twice.

    Examples:
        >>> from curated_data import Component, Mixture
        >>> mixture = Mixture(
        ...     [
        ...         Component("web", "web-{000..999}.tar", 0.9),
        ...         Component("imagenet", "imagenet-{000..146}.tar", 0.1, batches="own"),
        ...     ],
        ...     epoch_size=1_000_000,
        ... )
        >>> mixture.names
        ['web', 'imagenet']
        >>> mixture.shares
        [0.9, 0.1]
    """

    def __init__(
        self,
        components: Sequence[Component | Mapping[str, Any]],
        *,
        epoch_size: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        if not isinstance(components, Sequence) or isinstance(components, str):
            raise ConfigError(f"mixture.components: expected a list, found {components!r}")
        self.components = [as_component(component) for component in components]
        for name in self.names:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"mixture: the name of a component is {name!r}, expected some text")
        self.epoch_size = None if epoch_size is None else whole_number("mixture.epoch_size", epoch_size, 1)
        self.weights = self._weights(weights)
        self._checked = checked_weights(self.weights, self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """Of the components; a batch's `source` counts in this list."""
        return [component.name for component in self.components]

    @property
    def shares(self) -> list[float]:
        """Of the components at the beginning; they sum to one."""
        return self.schedule[0]

    @property
    def schedule(self) -> dict[int, list[float]]:
        """The shares by the global batch from which they hold; between two they change linearly."""
        return {batch: list(map(float, shares)) for batch, shares in sorted(self._checked.items())}

    @property
    def least_shares(self) -> list[float]:
        """The smallest share that each component ever has."""
        return [float(min(shares)) for shares in zip(*self._checked.values(), strict=True)]

    def _weights(self, weights: Weights | None) -> Weights:
        given = [component.weight for component in self.components]
        if weights is not None:
            for component in self.components:
                if component.weight is not None:
                    raise ConfigError(
                        f"mixture, component {component.name!r}, weight: given together with the mixture's "
                        "weights; drop either"
                    )
            return _by_batch(weights)
        if given == [None]:
            return [1.0]
        found = []
        for component, weight in zip(self.components, given, strict=True):
            if weight is None:
                raise ConfigError(f"mixture, component {component.name!r}: has no weight; give it one")
            found.append(weight)
        return found


def as_mixture(value: Any) -> Mixture:
    """A mixture, or one made of a mapping of its fields, as in YAML.

    Raises:
        ConfigError: see `Mixture`.
    """
    if isinstance(value, Mixture):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"mixture: expected a Mixture or a mapping of its fields, found {value!r}")
    check_fields(value, ("components", "epoch_size", "weights"), "mixture")
    if "components" not in value:
        raise ConfigError("mixture.components: missing; give a list of components")
    return Mixture(**value)


def as_component(value: Any) -> Component:
    """A component, or one made of a mapping of its fields.

    Raises:
        ConfigError: see `Component`.
    """
    if isinstance(value, Component):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"mixture.components: expected Components or mappings, found {value!r}")
    where = f"mixture, component {value.get('name', '?')!r}"
    check_fields(value, [field.name for field in dataclasses.fields(Component) if field.name != "_"], where)
    for field in ("name", "pool"):
        if value.get(field) is None:
            raise ConfigError(f"{where}, {field}: missing; it has no default")
    return Component(**value)


def _by_batch(weights: Weights) -> Weights:
    """With whole numbers for the global batches, which some parsers of YAML give as text."""
    if not isinstance(weights, Mapping):
        return weights
    return {
        int(batch) if isinstance(batch, str) and batch.isdecimal() else batch: values
        for batch, values in weights.items()
    }
