"""A checkpoint of one (dp, ep) layout, read by others. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch.distributed.tensor import DTensor

from moe.parallel import build_ranks
from moe.train import manifest
from moe.train.loop import Run
from tests.corpus import make_token_folder
from tests.moe.train.test_run import config
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU

STEPS, MORE = 3, 10


def whole_tensors(tree, path=""):
    """{path: tensor over all ranks}; a collective."""
    if isinstance(tree, dict):
        return {k: v for key, sub in sorted(tree.items()) for k, v in whole_tensors(sub, f"{path}/{key}").items()}
    if isinstance(tree, torch.Tensor):
        return {path: tree.full_tensor() if isinstance(tree, DTensor) else tree}
    return {path: torch.tensor(float(tree))}


def digests(run):
    return {
        path: (str(tensor.dtype), tuple(tensor.shape), xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes()))
        for path, tensor in whole_tensors(run.state()).items()
    }


def go_on(run):
    """The losses of the next steps, and the weights after them."""
    losses = []
    for _ in range(MORE):
        run.losses_3.zero_()
        run.loss_tokens.zero_()
        assert run.train_step(False)[0].applied
        losses.append(float(run.ranks.sum(run.losses_3)[0] / run.loss_tokens))
    weights = {k: v.detach().numpy().copy() for k, v in whole_tensors(run.engine.state_dict()["model"]).items()}
    return losses, weights


def _settings(data, n, ep):
    return config(
        data, n, parallel__ep=ep, train__steps=STEPS + MORE, balance__method="proportional", balance__rate=0.1
    )


def _load(ranks, data, folder):
    ep = 1 if ranks.ep_mesh is None else ranks.ep_mesh.size()
    run = Run(_settings(data, ranks.world_size, ep), ranks, Path(folder), True)
    return digests(run), asdict(run.progress), run.engine.model.routers[1].expert_bias_E.tolist(), go_on(run)


def _four(rank, n, data, folder):
    run = Run(_settings(data, n, 4), build_ranks(rank, n, CPU, 4), Path(folder), False)
    for _ in range(STEPS):
        run.train_step(False)
    run.save()
    run.saver.wait()
    saved = digests(run), asdict(run.progress), run.engine.model.routers[1].expert_bias_E.tolist(), go_on(run)
    return [saved, *(_load(build_ranks(rank, n, CPU, ep), data, folder) for ep in (4, 2))]


def _two(rank, n, data, folder):
    return _load(build_ranks(rank, n, CPU, 1), data, folder)


def test_p22_p26_any_layout_reads_any_other_s_checkpoint(tmp_path):
    """Saved at (4, 4); loaded at (4, 4), (4, 2), (2, 1) and (1, 1)."""
    data, folder = make_token_folder(tmp_path / "data"), tmp_path / "run"
    folder.mkdir()
    found = run_ranks(_four, 4, str(data), str(folder))
    tensors, progress, bias, (losses, weights) = found[0][0]
    assert any(value != 0 for value in bias) and len(tensors) > 100
    census = manifest.read_census(folder / "checkpoints" / "step-00000003")
    assert list(census) == ["layer_01", "layer_02"] and all(len(row) == 8 for row in census.values())
    assert len({value for row in census.values() for value in row}) == 16
    loaded = [here for rank in found for here in rank[1:]]
    loaded += [*run_ranks(_two, 2, str(data), str(folder)), _load(ALONE, data, folder)]
    for theirs, their_progress, their_bias, (their_losses, their_weights) in loaded:
        assert theirs == tensors and their_progress == progress and their_bias == bias
        np.testing.assert_allclose(their_losses, losses, rtol=1e-5)
        for name, weight in weights.items():
            np.testing.assert_allclose(their_weights[name], weight, atol=1e-5, err_msg=name)
