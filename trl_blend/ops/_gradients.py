"""Gradients of the student's output layer, added up tile by tile."""

import torch
from torch import Tensor

from trl_blend.ops import _tiles
from trl_blend.ops._tiles import Block, Scratch, TiledModel


class StudentGradients:
    """Gradients of the student's hidden states, weight and bias, in the dtype of the statistics while summed."""

    def __init__(
        self, tensors: tuple[Tensor, Tensor, Tensor | None], needed: tuple[bool, bool, bool], dtype: torch.dtype
    ) -> None:
        hidden, weight, bias = tensors
        needs_hidden, needs_weight, needs_bias = needed
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
        # Finished block by block, so it can have its final dtype at once; only one block is ever wider
        self.weight = torch.zeros_like(weight) if needs_weight else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs_bias and bias is not None else None
        self._dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        self._wide = dtype

    def weight_block(self, block: Block) -> Tensor | None:
        """Where to add up the weight gradient of a block."""
        if self.weight is None:
            return None
        rows = self.weight[block.start : block.stop]
        return rows if rows.dtype == self._wide else torch.zeros_like(rows, dtype=self._wide)

    def add_tile(
        self,
        grad: Tensor,
        student: TiledModel,
        block: Block,
        rows: slice,
        weight_block: Tensor | None,
        scratch: Scratch,
    ) -> None:
        """Add the share of one tile, given the gradient with respect to its projection. The student comes first."""
        if grad.is_cuda and student.dtype in (torch.float16, torch.bfloat16):
            grad = scratch.take("product", *grad.shape, dtype=student.dtype).copy_(grad)
        if self.hidden is not None:
            _tiles.add_product_(self.hidden[rows], grad, block.weights[0])
        if weight_block is not None:
            _tiles.add_product_(weight_block, grad.t(), student.hidden[rows].to(student.dtype))
        if self.bias is not None:
            self.bias[block.start : block.stop] += grad.sum(dim=0, dtype=self.bias.dtype)

    def close_block(self, block: Block, weight_block: Tensor | None) -> None:
        """Round a finished block of the weight gradient to the dtype of the weight."""
        if self.weight is not None and weight_block is not None and weight_block.dtype != self.weight.dtype:
            self.weight[block.start : block.stop] = weight_block

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden = None if self.hidden is None else self.hidden.to(self._dtypes[0])
        bias = None if self.bias is None else self.bias.to(self._dtypes[1])
        return hidden, self.weight, bias
