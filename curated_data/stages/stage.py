"""What all stages have in common, and the one way to run them."""

import abc
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from curated_data.cache import MANIFEST, build_once, fingerprint, write_manifest
from curated_data.config import CurationConfig
from curated_data.holds import hold
from curated_data.shared_build import build_together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage(abc.ABC):
    """A stage whose result is one folder of the cache, named by its settings and by what it is made from.

    Attributes:
        root: an opened cache.
        config: of the curation; `settings` takes from it what this stage depends on.
        inputs: the names of the artifacts that it is made from; None: not known yet, as in a plan.
    """

    place: ClassVar[str]  # the folder of the cache, from `layout`
    kind: ClassVar[str]  # what its manifests say they are of
    step: ClassVar[str]  # what it does, as in reports and plans
    version: ClassVar[int]  # increased when it makes something else of the same: older artifacts are not used

    root: Path
    config: CurationConfig
    inputs: Mapping[str, str] | None

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What determines the result, besides the inputs, as plain values."""

    @property
    def name(self) -> str:
        """The artifact's name."""
        assert self.inputs is not None, "known, or it has no name"
        return fingerprint(stage=self.place, inputs=self.inputs, settings=self.settings, version=self.version)

    @property
    def folder(self) -> Path:
        """The artifact's folder, which need not exist yet."""
        return self.root / self.place / self.name

    @property
    def is_cached(self) -> bool:
        return self.inputs is not None and (self.folder / MANIFEST).exists()

    def write_manifest(self, folder: Path, **found: Any) -> None:
        """Finish an artifact: what determined it, and what was found."""
        content = {"inputs": dict(self.inputs or {}), "settings": self.settings, **found}
        write_manifest(folder, self.kind, content)


@dataclass
class Run:
    """The stages of one curation as they run.

    Attributes:
        root: an opened cache.
        device: for embedding and clustering.
        folders: of the artifacts so far.
        cached: which of those stages that have one artifact found it in the cache.
        seconds: that each step took.
    """

    root: Path
    device: str | torch.device = "auto"
    folders: dict[str, Path] = field(default_factory=dict)
    cached: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def once(self, stage: Stage, build: Callable[[Path], None]) -> Path:
        """Build a stage's artifact unless it is cached: one process does, others that ask for it wait.

        Args:
            build: writes the artifact, manifest included, into the folder that it is given.
        """
        return self._built(stage, lambda: build_once(stage.folder, build))

    def together(
        self, stage: Stage, build: Callable[[Path | None], None], check: Callable[[], None] | None = None
    ) -> Path:
        """Build a stage's artifact unless it is cached: all ranks work on it.

        Args:
            build: as for `once`, called on every rank; only rank zero gets a folder.
            check: called before it, on rank zero.
        """
        return self._built(stage, lambda: build_together(stage.folder, build, check))

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Record and log how long a block takes."""
        log.info("%s: begins", step)
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 3)
        log.info("%s: done in %.1f s", step, self.seconds[step])

    def _built(self, stage: Stage, build: Callable[[], tuple[Path, bool]]) -> Path:
        hold(stage.folder)
        started = time.monotonic()
        if not stage.is_cached:
            log.info("%s: begins, for %s", stage.step, stage.folder)
        folder, cached = build()
        seconds = round(time.monotonic() - started, 3)
        self.folders[stage.place], self.cached[stage.place], self.seconds[stage.step] = (
            folder,
            cached,
            seconds,
        )
        log.info("%s: %s", stage.step, "found in the cache" if cached else f"done in {seconds:.1f} s")
        return folder
