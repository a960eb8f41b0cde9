"""The fields of samples and batches, by what a user asked for, and which members they are decoded from."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from curated_data.errors import ConfigError, nearest
from curated_data.pool.decode import TEXT_EXTENSIONS, Decoders, has_images

MODALITIES = ("image", "array", "text")  # the first one that a sample has is augmented
BESIDE_IMAGES = ("label", "caption", "metadata")
_OURS = ("sample_id", "views", "encoded", "view_seed", "padding", "members")
_KNOWN = ("npy", *TEXT_EXTENSIONS, "cls", "json")  # the extensions that have fields, beside those of images


def checked_fields(
    fields: Sequence[str] | None, decoders: Decoders | None, image_extensions: Sequence[str]
) -> frozenset[str]:
    """The fields that batches have beside the images, arrays or texts themselves.

    Args:
        fields: of "label", "caption" and "metadata", and the extensions of custom decoders for members with
            no field; None: all.
        decoders: see `as_decoders`.
        image_extensions: of the pool.

    Raises:
        ConfigError: an unknown field, or a decoder whose output would be called as something else is.
    """
    own = [name for name in decoders or () if name not in (*_KNOWN, *image_extensions)]
    for name in own:
        if name in (*_OURS, *MODALITIES):
            raise ConfigError(f"decoders[{name!r}]: batches have a {name!r} already; rename these members")
    possible = (*BESIDE_IMAGES, *own)
    if fields is None:
        return frozenset(possible)
    if isinstance(fields, str):
        raise ConfigError(f"fields: expected a list of names, found {fields!r}")
    for name in fields:
        if name not in possible:
            meant = nearest(name, possible)
            raise ConfigError(f"fields: expected some of {', '.join(possible)}, found {name!r}{meant}")
    return frozenset(fields)


def asked_members(
    members: Mapping[str, Any],
    fields: Collection[str],
    decoders: Decoders | None,
    image_extensions: Sequence[str],
) -> dict[str, Any]:
    """The members of a sample that its image, array or text and these fields are decoded from.

    A `.json` that is the sample's only text stays, whether or not `metadata` is asked for.
    """
    names = [name for name in members if not name.startswith("__")]
    has_image = has_images(names, image_extensions)
    has_array = has_images(names, ("npy",))
    has_text = has_images(names, TEXT_EXTENSIONS)
    left_out = set()
    for name in names:
        extension = name.rpartition(".")[2]
        if name == "cls":
            wanted = "label" in fields
        elif name == "json":
            wanted = "metadata" in fields or not (has_image or has_array or has_text)
        elif extension in TEXT_EXTENSIONS:
            wanted = "caption" in fields or not (has_image or has_array)
        elif extension == "npy" or extension in image_extensions or decoders is None:
            wanted = True
        else:
            wanted = name in fields or extension in fields or not (name in decoders or extension in decoders)
        if not wanted:
            left_out.add(name)
    return {name: value for name, value in members.items() if name not in left_out}
