"""Peak memory of a piece of code, measured in a process of its own. Shared by the benchmarks that need one."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


MIB = 2**20
QUANTITIES = ("resident", "allocated", "largest", "gradients")


class AllocationMeter(TorchDispatchMode):
    """
    Live bytes of tensor storages allocated inside the context: their peak, and the largest single one other than the
    gradients, which are recognised by their shapes.
    """

    def __init__(self, existing: list[Tensor], gradients: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}
        self._gradient_shapes = {tensor.shape for tensor in gradients}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._track(tensor.untyped_storage(), is_gradient=tensor.shape in self._gradient_shapes)
        return output

    def _track(self, storage: torch.UntypedStorage, is_gradient: bool) -> None:
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, 0 if is_gradient else size)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process. Unlike `ru_maxrss`, they do not carry over from the parent."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory(run: Callable[[], Any], existing: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, int]:
    """
    What `run` needs on top of the `existing` tensors: peaks of the resident and of the allocated bytes, and the
    largest tensor but for gradients of the tensors in `gradients`, whose size is the last entry.
    """
    meter = AllocationMeter(list(existing), list(gradients))
    reset_peak()
    before = resident_bytes("VmRSS")
    with meter:
        run()
    resident = resident_bytes("VmHWM") - before
    sizes = sum(tensor.nbytes for tensor in gradients)
    return {"resident": resident, "allocated": meter.peak, "largest": meter.largest, "gradients": sizes}


def in_new_process(script: str, arm: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """What `script` prints last when it is told to measure one arm."""
    command = [sys.executable, script, "--measure", json.dumps({"arm": arm, **sizes})]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def collect(
    report: Any, script: str, arms: Sequence[str], sizes: dict[str, int], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """`repeats` measurements of each arm, in alternation."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm in arms:
            results[arm].append(in_new_process(script, arm, sizes))
    for arm, measurements in results.items():
        for name in QUANTITIES:
            values = [measurement[name] / MIB for measurement in measurements]
            report.note(f"V={sizes['vocab']}, {arm}: {name} (MiB)", values)
    return results
