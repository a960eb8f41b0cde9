"""Pools of rendered signs: glyphs by script, and lines of text by typeface."""

import unicodedata
from pathlib import Path

import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from benchmarks.pools.base import SIZE, Labelled, debian, pictures_below, split
from benchmarks.pools.texts import glosses_of

Parts = tuple[Labelled, Labelled]
TYPEFACES = [
    "lato", "cantarell", "open-sans", "freefont-ttf", "liberation", "hack", "inconsolata", "comic-neue",
    "dejavu-core", "linuxlibertine", "crosextra-carlito", "junicode", "quattrocento", "vollkorn",
    "ebgaramond", "cabin", "courier-prime", "play", "dancingscript", "humor-sans",
]  # fmt: skip


def glyphs(folder: Path) -> Parts:
    """Characters of the Noto fonts by script, each once: as many as a script has, at most 400."""
    rng = np.random.default_rng(0)
    items: list[np.ndarray] = []
    names: list[str] = []
    seen: set[int] = set()
    for file in pictures_below(debian("fonts-noto-core", folder), "NotoSans*-Regular.ttf"):
        codes = [code for code in FT2Font(str(file)).get_charmap() if code > 0x2FF and code not in seen]
        seen.update(codes)
        font = ImageFont.truetype(str(file), 40, layout_engine=ImageFont.Layout.BASIC)
        for code in rng.permutation(codes).tolist():
            image = Image.new("L", (SIZE, SIZE), 128)
            ImageDraw.Draw(image).text((SIZE // 2, SIZE // 2), chr(code), fill=255, font=font, anchor="mm")
            script = unicodedata.name(chr(code), "").split(" ")[0].split("-")[0]
            if np.ptp(np.asarray(image)) and names.count(script) < 400:
                items.append(np.asarray(image.convert("RGB")))
                names.append(script)
    return split(items, names, most=6000)


def documents(folder: Path, seed: int = 0) -> Parts:
    """Pieces of a page of English, by family of typefaces; ink and paper vary."""
    rng = np.random.default_rng(0)
    lines = [text for text, _ in glosses_of(folder)]
    items, names = [], []
    for family in TYPEFACES:
        files = pictures_below(debian(f"fonts-{family}", folder), "*.[to]tf")
        for _ in range(700):
            font = ImageFont.truetype(str(files[rng.integers(len(files))]), int(rng.integers(14, 34)))
            ink, paper = int(rng.integers(0, 90)), int(rng.integers(150, 256))
            image = Image.new("L", (SIZE, SIZE), paper)
            text = "\n".join(lines[rng.integers(len(lines))][:60] for _ in range(5))
            ImageDraw.Draw(image).text(
                (-rng.integers(0, 60), -rng.integers(0, 10)), text, fill=ink, font=font
            )
            items.append(np.asarray(image.convert("RGB")))
            names.append(family)
    return split(items, names, seed, 50)
