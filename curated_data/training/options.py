"""How a data module loads, decodes and makes views, in groups of settings that check themselves."""

import dataclasses
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, get_args

from curated_data.checks import check_choice, whole_number
from curated_data.errors import ConfigError, nearest
from curated_data.pool.decode import Decoders, as_decoders
from curated_data.processes import check_context
from curated_data.streaming.dataset import OnError
from curated_data.streaming.device import DeviceViews


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are loaded; for `CuratedDataModule(loader=...)`.

    Attributes:
        num_workers: processes that read, decode and augment; None takes the cores available to this rank, at
            most 16.
        eval_batch_size: like `batch_size`, for validation, test and prediction; None takes `batch_size`.
        pin_memory: as in torch's `DataLoader`; None pins if there is a CUDA device.
        persistent_workers: as in torch's `DataLoader`; None keeps training workers between epochs.
        prefetch_factor: as in torch's `DataLoader`.
        multiprocessing_context: how workers start: "fork", "spawn" or "forkserver"; None takes Python's
            default. With the last two, `views`, `eval_transform` and `decoders` must pickle.
        worker_timeout: seconds to wait for a batch from the workers before raising an error; 0 waits forever.
        slow_after: seconds to wait for a batch before logging a warning, once per epoch; 0 never warns.
        storage_options: for fsspec, to read remote shards of pools that are given as paths or URLs.

    Raises:
        ConfigError: a value of the wrong type or out of range.

    Examples:
        >>> from curated_data import LoaderOptions
        >>> LoaderOptions(num_workers=4).slow_after
        60.0
    """

    num_workers: int | None = None
    eval_batch_size: int | None = None
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    prefetch_factor: int | None = None
    multiprocessing_context: str | None = None
    worker_timeout: float = 1800.0
    slow_after: float = 60.0
    storage_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 0), ("eval_batch_size", 1), ("prefetch_factor", 1)):
            if getattr(self, name) is not None:
                whole_number(f"loader.{name}", getattr(self, name), least)
        check_context(self.multiprocessing_context, "loader.multiprocessing_context")
        for name in ("worker_timeout", "slow_after"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not float(value) >= 0:
                raise ConfigError(f"loader.{name}: expected seconds, 0 or more, found {value!r}")


@dataclass(frozen=True)
class DecodingOptions:
    """How samples are decoded; for `CuratedDataModule(decoding=...)`.

    Attributes:
        decoders: custom functions of bytes by extension, see `decode_sample`.
        fields: what batches have besides images: some of "label", "caption" and "metadata", and the
            extensions of `decoders` for members that are none of these. Members of other fields are not
            decoded, so what they hold does not matter; a curation takes no sample whose fields cannot be
            decoded. None: all.
        min_size: decode larger JPEGs at a reduced scale whose sides are at least this many pixels.
        on_error: what to do about a sample that cannot be decoded: "raise", or "skip" (another one replaces
            it).
        max_skipped: the share of samples that may be skipped before an error is raised after all.

    Raises:
        ConfigError: a value of the wrong type or out of range.

    Examples:
        >>> from curated_data import DecodingOptions
        >>> DecodingOptions(on_error="skip", fields=["label"]).max_skipped
        0.01
    """

    decoders: Decoders | None = None
    fields: Sequence[str] | None = None
    min_size: int | None = None
    on_error: OnError = "raise"
    max_skipped: float = 0.01

    def __post_init__(self) -> None:
        as_decoders(self.decoders)
        if self.min_size is not None:
            whole_number("decoding.min_size", self.min_size, 1)
        check_choice("decoding.on_error", self.on_error, get_args(OnError))
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"decoding.max_skipped: expected a share in 0..1, found {self.max_skipped!r}")


@dataclass(frozen=True)
class DeviceOptions:
    """What is made on the training device instead of in workers; for `CuratedDataModule(device=...)`.

    Attributes:
        views: makes the views, one batch at a time: a function of the samples that the data module's `views`
            returned (by default the image cropped to `image_size`, still uint8), (B, C, H, W), and of their
            seeds, (B,) int64, to one tensor or a list of tensors; see `curated_data.streaming.device`. For
            machines with few CPU cores per device.
        decode: decode JPEGs there too, one batch at a time, before `views`. Workers then only read them, and
            decode other formats.

    Raises:
        ConfigError: `views` is not a function, or is missing with `decode`.

    Examples:
        >>> from curated_data import DeviceOptions
        >>> from curated_data.streaming import ResizedCrops
        >>> DeviceOptions(views=ResizedCrops(224), decode=True).views.n_views
        2
    """

    views: DeviceViews | None = None
    decode: bool = False

    def __post_init__(self) -> None:
        if self.views is not None and not callable(self.views):
            raise ConfigError(
                f"device.views: expected a function of a batch of images and seeds, found {self.views!r}"
            )
        if self.decode and self.views is None:
            raise ConfigError("device.decode: needs device.views, which are made of what is decoded there")


class OldArguments(TypedDict, total=False):
    """Arguments of `CuratedDataModule` that have moved into the groups, and are accepted for one release."""

    num_workers: int | None
    eval_batch_size: int | None
    pin_memory: bool | None
    persistent_workers: bool | None
    prefetch_factor: int | None
    multiprocessing_context: str | None
    worker_timeout: float
    slow_after: float
    storage_options: dict[str, Any] | None
    decoders: Decoders | None
    fields: Sequence[str] | None
    min_size: int | None
    on_error: OnError
    max_skipped: float
    device_views: DeviceViews | None
    decode_on_device: bool


GROUPS: dict[str, type] = {"loader": LoaderOptions, "decoding": DecodingOptions, "device": DeviceOptions}
MOVED = {
    field.name: (group, field.name)
    for group in ("loader", "decoding")
    for field in dataclasses.fields(GROUPS[group])
} | {"device_views": ("device", "views"), "decode_on_device": ("device", "decode")}


def grouped(old: Mapping[str, Any], **given: Any) -> tuple[LoaderOptions, DecodingOptions, DeviceOptions]:
    """The groups, from what was given for each and from arguments from before there were groups.

    Args:
        old: arguments by their old names, which count before what is given in a group, as on a command line
            over a file; each is a DeprecationWarning that names the new place.
        given: `loader`, `decoding` and `device`: options, mappings of their fields, or None.

    Raises:
        ConfigError: a field that does not exist, or a value out of range.
        TypeError: an argument that there never was.
    """
    found = {}
    moved: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in old.items():
        if name not in MOVED:
            meant = nearest(name, MOVED)
            raise TypeError(f"CuratedDataModule got an unexpected keyword argument {name!r}{meant}")
        group, field = MOVED[name]
        warnings.warn(
            f"CuratedDataModule: the argument {name!r} is deprecated, pass "
            f"{group}={GROUPS[group].__name__}({field}=...)",
            DeprecationWarning,
            stacklevel=3,
        )
        moved[group][field] = value
    for group, schema in GROUPS.items():
        base = given[group]
        if isinstance(base, Mapping):
            check_fields(base, [field.name for field in dataclasses.fields(schema)], group)
            base = schema(**base)
        elif base is not None and not isinstance(base, schema):
            raise ConfigError(
                f"{group}: expected {schema.__name__} or a mapping of its fields, found {base!r}"
            )
        found[group] = dataclasses.replace(base or schema(), **moved[group])
    return found["loader"], found["decoding"], found["device"]


class Moved:
    """An attribute from before there were groups, which still reads and sets, with a warning."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.group, self.field = MOVED[name]

    def __get__(self, data: Any, owner: type | None = None) -> Any:
        return self if data is None else getattr(self._group_of(data), self.field)

    def __set__(self, data: Any, value: Any) -> None:
        setattr(data, self.group, dataclasses.replace(self._group_of(data), **{self.field: value}))

    def _group_of(self, data: Any) -> Any:
        warnings.warn(
            f"{type(data).__name__}.{self.name} is deprecated, use {self.group}.{self.field}",
            DeprecationWarning,
            stacklevel=3,
        )
        return getattr(data, self.group)


def check_fields(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Check that a mapping has no other fields.

    Raises:
        ConfigError: names the first other one, and the nearest that is known.
    """
    for field in value:
        if field not in known:
            hint = nearest(field, known) or f"; fields are {', '.join(known)}"
            raise ConfigError(f"{where}, {field}: no such field{hint}")
