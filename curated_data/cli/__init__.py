"""The command line: `curated-data demo | recipe | import | curate | …`."""

import argparse
import logging
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from curated_data import __version__
from curated_data.cli import curation, embeddings, inspect, recipe, results, search, shards, tune
from curated_data.progress import log_to_terminal

_OVERVIEW = """Balanced subsets of long-tailed pools of WebDataset shards.

see it work
  demo         the quickstart: curate, pretrain, compare, on images that are included
  recipe       run one of the recipes, or copy them and their settings: pretraining, evaluation, …

make shards
  import       of a folder of class folders of images, or of other archives
  export       of a selection

select
  curate       index, embed, cluster, sample; with --dry-run what that would take
  extend       from a pool that has grown, with an existing tree
  tune         compare a dozen settings by a few hundred labels
  duplicates   show pairs of near-duplicates, to choose their threshold by looking

look at what was done
  report       one HTML page on a curation
  table        all that is known of each sample, as parquet
  search       the samples nearest to an image, a text or a vector
  inspect      what a cache holds and what determined it, or why a sample was selected

stage by stage, ahead of `curate`
  index        find the place of every sample
  embed        embed every sample"""
_REPEATED = ("--set", "--storage-options")
_SETTING = re.compile(r"[A-Za-z_][\w.\[\]]*=|\{")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 after an error in the input, or 130 after Ctrl-C.

    SIGTERM is cleaned up after, too, and exits with 143.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["demo"]:
        given[:1] = ["recipe", "quickstart"]
    parsed = _parser().parse_args(given if given[:1] == ["recipe"] else _one_each(given))
    log_to_terminal(logging.WARNING if parsed.quiet else logging.INFO)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print(f"curated-data {parsed.command}: stopped; run it again to continue", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if parsed.traceback:
            raise
        print(f"curated-data {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _one_each(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--set A=1 B=2 POOL` as `--set A=1 --set B=2 POOL`, so that it takes no shards."""
    separate: list[str] = []
    option = None
    for number, argument in enumerate(arguments):
        if argument == "--":
            return [*separate, *arguments[number:]]
        if option is not None and (separate[-1] == option or _SETTING.match(argument)):
            if separate[-1] != option:
                separate.append(option)
            separate[-1] = f"{option}={argument}"
        else:
            option = argument if argument in _REPEATED else None
            separate.append(argument)
            continue
    return separate


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="curated-data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [--version] [-q] [--traceback] COMMAND …",
        description=_OVERVIEW,
        epilog="`curated-data COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-q", "--quiet", action="store_true", help="log only warnings")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(
        dest="command", required=True, prog="curated-data", metavar="COMMAND", help=argparse.SUPPRESS
    )
    for part in (recipe, shards, curation, tune, embeddings, results, search, inspect):
        part.add(commands)
    return parser
