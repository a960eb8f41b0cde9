"""Pools of drawn images: emoji, icons, cliparts, sprites of a game."""

import json
from pathlib import Path

from PIL import Image

from benchmarks.pools.base import Labelled, debian, npm, picture, pictures_below, split

Parts = tuple[Labelled, Labelled]


def emoji(folder: Path) -> Parts:
    """Emoji of three vendors by subcategory: skin tones and flags are the head."""
    items, names = [], []
    for vendor in ("google", "twitter"):
        package = npm(f"emoji-datasource-{vendor}@16.0.0", folder)
        entries = json.loads((package / "emoji.json").read_text())
        for entry in entries:
            for form in (entry, *entry.get("skin_variations", {}).values()):
                file = package / "img" / vendor / "64" / form["image"]
                if file.exists():
                    items.append(picture(Image.open(file)))
                    names.append(entry["subcategory"])
    kinds = {form["unified"].lower(): entry["subcategory"] for entry in entries for form in (entry,)}
    for file in pictures_below(npm("@lobehub/fluent-emoji-3d@1.1.0", folder) / "assets", "*.webp"):
        if file.stem in kinds:
            items.append(picture(Image.open(file)))
            names.append(kinds[file.stem])
    return split(items, names)


def icons(folder: Path) -> Parts:
    """Icons of four desktop themes by context (actions, apps, devices …)."""
    items, names = [], []
    roots = [
        debian("oxygen-icon-theme", folder) / "usr/share/icons/oxygen/base/64x64",
        debian("mate-icon-theme", folder) / "usr/share/icons/mate/48x48",
        debian("gnome-icon-theme", folder) / "usr/share/icons/gnome/48x48",
        debian("tango-icon-theme", folder) / "usr/share/icons/Tango/32x32",
    ]
    for root in roots:
        for file in pictures_below(root):
            items.append(picture(Image.open(file)))
            names.append(file.relative_to(root).parts[0])
    return split(items, names)


def cliparts(folder: Path) -> Parts:
    """Cliparts by topic."""
    root = debian("openclipart-png", folder) / "usr/share/openclipart/png"
    items, names = [], []
    Image.MAX_IMAGE_PIXELS = None
    for file in pictures_below(root):
        try:
            image = Image.open(file)
            image.thumbnail((128, 128))
        except OSError:
            continue  # a few are empty
        items.append(picture(image))
        names.append(file.relative_to(root).parts[0])
    return split(items, names)


def sprites(folder: Path) -> Parts:
    """Units of The Battle for Wesnoth, animation frames included, by people."""
    return _wesnoth(folder, "units")


def terrain(folder: Path) -> Parts:
    """Terrain tiles of The Battle for Wesnoth by kind of ground."""
    return _wesnoth(folder, "terrain")


def _wesnoth(folder: Path, kind: str) -> Parts:
    root = debian("wesnoth-1.16-data", folder) / "usr/share/games/wesnoth/1.16/data/core/images" / kind
    files = [file for file in pictures_below(root) if file.parent != root]
    return split([picture(Image.open(f)) for f in files], [f.relative_to(root).parts[0] for f in files])
