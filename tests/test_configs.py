"""Every configuration file loads, fits where it says it fits, and counts the parameters that its name says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_args

import pytest

from moe.balance import BALANCERS
from moe.config import ASSIGNMENTS, Config, ConfigError, load, resolve, to_toml, validate
from moe.config.schema import TrainSection
from moe.observe.cost import parameter_counts
from tests.tiny import tiny_tree

FOLDER = Path(__file__).parents[1] / "configs"
SIZES = sorted(path.stem for path in FOLDER.glob("*.toml"))
METHODS = sorted(path.stem for path in (FOLDER / "methods").glob("*.toml"))
ENGINES = sorted(path.stem for path in (FOLDER / "engines").glob("*.toml"))
ALONE = {"sinkhorn", "base", "expert-choice", "bip-leaky"}  # methods that want one process
WORLDS = {
    "tiny": [2, 4],
    "small": [1, 2],
    "deepseekmoe-1b": [8, 72],
    "deepseekmoe-3b": [8, 108],
    "deepseekmoe-16b": [8, 64],
    "deepseek-v2-lite": [8, 64],
    "deepseek-v3": [64, 1024],
}


def config(name: str, world_size: int) -> Config:
    return resolve(load([str(FOLDER / f"{name}.toml")]), world_size)


@pytest.mark.parametrize("name", SIZES)
def test_loads_and_resolves(name: str):
    for world_size in WORLDS[name]:
        resolved = config(name, world_size)
        assert resolved.run.name == name
        assert resolved.num_moe_layers > 0


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.toml")), ids=lambda path: path.stem)
def test_is_short(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert all(len(line) <= 120 for line in lines)
    assert lines[0].startswith("# "), "the first line says what it is for"


@pytest.mark.parametrize("method", METHODS)
def test_methods_lay_over_every_size(method: str):
    for name in SIZES:
        files = [str(FOLDER / f"{name}.toml"), str(FOLDER / "methods" / f"{method}.toml")]
        loaded = load(files)
        if alone := method in ALONE:
            loaded = loaded.model_copy(update={"train": loaded.train.model_copy(update={"micro_batch_size": None})})
        if loaded.model.num_groups > 1 and loaded.balance.method in ASSIGNMENTS:
            with pytest.raises(ConfigError, match=r"model\.num_groups = 8 does not fit balance\.method"):
                resolve(loaded, 1 if alone else WORLDS[name][0])
            continue
        resolved = resolve(loaded, 1 if alone else WORLDS[name][0])
        balance = tomllib.loads(Path(files[1]).read_text())["balance"]
        assert {key: getattr(resolved.balance, key) for key in balance} == balance


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_lay_over_every_size(engine: str):
    for name in SIZES:
        files = [str(FOLDER / f"{name}.toml"), str(FOLDER / "engines" / f"{engine}.toml")]
        loaded = load(files)
        if engine == "megatron" and loaded.model.attention == "mla":  # refused by name
            continue
        resolved = resolve(loaded, WORLDS[name][0] * loaded.parallel.tp * loaded.parallel.pp, cuda=True)
        text = tomllib.loads(Path(files[1]).read_text())
        for section, settings in text.items():
            assert {key: getattr(getattr(resolved, section), key) for key in settings} == settings


def test_every_engine_has_a_configuration():
    found = [tomllib.loads((FOLDER / "engines" / f"{name}.toml").read_text()) for name in ENGINES]
    assert {text["train"]["engine"] for text in found} == set(get_args(TrainSection.model_fields["engine"].annotation))


def test_every_method_has_a_configuration():
    named = {tomllib.loads((FOLDER / "methods" / f"{m}.toml").read_text())["balance"]["method"] for m in METHODS}
    assert named == set(BALANCERS)


def test_resolved_text_is_a_fixed_point():
    resolved = config("tiny", 2)
    assert resolve(validate(tomllib.loads(to_toml(resolved))), 2) == resolved


def test_tiny_needs_an_even_number_of_ranks():
    with pytest.raises(ConfigError, match=r"parallel\.ep = 2 does not divide the 3 ranks"):
        config("tiny", 3)


def test_p05_balancing_without_a_moe_layer_is_refused():
    good = config("tiny", 2)
    model = good.model.model_copy(update={"first_k_dense": good.model.num_layers})
    with pytest.raises(ConfigError, match=r"model\.first_k_dense = 4 leaves no MoE layer .* balance\.method = '\w+'"):
        resolve(good.model_copy(update={"model": model}), 2)
    none = good.balance.model_copy(update={"method": "none", "rate": None})
    assert resolve(good.model_copy(update={"model": model, "balance": none}), 2).num_moe_layers == 0


@pytest.mark.parametrize(
    ("groups", "group_top_k", "top_k", "says"),
    [
        (3, 1, 2, r"model\.num_groups = 3 does not divide model\.num_experts = 16"),
        (16, 4, 2, r"model\.num_groups = 16 does not divide model\.num_experts = 16 into groups of two"),
        (4, 5, 2, r"model\.group_top_k = 5 is more than model\.num_groups = 4"),
        (4, 1, 4, r"model\.top_k = 4 leaves nothing to choose from the 4 experts of model\.group_top_k = 1"),
    ],
)
def test_p32_groups_that_do_not_divide_or_suffice_are_one_error(groups, group_top_k, top_k, says):
    good = config("tiny", 2)
    model = good.model.model_copy(update={"num_groups": groups, "group_top_k": group_top_k, "top_k": top_k})
    with pytest.raises(ConfigError, match=says):
        resolve(good.model_copy(update={"model": model}), 2)


@pytest.mark.parametrize(
    ("experts", "top_k", "ep", "says"),
    [
        (9, 2, 2, r"parallel\.ep = 2 does not divide model\.num_experts = 9"),
        (16, 16, 2, r"model\.top_k = 16 leaves nothing to choose from model\.num_experts = 16"),
        (16, 17, 2, r"model\.top_k = 17 leaves nothing to choose from model\.num_experts = 16"),
    ],
)
def test_p32_experts_that_do_not_divide_or_suffice_are_one_error(experts, top_k, ep, says):
    good = config("tiny", 2)
    model = good.model.model_copy(update={"num_experts": experts, "top_k": top_k})
    with pytest.raises(ConfigError, match=says):
        resolve(good.model_copy(update={"model": model, "parallel": good.parallel.model_copy(update={"ep": ep})}), 2)


MLA = {"attention": "mla", "num_kv_heads": None, "head_dim": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32}
MLA |= {"qk_rope_head_dim": 16, "v_head_dim": 32}


def latent(**settings) -> Config:
    good = config("tiny", 2)
    return good.model_copy(update={"model": good.model.model_copy(update=MLA | settings)})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"v_head_dim": None}, r"model\.v_head_dim is missing, and model\.attention = 'mla' needs it"),
        ({"kv_lora_rank": None}, r"model\.kv_lora_rank is missing"),
        ({"qk_rope_head_dim": 15}, r"model\.qk_rope_head_dim = 15 is odd"),
        ({"head_dim": 32}, r"model\.head_dim = 32 is for grouped-query attention"),
        ({"attention": "gqa"}, r"model\.kv_lora_rank = 32 is for latent attention"),
    ],
)
def test_settings_of_latent_attention_that_do_not_fit_are_one_error(settings, says):
    with pytest.raises(ConfigError, match=says):
        resolve(latent(**settings), 2)


def test_resolved_latent_attention_is_a_fixed_point():
    resolved = resolve(latent(), 2)
    assert resolved.model.num_kv_heads is None and resolved.model.head_dim is None
    assert resolve(validate(tomllib.loads(to_toml(resolved))), 2) == resolved


# By hand: embedding and head 2 V D; attention of equal heads 4 D² a layer; an expert 3 D F; router E D; norms
# (2 layers + 1) D.
BY_HAND = {
    # 2·8192·128 = 2,097,152; attention 4·(2·128² + 2·128·64) = 196,608; one expert 49,152: 4·17·49,152 = 3,342,336;
    # router 4·16·128 = 8,192; norms 9·128 = 1,152. Not visited by a token: 4·14·49,152 = 2,752,512.
    "tiny": (5_645_440, 2_892_928),
    # 2·8192·512 = 8,388,608; attention 8·(2·512² + 2·512·256) = 6,291,456; dense 3·512·1280 = 1,966,080;
    # one expert 393,216: 7·33·393,216 = 90,832,896; router 7·32·512 = 114,688; norms 17·512 = 8,704.
    # Not visited: 7·28·393,216 = 77,070,336.
    "small": (107_602_432, 30_532_096),
    # 2·32064·1024 = 65,667,072; attention 10·4·1024² = 41,943,040; dense 3·1024·2816 = 8,650,752;
    # one expert 1,622,016: 9·66·1,622,016 = 963,477,504; router 9·64·1024 = 589,824; norms 21·1024 = 21,504.
    # Not visited: 9·58·1,622,016 = 846,692,352.
    "deepseekmoe-1b": (1_080_349_696, 233_657_344),
    # 2·32064·1280 = 82,083,840; attention 12·4·1280² = 78,643,200; dense 3·1280·3520 = 13,516,800;
    # one expert 3,379,200: 11·66·3,379,200 = 2,453,299,200; router 11·64·1280 = 901,120; norms 25·1280 = 32,000.
    # Not visited: 11·58·3,379,200 = 2,155,929,600.
    "deepseekmoe-3b": (2_628_476_160, 472_546_560),
    # The public deepseek-moe-16b-base has 16,375,728,128 parameters. Not visited: 27·58·8,650,752 = 13,547,077,632.
    "deepseekmoe-16b": (16_375_728_128, 2_828_650_496),
    # 2·102400·2048 = 419,430,400; attention 27·(2048·16·192 + 2048·576 + 512·16·256 + 16·128·2048) = 371,589,120;
    # dense 3·2048·10944 = 67,239,936; one expert 8,650,752: 26·66·8,650,752 = 14,844,690,432; router 26·64·2048 =
    # 3,407,872; norms 55·2048 + 27·512 = 126,464. Not visited: 26·58·8,650,752 = 13,045,334,016.
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    # 2·129280·7168 = 1,853,358,080; attention 61·(7168·1536 + 1536·128·192 + 7168·576 + 512·128·256 + 128·128·7168) =
    # 11,413,422,080; dense 3·3·7168·18432 = 1,189,085,184; one expert 44,040,192: 58·257·44,040,192 = 656,463,101,952;
    # router 58·256·7168 = 106,430,464; norms 123·7168 + 61·(1536 + 512) = 1,006,592.
    # Not visited: 58·248·44,040,192 = 633,474,121,728.
    "deepseek-v3": (671_026_404_352, 37_552_282_624),
}
# In billions; the active ones of DeepSeekMoE count the rows of the embedding, those of V2-Lite and V3 do not.
PUBLISHED = {
    "deepseekmoe-16b": (16.4, 2.8, True),
    "deepseek-v2-lite": (15.7, 2.4, False),
    "deepseek-v3": (671, 37, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str):
    counts = parameter_counts(config(name, WORLDS[name][0]))
    total, active, embedding = PUBLISHED[name]
    assert counts.total / 1e9 == pytest.approx(total, rel=2e-3)
    assert (counts.active - (0 if embedding else counts.embedding)) / 1e9 == pytest.approx(active, rel=0.025)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_the_model_of_a_published_shape_has_these_parameters(name: str):
    import torch

    from moe.model.transformer import Transformer
    from tests.tiny import ALONE

    with torch.device("meta"):
        model = Transformer(config(name, WORLDS[name][0]), ALONE)
    assert sum(p.numel() for p in model.parameters()) == BY_HAND[name][0]


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str):
    counts = parameter_counts(config(name, WORLDS[name][0]))
    assert (counts.total, counts.active) == BY_HAND[name]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"engine": "deepspeed"}, r"train\.compile = true .* train\.engine = 'deepspeed'"),
        ({"activation_checkpointing": "selective"}, r"train\.compile = true hides .* set that to none or full"),
        ({}, r"needs a C\+\+ compiler on a CPU, and no-such-compiler is not there"),
    ],
)
def test_compile_is_refused_where_it_cannot_be(train, says, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    tree = tiny_tree()
    tree["train"] |= {"compile": True} | train
    with pytest.raises(ConfigError, match=says):
        resolve(validate(tree))
    tree["train"] = {"steps": 1, "batch_size": 8, "compile": True}
    assert resolve(validate(tree), cuda=True).train.compile
