"""A run that starts from a Hugging Face checkpoint: on every layout and engine, bit by bit. pNN excludes pitfall NN."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.interop.hf import write_checkpoint
from moe.model.transformer import Transformer
from moe.parallel import build_ranks
from moe.train.checkpoint import CheckpointError
from moe.train.loop import Run, train
from tests.corpus import make_token_folder
from tests.moe.train.engines.layouts import whole
from tests.moe.train.test_run import config, tensors
from tests.ranks import run_ranks
from tests.tiny import ALONE, CPU, tiny_config, tiny_mla

MLA = tiny_mla(model__q_lora_rank=24)
LAYOUTS = [(2, {}), (1, {"parallel__data": "shard"})]
if find_spec("deepspeed") is not None:
    LAYOUTS.append((2, {"train__engine": "deepspeed", "deepspeed__zero_stage": 3}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(token folder, Hugging Face folder, the tensors in it)."""
    base = tmp_path_factory.mktemp("start")
    data = make_token_folder(base / "data")
    model = Transformer(tiny_config(**MLA, run__seed=7), ALONE)
    model.init_weights(7)
    for layer, router in model.routers.items():
        router.expert_bias_E.normal_(0, 0.2, generator=torch.Generator().manual_seed(layer))
    state = model.state_dict()
    (base / "hf").mkdir()
    write_checkpoint(base / "hf", model.config.model, lambda names: {n: state[n] for n in names}, 0, 16)
    return data, base / "hf", {name: value.numpy() for name, value in state.items()}


def begin(c, ranks, folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(c, ranks, folder, False)


def first_state(rank: int, n: int, data: str, hf: str, out: str) -> list[dict[str, np.ndarray]]:
    """Of each layout: the state at step 0, and after a step its loss."""
    found = []
    for index, (ep, settings) in enumerate(LAYOUTS):
        more = {"parallel__ep": ep, "run__start_from": hf, "train__micro_batch_size": 2, **MLA, **settings}
        run = begin(config(data, n, **more), build_ranks(rank, n, CPU, ep), Path(out) / str(index))
        state = {name: whole(value) for name, value in run.state()["engine"]["model"].items()}
        moments = [float(np.abs(whole(value)).max()) for value in run.state()["engine"]["optimizer"].values()]
        bias = run.balancer.bias_LE.numpy()
        done, _ = run.train_step(False)
        found.append((state, max(moments), bias, run.init_hash, done.grad_norm))
    return found


def test_p07_p27_every_layout_begins_with_the_weights_and_the_bias_of_the_checkpoint(folders, tmp_path):
    data, hf, saved = folders
    alone = begin(config(data, 1, run__start_from=str(hf), **MLA), ALONE, tmp_path / "alone")
    done, _ = alone.train_step(False)
    for ranks in run_ranks(first_state, 2, str(data), str(hf), str(tmp_path)):
        for layout, (state, moment, bias, init_hash, norm) in zip(LAYOUTS, ranks, strict=True):
            assert state.keys() == saved.keys()
            assert [name for name in saved if not np.array_equal(state[name], saved[name])] == [], layout
            expected = np.stack([value for name, value in saved.items() if name.endswith("expert_bias_E")])
            assert np.array_equal(bias, expected) and np.abs(bias).max() > 0.1
            assert moment == 0.0, "a fresh optimizer: no moments, step 0"
            assert init_hash == alone.init_hash and norm == pytest.approx(done.grad_norm, rel=1e-5)


def test_the_first_step_is_that_of_a_fresh_optimizer_and_a_resumed_run_does_not_start_again(folders, tmp_path):
    data, hf, saved = folders
    settings = {"run__start_from": str(hf), "optim__weight_decay": 0.0, "optim__grad_clip": 1e9, **MLA}
    c = config(data, 1, **settings)
    run = begin(c, ALONE, tmp_path / "one")
    run.train_step(False)
    moved = np.abs(run.engine.weights()["embedding.weight"].detach().numpy() - saved["embedding.weight"])
    # Step 1 of AdamW moves whatever has a gradient by its learning rate: had it counted another step, by 0.7 of that.
    assert moved.max() == pytest.approx(c.optim.lr, rel=1e-3)
    assert train(c, ALONE, tmp_path / "run", False).code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    last = tensors(Run(c, ALONE, tmp_path / "run", True).state())
    first = next(key for key in last if key.endswith("model/embedding.weight"))
    assert not np.array_equal(last[first], saved["embedding.weight"])


def test_what_does_not_fit_is_one_sentence(folders, tmp_path):
    data, hf, _ = folders

    def start(start_from=hf, **settings):
        begin(config(data, 1, run__start_from=str(start_from), **MLA | settings), ALONE, tmp_path / "run")

    says = r"model\.routed_scaling_factor = 2\.0 differs from its 1\.0: take the \[model\] section"
    with pytest.raises(CheckpointError, match=says):
        start(model__routed_scaling_factor=2.0)
    with pytest.raises(CheckpointError, match=r"run\.start_from = '.*nowhere': .*is not a folder"):
        start(tmp_path / "nowhere")
    start(model__init_std=0.5, model__train_router=False)  # of no weight that is there
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    (other / "tokenizer.json").write_text(TOKENIZER)
    with pytest.raises(CheckpointError, match=r"was prepared with another tokenizer than its own: run alf-moe prepare"):
        start(other)


TOKENIZER = """{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}"""
