"""What a piece of code allocates and how often it projects."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Recorder(TorchDispatchMode):
    """Records the size of every allocation and the number of calls of every operation."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        old = {x.untyped_storage().data_ptr() for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result

    @property
    def projections(self) -> int:
        return self.calls["mm"] + self.calls["addmm_"] + self.calls["addmm"]
