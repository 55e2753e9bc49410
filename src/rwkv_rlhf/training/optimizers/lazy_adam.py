"""Adam for tables by token, of which a step touches a few rows: the lazy form, that of torch.optim.SparseAdam.

In a step only the rows with a gradient take part, those of the tokens that occurred, and they do what dense Adam does
(Kingma and Ba, arXiv 1412.6980, algorithm 1). The other rows are what differs: dense Adam lets their moments decay and
moves them on by what is left; here neither they nor their moments change. The bias correction counts the steps of the
whole table, so a row that first occurs late begins with moments that are near zero, uncorrected. Weights do not decay.
torch's own keeps moments of all rows, of which most are zeros where the table is that of a vocabulary.

Legend: V vocabulary, C numbers of a row, n rows that have occurred so far, k rows of this step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.training.optimizers.stepping import Stepping

MOMENTS = ("exp_avg", "exp_avg_sq")
NONE = -1  # the place of a row that never occurred


class LazyAdam(Stepping):
    """Updates tables (V, C) by sparse gradients with one sparse axis.

    State of a table: `step`, its updates so far; `place` (V,) int64, where the moments of a row are, or NONE; `exp_avg`
    and `exp_avg_sq` (n, C), these moments, of rows that have occurred. Gradients of several micro-batches are added up
    row by row, so that they take no more than the rows that occur.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        for group in self.param_groups:
            for table in group["params"]:
                table.register_post_accumulate_grad_hook(_add_up)

    def update(self) -> None:
        """One step of every table that has a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    gradient = table.grad.coalesce()
                    self._update(table, gradient.indices()[0], gradient.values(), group)

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """rows (k,) int64, each once; gradient (k, C)."""
        state, (beta1, beta2) = self.state[table], group["betas"]
        if not state:
            state["step"] = 0
            state["place"] = torch.full((len(table),), NONE, device=table.device)
            state |= {name: table.new_empty(0, table.shape[1]) for name in MOMENTS}
        state["step"] += 1
        self._make_room(state, rows)
        at = state["place"][rows]
        first = state["exp_avg"][at].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"][at].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"][at], state["exp_avg_sq"][at] = first, second
        corrected = second.div_(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
        table.index_add_(0, rows, first.div_(corrected), alpha=-group["lr"] / (1 - beta1 ** state["step"]))

    @staticmethod
    def _make_room(state: dict[str, Any], rows: Tensor) -> None:
        """Moments of zero for those of the `rows` that occur for the first time."""
        new = rows[state["place"][rows] == NONE]
        if not len(new):
            return
        held = len(state["exp_avg"])
        state["place"][new] = torch.arange(held, held + len(new), device=new.device)
        for name in MOMENTS:
            moment = state[name]
            state[name] = torch.cat([moment, moment.new_zeros(len(new), moment.shape[1])])


def _add_up(table: Tensor) -> None:
    """After a backward pass: each row of the gradient once."""
    assert table.grad is not None and table.grad.is_sparse
    table.grad = table.grad.coalesce()
