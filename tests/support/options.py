"""A data module's arguments by the short names that tests pass about."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from curated_data import DecodingOptions, LoaderOptions

PLACES = {
    field.name: (group, field.name)
    for group, options in (("loader", LoaderOptions), ("decoding", DecodingOptions))
    for field in dataclasses.fields(options)
} | {"device_views": ("device", "views"), "decode_on_device": ("device", "decode")}


def grouped(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`num_workers=0` as `loader={"num_workers": 0}`, and so on; other arguments stay."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in PLACES:
            group, field = PLACES[name]
            found.setdefault(group, {})[field] = value
        else:
            found[name] = value
    return found
