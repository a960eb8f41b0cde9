"""An accelerator that every machine has: its tensors say that they lie elsewhere; the CPU computes them.

It refuses what a CUDA device refuses: tensors of two devices in one operation, a generator of the CPU, values
read without a copy to the CPU. So code that mixes devices fails here, and other code gives the CPU's numbers.
It knows no streams, no sparse tensors and no kernels of its own.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"

needs_backends_in_python = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)


class Worker:
    """A process in which the device "elsewhere" exists.

    Another process, because a device cannot be unregistered; not forked, because autograd does not survive
    that; and one for many calls, because to import everything again takes seconds.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.end, end = context.Pipe()
        self.process = context.Process(target=_work, args=(end,), daemon=True)
        self.process.start()
        end.close()

    def run(self, function: Callable[..., Any], *arguments: Any, device: str = NAME) -> Any:
        """`function(*arguments)` there; it and they pickle. The device "cpu" leaves the other one out."""
        self.end.send((function, arguments, device))
        if not self.end.poll(120):
            self.process.kill()
            raise TimeoutError("no result in 120 s")
        result = self.end.recv()
        if isinstance(result, str) and result.startswith("Traceback"):
            raise AssertionError(result)
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def trainer(device: str, **options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU or elsewhere."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False,
             "enable_checkpointing": False}  # fmt: skip
    if device == "cpu":
        return L.Trainer(accelerator="cpu", **quiet, **options)
    strategy = SingleDeviceStrategy(device=torch.device(device), accelerator=_Accelerator())
    return L.Trainer(strategy=strategy, devices=1, **quiet, **options)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class _Elsewhere(torch.Tensor):
    """A tensor of the device, and the one in main memory that has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "_Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return _computed(function, arguments, options or {})


class _Mode(TorchDispatchMode):
    """Makes new tensors of the device, and moves others to it."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return _computed(function, arguments, options or {})


_ops = torch.ops.aten
_COPIES = {
    _ops.copy_.default, _ops._to_copy.default, _ops.to.device, _ops.to.dtype_layout, _ops.to.other,
}  # fmt: skip
_INDEXING = {
    _ops.index.Tensor, _ops.index_put.default, _ops.index_put_.default, _ops._index_put_impl_.default,
}  # fmt: skip


def _computed(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    leaves = tree_leaves((arguments, options))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, _Elsewhere) for tensor in tensors)
    devices = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
    target = devices[0] if devices else NAME if there else "cpu"
    mixed = there and any(not isinstance(t, _Elsewhere) and t.dim() > 0 for t in tensors)
    # As with CUDA, places may be numbers of the CPU.
    by_places = function in _INDEXING and isinstance(arguments[0], _Elsewhere)
    if mixed and function not in _COPIES and not by_places:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    if target == NAME and options.get("generator") is not None:
        raise RuntimeError(f"{function}: a generator of the CPU for a tensor elsewhere")

    def inner(value: Any) -> Any:
        if isinstance(value, _Elsewhere):
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    known = {id(inner(tensor)): tensor for tensor in tensors}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        same = known.get(id(value))
        if same is not None and isinstance(same, _Elsewhere) == (target == NAME):
            return same
        value = value if same is None else value.clone()
        return _Elsewhere(value) if target == NAME else value

    options = {name: value for name, value in options.items() if name != "pin_memory"}
    return tree_map(outer, function(*tree_map(inner, arguments), **tree_map(inner, options)))


class _Backend(getattr(backend_registration, "_DummyBackendModule", object)):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Inline:
    """In place of a pool of threads, which the mode would not reach."""

    def map(self, work: Callable[..., Any], pieces: list[Any]) -> list[Any]:
        return [work(piece) for piece in pieces]

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def _work(end: Any) -> None:
    from curated_data import threads

    torch.set_num_threads(1)  # the same numbers from both devices
    threads._pool = lambda *_: _Inline()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes one on the CPU, and moves it
    while True:
        function, arguments, device = end.recv()
        try:
            with _Mode() if device == NAME else contextlib.nullcontext():
                result = function(*arguments)
        except Exception:
            result = traceback.format_exc()
        end.send(result)
