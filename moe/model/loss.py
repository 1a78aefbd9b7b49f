"""Cross-entropy of the output head without keeping logits. Letters: T tokens, D model dim, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # target of a position that is no real token


class _ChunkedCrossEntropy(torch.autograd.Function):
    # The gradient of a chunk is known as soon as its logits are: it is taken in the forward pass, while they exist, so
    # that no [T, V] tensor is kept and no logit is computed twice. Backward only scales.
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[:2])
        weight = weight_VD.to(hidden_TD.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if needs_grad else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        for start in range(0, hidden_TD.shape[0], chunk):
            hidden, targets = hidden_TD[start : start + chunk], targets_T[start : start + chunk]
            real = targets != IGNORED
            index = targets.clamp_min(0)[:, None]
            logits = (hidden @ weight.T).float()
            highest = logits.amax(dim=-1, keepdim=True)
            target_logits = logits.gather(-1, index)
            exps = logits.sub_(
                highest
            ).exp_()  # in place, and the only exponential: it serves the loss and the gradient
            sums = exps.sum(dim=-1, keepdim=True)
            total += ((highest + sums.log() - target_logits)[:, 0] * real).sum()
            if grad_hidden is not None and grad_weight is not None:
                exps.mul_(real[:, None] / sums)  # softmax, and 0 where the token is no real one
                exps.scatter_add_(-1, index, -real[:, None].float())
                grad_logits = exps.to(hidden.dtype)
                grad_hidden[start : start + chunk] = grad_logits @ weight
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.T, hidden)
                else:
                    grad_weight += grad_logits.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad * grad_hidden).to(grad_hidden.dtype), grad * grad_weight, None, None


def chunked_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """Sum over real tokens of -log softmax(hidden weight^T)[target]; float32 scalar, nats.

    hidden_TD any float dtype (the products are taken in it, softmax in float32), weight_VD float32, targets_T int64 with
    IGNORED for positions that do not count. At most chunk * V logits exist at one time.
    """
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, chunk)
