"""The order of a data module's stream: of one selection, or of the components of a mixture."""

from collections.abc import Sequence

import numpy as np

from curated_data.cache import fingerprint
from curated_data.components import Source
from curated_data.errors import ConfigError
from curated_data.mixture import Mixture
from curated_data.streaming.mixture import AnyOrder, MixtureOrder, Part
from curated_data.streaming.order import EpochOrder, LastBatch


def check_mixture(
    mixture: Mixture, sources: Sequence[Source], batch_size: int, last_batch: LastBatch
) -> int | None:
    """Check that an epoch has a global batch, and each component with batches of its own at least one.

    Returns:
        The global batches of an epoch; None if they are those of a single component.

    Raises:
        ConfigError: names what is too small.
    """
    if len(sources) == 1 and mixture.epoch_size is None:
        return None
    n_batches = epoch_batches(mixture, sources, batch_size, last_batch)
    for source, share in zip(sources, mixture.least_shares, strict=True):
        if source.batches == "own" and share * n_batches < 1 - 1e-9:
            raise ConfigError(
                source.named(
                    f"weight: {share:g} of the {n_batches} global batches of an epoch is less than one batch "
                    "of its own; raise its weight or epoch_size"
                )
            )
    return n_batches


def epoch_batches(mixture: Mixture, sources: Sequence[Source], batch_size: int, last_batch: LastBatch) -> int:
    """Global batches of an epoch of a mixture. It does not depend on what re-curations select.

    Raises:
        ConfigError: none.
    """
    size = mixture.epoch_size or sum(source.n_first for source in sources)
    n_batches = -(-size // batch_size) if last_batch == "pad" else size // batch_size
    if not n_batches:
        raise ConfigError(
            f"mixture.epoch_size: {size} samples do not fill one global batch of {batch_size}; raise it, or "
            'pass last_batch="pad"'
        )
    return n_batches


def stream_order(
    mixture: Mixture | None,
    sources: Sequence[Source],
    selections: Sequence[np.ndarray | None],
    *,
    seed: int,
    batch_size: int,
    shuffled: bool,
    last_batch: LastBatch,
    keep_strata: bool,
) -> AnyOrder:
    """The order of a mixture; of a single source without an `epoch_size`, that of its selection alone.

    Args:
        mixture, sources: what to mix.
        selections: of each component, ids of its pool; None: the whole pool.
        seed, batch_size, last_batch: of the stream.
        shuffled: False to take every component as it is.
        keep_strata: keep the strata of a `stratify_level` in the cache, see `strata`.
    """
    alone = mixture is None or (len(sources) == 1 and mixture.epoch_size is None)
    parts = []
    for source, ids in zip(sources, selections, strict=True):
        shuffle = source.shuffle if shuffled else "none"
        try:
            order = EpochOrder(
                len(source.pool) if ids is None else ids,
                seed=seed if alone else int(fingerprint(seed=seed, component=source.name)[:16], 16),
                batch_size=batch_size if alone else 1,
                shuffle=shuffle,
                last_batch=last_batch if alone else "drop",
                shard_starts=source.pool.shard_ranges() if shuffle == "block" else None,
                strata=source.strata(ids, keep=keep_strata) if shuffle == "full" else None,
            )
        except ConfigError as error:
            raise ConfigError(source.named(str(error))) from error
        if alone:
            return order
        parts.append(Part(source.name, order, source.batches == "own", source.first_id))
    assert mixture is not None, "several components are mixed"
    n_batches = check_mixture(mixture, sources, batch_size, last_batch)
    assert n_batches is not None, "there are several components, or an epoch_size"
    return MixtureOrder(parts, mixture.weights, batch_size=batch_size, epoch_size=n_batches * batch_size)


def plan_access(sources: Sequence[Source], order: AnyOrder, epochs: int) -> None:
    """For remote pools, choose byte ranges or whole shards, by how often what will be read."""
    orders = [part.order for part in order.parts] if isinstance(order, MixtureOrder) else [order]
    for pool in {id(source.pool): source.pool for source in sources}.values():
        own = [number for number, source in enumerate(sources) if source.pool is pool]
        selections = [orders[number].selection for number in own]
        whole = any(isinstance(ids, int) for ids in selections)
        ids = None if whole else np.unique(np.concatenate([np.asarray(ids) for ids in selections]))
        n = len(pool) if ids is None else len(ids)
        passes = int(order.given(1, 0)[own].sum()) / n if isinstance(order, MixtureOrder) else 1
        pool.plan_access(ids, epochs=max(1, round(epochs * passes)))
