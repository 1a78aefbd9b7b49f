"""Router scores of a training run: read by a probe for the regret, or recorded for the laboratory.

Letters: L MoE layers, T tokens, E experts, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe.model.router import Router, Routing
from moe.model.transformer import Transformer
from moe.parallel import Ranks


@contextmanager
def tapped(
    routers: Mapping[int, Router], what: Callable[[Routing], Tensor] = lambda routing: routing.scores_TE
) -> Iterator[dict[int, list[Tensor]]]:
    """While open, the scores [T, E] of every forward pass, real tokens only, are appended under the router's layer; or
    `what` else of a routing has a row a token."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in routers}

    def tap(layer: int):
        def note(_module: object, inputs: tuple, routing: Routing) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # a recomputation in the backward pass: these tokens were seen
            mask_T = inputs[1]  # the layer passes it by position
            found[layer].append(what(routing) if mask_T is None else what(routing)[mask_T])

        return note

    hooks = [router.register_forward_hook(tap(layer)) for layer, router in routers.items()]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled block does not look for new hooks
            yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def probe_scores(model: Transformer, parts: Sequence[tuple[Tensor, Tensor | None]], ranks: Ranks) -> Tensor:
    """Scores [L, T, E] float32 of the tokens of all ranks, in the order of the ranks. Forward passes without gradient in
    evaluation mode, whose statistics and losses nobody takes. parts: tokens_BS and mask_T (bool, False for padding) of one
    pass each; as many on every rank."""
    was_training = model.training
    model.eval()
    with tapped(model.routers) as found:
        for tokens_BS, mask_T in parts:
            model.hidden(tokens_BS, mask_T)
    model.train(was_training)
    return ranks.gather_rows(torch.stack([torch.cat(scores) for scores in found.values()], dim=1)).transpose(0, 1)


class ScoreRecorder:
    """Keeps the scores of training steps `first` to `first + count - 1` (from 1) of every layer and writes
    <run>/scores/layer_NN_steps_A-B.npz: scores [N, T, E] float32 of the global batch, top_k, steps [N]. Rank 0 holds
    N * T * E * 4 bytes a layer until then."""

    def __init__(self, routers: Mapping[int, Router], top_k: int, first: int, count: int, folder: Path):
        self.routers, self.top_k, self.folder = routers, top_k, folder
        self.steps = range(first, first + count)
        self._kept: dict[int, list[np.ndarray]] = {layer: [] for layer in routers}
        self._seen: list[int] = []

    @contextmanager
    def step(self, number: int, ranks: Ranks) -> Iterator[None]:
        """Around the forward and backward passes of step `number`, on every rank."""
        if number not in self.steps:
            yield
            return
        with tapped(self.routers) as found:
            yield
        self._seen.append(number)
        for layer, scores in found.items():
            every_TE = ranks.gather_rows(torch.cat(scores))
            if ranks.is_main:
                self._kept[layer].append(every_TE.cpu().numpy())
        if number == self.steps[-1]:
            self.write(ranks)

    def write(self, ranks: Ranks) -> None:
        """Write what was recorded, once; steps with padding are cut to the shortest."""
        if not ranks.is_main or not self._seen:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for layer, kept in self._kept.items():
            tokens = min(len(scores) for scores in kept)
            scores = np.stack([scores[:tokens] for scores in kept])
            name = f"layer_{layer:02d}_steps_{self._seen[0]}-{self._seen[-1]}.npz"  # a resumed run adds files
            np.savez(self.folder / name, scores=scores, top_k=self.top_k, steps=self._seen)
            kept.clear()
        self._seen = []
