"""Cross-entropy of the output head without keeping logits. Letters: T tokens, D model dim, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # target of a position that is no real token
BLOCK = 2**17  # logits that a core of a CPU takes at a time: half a MiB in float32, of an L2 cache of 1 MiB or more


class _ChunkedCrossEntropy(torch.autograd.Function):
    # The gradient of a chunk is known as soon as its logits are: it is taken in the forward pass, while they exist, so
    # that no [T, V] tensor is kept and no logit is computed twice. Backward only scales, in place: a second backward pass
    # through the same graph is an error of autograd's.
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[:2])
        weight = weight_VD.to(hidden_TD.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if needs_grad else None
        grad_weight = None
        space = hidden_TD.new_empty(min(chunk, len(hidden_TD)), len(weight))  # one for all chunks
        for start in range(0, hidden_TD.shape[0], chunk):
            hidden, targets = hidden_TD[start : start + chunk], targets_T[start : start + chunk]
            logits = torch.mm(hidden, weight.T, out=space[: len(hidden)])
            total += _loss_and_gradient_(logits, targets, needs_grad)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + chunk])
                if grad_weight is None:
                    grad_weight = (logits.T @ hidden).float()
                elif hidden.dtype == torch.float32:
                    grad_weight.addmm_(logits.T, hidden)
                else:
                    grad_weight += logits.T @ hidden
        if needs_grad and grad_weight is None:  # no tokens
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None


def _loss_and_gradient_(logits_TV: Tensor, targets_T: Tensor, needs_grad: bool) -> Tensor:
    """The sum of the losses, float32; with needs_grad the logits are overwritten by its gradient, computed in float32.

    There are eight passes over the logits. A GPU makes each of them over all; a CPU makes all of them over as many as its
    cache holds before it takes the next.
    """
    tokens, vocabulary = logits_TV.shape
    rows = max(1, BLOCK * torch.get_num_threads() // vocabulary) if logits_TV.device.type == "cpu" else tokens
    total = torch.zeros((), dtype=torch.float32, device=logits_TV.device)
    for logits, targets in zip(logits_TV.split(rows), targets_T.split(rows), strict=True):
        real = targets != IGNORED
        index = targets.clamp_min(0)[:, None]
        wide = logits.float()
        highest = wide.amax(dim=-1, keepdim=True)
        target_logits = wide.gather(-1, index)
        exps = wide.sub_(highest).exp_()  # in place, and the only exponential: it serves the loss and the gradient
        sums = exps.sum(dim=-1, keepdim=True)
        total += ((highest + sums.log() - target_logits)[:, 0] * real).sum()
        if needs_grad:
            exps.mul_(real[:, None] / sums)  # softmax, and 0 where the token is no real one
            exps.scatter_add_(-1, index, -real[:, None].float())
            if logits is not wide:
                logits.copy_(exps)
    return total


def chunked_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """Sum over real tokens of -log softmax(hidden weight^T)[target]; float32 scalar, nats.

    hidden_TD any float dtype (the products are taken in it, softmax in float32), weight_VD float32, targets_T int64 with
    IGNORED for positions that do not count. At most chunk * V logits exist at one time.
    """
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, chunk)
