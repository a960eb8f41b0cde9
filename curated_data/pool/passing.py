"""Which errors come from a sample's bytes, and which only happened while the sample was decoded.

The former are the sample's: it is left out for good, counted and named. All others (memory that ran out, a
disk that failed, a signal about another process) would not happen again, so they must stop the work instead.
"""

import gzip
import lzma
import re
import struct
import sys
import tarfile
import traceback
import zipfile
import zlib

from PIL import Image, UnidentifiedImageError

from curated_data.errors import CuratedDataError, SampleError

_FILE_FORMATS = (UnidentifiedImageError, gzip.BadGzipFile)  # `OSError`s by descent alone

# What decoders of Python, Pillow and numpy raise for bytes that they cannot decode.
_OF_BYTES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    SyntaxError,
    EOFError,
    RecursionError,
    NotImplementedError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    *_FILE_FORMATS,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # an error if the user's filter makes it one
)
# Messages of plain `RuntimeError`s, with which torch also reports damaged bytes, and of codecs' `OSError`s.
_OF_THE_MACHINE = re.compile(
    r"dataloader worker|out of memory|not enough memory|can(?:no|')t allocate|bad_alloc|start new thread|"
    r"shared memory|shm_|mmap|file descriptor|too many open files|no space left|pin memory|after shutdown|"
    r"\b(?:cuda|hip|mps|xpu|nccl|cudnn|cublas)\b.*error|device-side",
    re.IGNORECASE,
)
_TORCHS_SIGNALS = "signal_handling.py"


def is_samples(error: BaseException) -> bool:
    """Whether an error that a decoder or a preprocess raised comes from the bytes of its sample.

    It does if it is a `SampleError`; one of the errors that Python, Pillow and numpy raise for damaged bytes
    (as `ValueError`, `KeyError`, `SyntaxError`, or an `OSError` itself without an `errno`); a `RuntimeError`
    that speaks of neither memory, a device, a thread, shared memory nor a worker process; or of a package's
    own class that derives from no other of Python's errors, as `cv2.error`. Nothing that was raised while one
    of the machine's errors was handled, or because of it, comes from the bytes.
    """
    link: BaseException | None = error
    met: set[int] = set()
    while link is not None and id(link) not in met:
        if _is_machines(link):
            return False
        met.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    if isinstance(error, CuratedDataError):
        return isinstance(error, SampleError)
    if isinstance(error, _OF_BYTES) or type(error) in (OSError, RuntimeError):
        return True
    plain = not isinstance(error, OSError | ImportError | NameError | SystemError | Warning)
    return isinstance(error, Exception) and plain and not _is_pythons_or_torchs(type(error))


def _is_machines(error: BaseException) -> bool:
    """Whether an error's type alone shows that it has nothing to do with the bytes."""
    if isinstance(error, MemoryError) or not isinstance(error, Exception):
        return True
    if isinstance(error, (*_FILE_FORMATS, CuratedDataError)):
        return False
    if isinstance(error, OSError):
        # Decoders raise it with a message alone, the system with a number or as a kind of its own.
        return type(error) is not OSError or error.errno is not None or _speaks_of_machine(error)
    if isinstance(error, RuntimeError):
        frames = traceback.extract_tb(error.__traceback__, limit=-1)
        of_a_signal = bool(frames) and frames[-1].filename.endswith(_TORCHS_SIGNALS)
        return of_a_signal or _speaks_of_machine(error)
    return False


def _speaks_of_machine(error: Exception) -> bool:
    return _OF_THE_MACHINE.search(str(error)) is not None


def _is_pythons_or_torchs(kind: type) -> bool:
    root = kind.__module__.partition(".")[0]
    return root in sys.stdlib_module_names or root == "torch"
