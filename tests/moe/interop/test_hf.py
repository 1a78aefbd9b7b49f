"""Hugging Face checkpoints against the real classes of transformers. Each test named pNN excludes pitfall NN."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.config import ConfigError
from moe.interop import hf
from moe.interop.hf import INDEX, Checkpoint, HfError, write_checkpoint
from moe.interop.hf_config import architecture_of
from moe.model.transformer import Transformer
from tests.tiny import ALONE, random_tokens, tiny_config, tiny_mla

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'alf-moe[hf]'")

# Nothing at a default that both sides could share by accident.
BASE = {"model__init_std": 0.2, "model__rope_theta": 100.0, "model__norm_eps": 1e-3, "model__expert_hidden_dim": 24}
GROUPS = {"model__num_groups": 4, "model__group_top_k": 2}
SOFTMAX = {"model__score_function": "softmax"}
CASES = {
    "deepseek_v3": (tiny_mla(model__q_lora_rank=24, model__routed_scaling_factor=2.5), "DeepseekV3"),
    "deepseek_v3, groups": (tiny_mla(**GROUPS, model__num_shared_experts=2, model__renormalize=False), "DeepseekV3"),
    "deepseek_v3, no shared experts": (tiny_mla(model__num_shared_experts=0, model__first_k_dense=0), "DeepseekV3"),
    "glm4_moe, groups": (GROUPS | {"model__head_dim": 12, "model__routed_scaling_factor": 0.5}, "Glm4Moe"),
    "glm4_moe, tied": ({"model__tie_embeddings": True, "model__num_shared_experts": 0}, "Glm4Moe"),
    "ernie4_5_moe": (SOFTMAX | {"model__head_dim": 12}, "Ernie4_5_Moe"),
    "ernie4_5_moe, no shared experts": (SOFTMAX | {"model__num_shared_experts": 0}, "Ernie4_5_Moe"),
    "deepseek_v2": (tiny_mla(**SOFTMAX, model__renormalize=False, model__routed_scaling_factor=1.5), "DeepseekV2"),
}
every = pytest.mark.parametrize("case", CASES)


def ours(case: str) -> Transformer:
    settings, kind = CASES[case]
    model = Transformer(tiny_config(**BASE, **settings), ALONE)
    model.init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide an exchanged norm
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    for layer, router in model.routers.items():
        if kind != "DeepseekV2":
            router.expert_bias_E.normal_(0, 0.2, generator=torch.Generator().manual_seed(layer))
    return model.eval()


def export(model: Transformer, folder: Path, dtype: str = "float32") -> str:
    folder.mkdir()
    state = model.state_dict()
    biased = any(bool(router.expert_bias_E.any()) for router in model.routers.values())
    return write_checkpoint(folder, model.config.model, lambda n: {k: state[k] for k in n}, 1, 16, dtype, biased)


def theirs(folder: Path, dtype: torch.dtype = torch.float32):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits_of(model: Transformer, x_BS: torch.Tensor) -> torch.Tensor:
    head = model.embedding if model.head is None else model.head
    return model.norm(model.hidden(x_BS, None)[0]) @ head.weight.T


def chosen(routers, model, x_BS: torch.Tensor, field: int) -> list[torch.Tensor]:
    """The experts of each token [T, K] by layer, in ascending order."""
    found = []
    hooks = [r.register_forward_hook(lambda _m, _a, out: found.append(out[field].sort(-1).values)) for r in routers]
    with torch.no_grad():
        model(x_BS)
    for hook in hooks:
        hook.remove()
    return found


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm()) and bool((a - b).abs().max() <= tolerance * b.abs().max())


@every
def test_logits_experts_and_greedy_generation_are_those_of_transformers(case, tmp_path):
    model = ours(case)
    export(model, tmp_path / "out")
    other = theirs(tmp_path / "out")
    assert type(other).__name__ == f"{CASES[case][1]}ForCausalLM"
    x, _ = random_tokens(batch=32)
    logits = logits_of(model, x)
    with torch.no_grad():
        assert close(other(x).logits, logits)
    gates = [layer.mlp.gate for layer in other.model.layers[model.config.model.first_k_dense :]]
    mine = chosen(model.routers.values(), lambda x: model.hidden(x, None), x, 1)
    assert len(mine) == len(model.routers)
    assert all(torch.equal(a, b) for a, b in zip(mine, chosen(gates, other, x, 2), strict=True))
    other.generation_config.eos_token_id = None
    with torch.no_grad():
        generated = other.generate(x[:2, :8], max_new_tokens=64, do_sample=False)
    tokens = x[:2, :8]
    for _ in range(64):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, tokens) and len(tokens[:, 8:].unique()) > 8


@every
def test_p27_round_trip_is_bitwise(case, tmp_path):
    model = ours(case)
    export(model, tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    again = Transformer(tiny_config(**BASE, **CASES[case][0]), ALONE)
    again.init_weights(7)
    for router in again.routers.values():
        router.expert_bias_E.fill_(0.0 if CASES[case][1] == "DeepseekV2" else 9.0)
    state = again.state_dict()
    checkpoint.fill(state)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert checkpoint.model == model.config.model
    assert checkpoint.counts().total == sum(p.numel() for p in model.parameters())


@every
def test_a_checkpoint_that_transformers_wrote_is_the_same_model_and_goes_back_bit_by_bit(case, tmp_path):
    export(ours(case), tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    torch.manual_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "e_score_correction_bias" in name:
                tensor.normal_(0, 0.2)
    other.save_pretrained(tmp_path / "saved")
    checkpoint = Checkpoint(tmp_path / "saved")
    model = Transformer(tiny_config(**BASE, **CASES[case][0]), ALONE)
    state = model.state_dict()
    checkpoint.fill(state)
    x, _ = random_tokens(batch=8)
    with torch.no_grad():
        assert close(logits_of(model.eval(), x), other(x).logits)
    export(model, tmp_path / "back")
    files = [load_file(next((tmp_path / folder).glob("*.safetensors"))) for folder in ("saved", "back")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_deepseek_v3_with_rotary_halves_is_read_as_such(tmp_path):
    export(ours("deepseek_v3"), tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out", rope_interleave=False)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    other.save_pretrained(tmp_path / "saved")
    model = Transformer(tiny_config(**BASE, **CASES["deepseek_v3"][0]), ALONE).eval()
    Checkpoint(tmp_path / "saved").fill(model.state_dict())
    x, _ = random_tokens(batch=8)
    with torch.no_grad():
        assert close(logits_of(model, x), other(x).logits)


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe, groups", "ernie4_5_moe"])
def test_p06_the_bias_is_float32_in_a_bfloat16_export_and_the_weights_are_rounded_once(case, tmp_path):
    model = ours(case)
    for router in model.routers.values():
        router.expert_bias_E.fill_(0.3000001)
    export(model, tmp_path / "out", "bfloat16")
    saved = load_file(next((tmp_path / "out").glob("*.safetensors")))
    kinds = {name: tensor.dtype for name, tensor in saved.items()}
    assert {kinds.pop(name) for name in list(kinds) if "bias" in name} == {torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    other = theirs(tmp_path / "out", torch.bfloat16)
    biases = [t for n, t in [*other.named_parameters(), *other.named_buffers()] if "e_score_correction_bias" in n]
    assert len(biases) == 2 and all(torch.equal(t.flatten(), torch.full((8,), 0.3000001)) for t in biases)
    state = Transformer(model.config, ALONE).state_dict()
    Checkpoint(tmp_path / "out").fill(state)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value if "bias" in name else value.bfloat16().float()), name


def test_shards_and_their_index(tmp_path, monkeypatch):
    model = ours("glm4_moe, groups")
    export(model, tmp_path / "one")
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    export(model, tmp_path / "many")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5 and {file.name for file in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 25_000 for file in files)
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(next((tmp_path / "one").glob("*.safetensors")))
    assert together.keys() == whole.keys() and all(torch.equal(together[n], whole[n]) for n in whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    x, _ = random_tokens(batch=2)
    with torch.no_grad():
        assert close(theirs(tmp_path / "many")(x).logits, logits_of(model, x))
    Checkpoint(tmp_path / "many").fill(ours("glm4_moe, groups").state_dict())


def test_the_files_are_read_without_transformers():
    code = "import sys, moe.interop.hf; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- upcycling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_upcycled_llama_begins_as_the_same_function_and_its_router_learns(tied, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=12, initializer_range=0.2, tie_word_embeddings=tied, rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "llama")
    checkpoint = Checkpoint(tmp_path / "llama", {"num_experts": 8, "top_k": 2})
    assert not checkpoint.sparse
    m = checkpoint.model
    assert (m.num_experts, m.top_k, m.expert_hidden_dim, m.first_k_dense, m.renormalize) == (8, 2, 48, 0, True)
    config = tiny_config()
    model = Transformer(config.model_copy(update={"model": m}), ALONE)
    model.init_weights(0)
    checkpoint.fill(model.state_dict())
    x, y = random_tokens(batch=4)
    with torch.no_grad():
        assert close(logits_of(model.eval(), x), dense(x).logits)
    w13 = model.blocks[1].moe.experts.w13
    assert torch.equal(w13[0], w13[7]) and w13[0].abs().sum() > 0
    model.train()(x, y).ce.backward()
    assert all(torch.isfinite(r.weight.grad).all() for r in model.routers.values())
    with pytest.raises(HfError, match=r"dense model \(llama\): name the experts"):
        Checkpoint(tmp_path / "llama")


# -- refusals ----------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = value
        if value is None:
            del config[key]
    (folder / "config.json").write_text(json.dumps(config))


def only(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def retensor(folder: Path, change) -> None:
    tensors = load_file(only(folder))
    change(tensors)
    save_file(tensors, only(folder))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(tensors, only(folder).name)
    (folder / INDEX).write_text(json.dumps(index))


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NORM = "model.layers.0.input_layernorm.weight"
YARN = {"rope_type": "yarn", "factor": 40.0, "rope_theta": 1e4}
REFUSED = {
    "another architecture": (lambda f: edit(f, model_type="mixtral"), "model_type = 'mixtral'", "deepseek_v3"),
    "no architecture": (lambda f: edit(f, model_type=None), "model_type = None"),
    "rope scaling": (lambda f: edit(f, rope_parameters=YARN), "rope scaling 'yarn'", "plain RoPE"),
    "old rope scaling": (lambda f: edit(f, rope_parameters=None, rope_scaling={"type": "linear"}), "rope scaling 'linear'"),
    "biases": (lambda f: edit(f, attention_bias=True), "attention_bias = True"),
    "activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act = 'gelu'", "'silu'"),
    "selection": (lambda f: edit(f, topk_method="greedy"), "topk_method = 'greedy'", "noaux_tc"),
    "no size": (lambda f: edit(f, kv_lora_rank=None), "no kv_lora_rank"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "is not a folder"),
    "no layers": (lambda f: edit(f, num_hidden_layers=None), "no num_hidden_layers"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "list for a config": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "missing shard": (lambda f: only(f).unlink(), "lacks model-00001-of-00001.safetensors", "pickled weights"),
    "no weights": (lambda f: [only(f).unlink(), (f / INDEX).unlink()], "lacks model.safetensors"),
    "cut shard": (lambda f: only(f).write_bytes(only(f).read_bytes()[:-8]), "is damaged"),
    "not safetensors": (lambda f: only(f).write_bytes(b"PK\x03\x04pickle"), "is damaged"),
    "path in the index": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {NORM: "../x.safetensors"}})),
        "does not map tensors to files beside it",
    ),
    "broken index": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "does not map"),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop(NORM)), f"no tensor {NORM}"),
    "surplus tensor": (
        lambda f: retensor(f, lambda t: t.update(extra=torch.ones(2))), "a tensor extra", "no place for"
    ),
    "bf16 bias": (
        lambda f: retensor(f, lambda t: t.update({BIAS: t[BIAS].bfloat16()})), f"{BIAS} is BF16", "must be F32"
    ),
    "another shape": (
        lambda f: retensor(f, lambda t: t.update({NORM: t[NORM][:-1].clone()})), f"{NORM} of", "is [31]", "makes it [32]"
    ),
    "another width": (lambda f: edit(f, hidden_size=40), "embed_tokens.weight of", "is [128, 32]", "makes it [128, 40]"),
    "quantised": (
        lambda f: retensor(f, lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})), "F8_E4M3", "convert"
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_checkpoints_are_one_sentence(what, tmp_path):
    export(ours("deepseek_v3"), tmp_path / "out")
    Checkpoint(tmp_path / "out")
    spoil, *says = REFUSED[what]
    spoil(tmp_path / "out")
    with pytest.raises(HfError) as refusal:
        Checkpoint(tmp_path / "out")
    sentence = str(refusal.value)
    assert all(part in sentence for part in says), sentence
    assert "\n" not in sentence and ": " in sentence


@pytest.mark.parametrize("case", ["deepseek_v3", "ernie4_5_moe"])
def test_whatever_config_json_says_the_answer_is_a_model_or_one_sentence(case, tmp_path):
    export(ours(case), tmp_path / "out")
    whole = (tmp_path / "out/config.json").read_text()
    answers = set()
    for key in json.loads(whole):
        for value in (None, "x", -1, 0, 1.5, True, [], {}, {"rope_type": []}):
            (tmp_path / "out/config.json").write_text(json.dumps(json.loads(whole) | {key: value}))
            try:
                Checkpoint(tmp_path / "out")
                answers.add("model")
            except (HfError, ConfigError) as error:
                assert "\n" not in str(error), (key, value)
                answers.add("sentence")
    assert answers == {"model", "sentence"}


def test_sizes_that_the_model_cannot_have_are_the_configurations_own_sentence(tmp_path):
    export(ours("deepseek_v3"), tmp_path / "out")
    edit(tmp_path / "out", num_experts_per_tok=8)
    with pytest.raises(ConfigError, match=r"model\.top_k = 8 leaves nothing to choose"):
        Checkpoint(tmp_path / "out")


def test_layers_of_multi_token_prediction_are_left_out(tmp_path):
    export(ours("deepseek_v3"), tmp_path / "out")
    extra = {"model.layers.3.eh_proj.weight": torch.ones(2, 2)}
    retensor(tmp_path / "out", lambda t: t.update(extra))
    with pytest.raises(HfError, match=r"a tensor model\.layers\.3\.eh_proj"):
        Checkpoint(tmp_path / "out")
    edit(tmp_path / "out", num_nextn_predict_layers=1)
    assert Checkpoint(tmp_path / "out").model == ours("deepseek_v3").config.model


def test_glm_without_a_word_on_partial_rotation_means_half_of_it(tmp_path):
    export(ours("glm4_moe, groups"), tmp_path / "out")
    edit(tmp_path / "out", partial_rotary_factor=None, rope_parameters=None)
    with pytest.raises(HfError, match=r"partial_rotary_factor = 0\.5"):
        Checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "biased"),
    [
        (SOFTMAX | {"model__renormalize": False}, False),
        (tiny_mla(**SOFTMAX), False),
        (tiny_mla(**SOFTMAX, model__renormalize=False), True),
        (SOFTMAX | GROUPS, True),
        (SOFTMAX | {"model__routed_scaling_factor": 2.0}, True),
    ],
)
def test_a_model_that_no_stock_architecture_computes_is_refused(settings, biased):
    with pytest.raises(HfError, match=r"no architecture of transformers computes model\.attention"):
        architecture_of(tiny_config(**settings).model, biased)
