"""Grouped-query attention with rotary positions. Letters: B batch, S sequence, T = B*S tokens, H heads, D model dim, d head dim.

Packed documents: with `data.document_mask` a token attends only to its own document: variable-length attention on CUDA
(not run on a GPU yet), a dense mask on CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelSection
from moe.model.experts import Linear


class Positions(NamedTuple):
    """What attention needs to know about the places of the tokens: rotary cos, sin [S, d/2] float32; and, only with a
    document mask, either mask_B1SS bool (CPU) or the cumulative document lengths of the flattened batch (CUDA)."""

    cos: Tensor
    sin: Tensor
    mask_B1SS: Tensor | None
    document_ends: Tensor | None


def positions(tokens_BS: Tensor, model: ModelSection, eos_id: int | None) -> Positions:
    """Rotary tables (arXiv:2104.09864) and the document mask; eos_id None: plain causal. Rotary angles are relative, so
    documents need no positions of their own. Computed here each time: no buffer that meta-initialisation could spoil."""
    batch, seq = tokens_BS.shape
    head_dim = model.head_dim or model.dim // model.num_heads
    powers = torch.arange(0, head_dim, 2, device=tokens_BS.device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(seq, device=tokens_BS.device, dtype=torch.float32), model.rope_theta**-powers)
    mask_B1SS = document_ends = None
    if eos_id is not None:
        is_end = tokens_BS == eos_id
        if tokens_BS.is_cuda:
            is_end = is_end.clone()
            is_end[:, -1] = True  # a sequence ends its last document
            ends = is_end.reshape(-1).nonzero()[:, 0] + 1  # sync: number of documents
            document_ends = F.pad(ends, (1, 0)).to(torch.int32)
        else:
            document_BS = is_end.cumsum(1) - is_end.long()  # the end token belongs to the document that it ends
            same = document_BS[:, :, None] == document_BS[:, None, :]
            causal = torch.ones(seq, seq, dtype=torch.bool, device=tokens_BS.device).tril()
            mask_B1SS = (same & causal)[:, None]
    return Positions(angles.cos(), angles.sin(), mask_B1SS, document_ends)


def rotate(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the two halves of each head, in float32."""
    a, b = x_BSHd.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BSHd.dtype)


class Attention(nn.Module):
    """o(softmax(q k^T / sqrt d) v), causal, keys and values shared by groups of query heads (arXiv:2305.13245)."""

    def __init__(self, model: ModelSection):
        super().__init__()
        self.head_dim = model.head_dim or model.dim // model.num_heads
        self.num_heads = model.num_heads
        self.num_kv_heads = model.num_kv_heads or model.num_heads
        self.wq = Linear(model.dim, self.num_heads * self.head_dim)
        self.wk = Linear(model.dim, self.num_kv_heads * self.head_dim)
        self.wv = Linear(model.dim, self.num_kv_heads * self.head_dim)
        self.wo = Linear(self.num_heads * self.head_dim, model.dim)

    def forward(self, x_BSD: Tensor, where: Positions) -> Tensor:
        """x_BSD -> [B, S, D], same dtype."""
        batch, seq, _ = x_BSD.shape
        q = rotate(self.wq(x_BSD).view(batch, seq, self.num_heads, self.head_dim), where.cos, where.sin)
        k = rotate(self.wk(x_BSD).view(batch, seq, self.num_kv_heads, self.head_dim), where.cos, where.sin)
        v = self.wv(x_BSD).view(batch, seq, self.num_kv_heads, self.head_dim)
        gqa = self.num_kv_heads != self.num_heads
        if where.document_ends is not None:
            return self.wo(_attend_by_document(q, k, v, where.document_ends, gqa).reshape(batch, seq, -1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = where.mask_B1SS
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        return self.wo(out.transpose(1, 2).reshape(batch, seq, -1))


def _attend_by_document(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, gqa: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = q.shape[1]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    if gqa:  # repeated here: torch 2.11's varlen_attn has no enable_gqa
        repeat = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    # window (-1, 0): everything to the left, nothing to the right
    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor), "a tuple comes back only when return_aux is asked for"
    return out
