"""
FSDP2 on CPU processes, for tests.

accelerate (1.15) turns to FSDP only from its GPU-like backends: on CPU an FSDP configuration runs plain DDP without a
word. Everything below that switch works with gloo, so it is enough to show it another backend name. A script calls
[`allow_fsdp_on_cpu`] before it creates its training arguments (with `use_cpu=True`), is launched with
`examples/accelerate_configs/fsdp2_cpu.yaml`, and asserts `accelerator.is_fsdp2`.
"""

from accelerate import PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Make `AcceleratorState` consider `ACCELERATE_USE_FSDP` on CPU processes too."""
    original = PartialState.__init__

    def __init__(self, cpu: bool = False, **kwargs):
        original(self, cpu, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU  # the device stays the CPU, the backend gloo

    PartialState.__init__ = __init__
