"""config.json of a Hugging Face checkpoint and our [model] section, both ways, for the architectures of transformers that
compute exactly what our model computes. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

from moe.config import Config, ModelSection, resolve, validate


class HfError(ValueError):
    """A checkpoint, or a model, that does not fit; its text is one sentence for the user."""


class Architecture(NamedTuple):
    """One architecture. names: their setting by ours. ours: settings of ours that it stands for. theirs: settings of theirs
    that must have this value where they are given. bias: its expert bias below a layer's mlp, if it has one. interleaved:
    its rotary pairs are neighbours, ours are half a head apart."""

    kind: str
    names: dict[str, str]
    ours: dict[str, Any]
    theirs: dict[str, Any]
    bias: str | None
    interleaved: bool

    @property
    def takes_experts(self) -> bool:
        """False: a dense model, which can only be upcycled."""
        return "num_experts" in self.names


COMMON = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "dense_hidden_dim": "intermediate_size",
}
EXPERTS = {
    "expert_hidden_dim": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "first_k_dense": "first_k_dense_replace",
    "routed_scaling_factor": "routed_scaling_factor",
}
GROUPS = {"renormalize": "norm_topk_prob", "num_groups": "n_group", "group_top_k": "topk_group"}
GQA = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
MLA = {k: k for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
UNGROUPED = {"num_groups": 1, "group_top_k": 1}
PLAIN = {"hidden_act": "silu", "attention_bias": False}
BIAS = "gate.e_score_correction_bias"

ARCHITECTURES: dict[str, Architecture] = {
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        COMMON | EXPERTS | GROUPS | MLA,
        {"attention": "mla", "score_function": "sigmoid"},
        PLAIN | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        BIAS,
        True,
    ),
    "glm4_moe": Architecture(
        "Glm4MoeForCausalLM",
        COMMON | EXPERTS | GROUPS | GQA,
        {"attention": "gqa", "score_function": "sigmoid"},
        PLAIN | {"use_qk_norm": False, "partial_rotary_factor": 1.0},
        BIAS,
        False,
    ),
    "ernie4_5_moe": Architecture(
        "Ernie4_5_MoeForCausalLM",
        COMMON
        | GQA
        | {
            "expert_hidden_dim": "moe_intermediate_size",
            "num_experts": "moe_num_experts",
            "num_shared_experts": "moe_num_shared_experts",
            "top_k": "moe_k",
            "first_k_dense": "moe_layer_start_index",
        },
        {
            "attention": "gqa",
            "score_function": "softmax",
            "renormalize": True,
            "routed_scaling_factor": 1.0,
            **UNGROUPED,
        },
        {"hidden_act": "silu", "use_bias": False, "moe_layer_interval": 1},
        "moe_statics.e_score_correction_bias",
        True,
    ),
    "deepseek_v2": Architecture(
        "DeepseekV2ForCausalLM",
        COMMON | EXPERTS | MLA,
        {"attention": "mla", "score_function": "softmax", "renormalize": False, **UNGROUPED},
        PLAIN | {"mlp_bias": False, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
        None,
        True,
    ),
    "llama": Architecture(
        "LlamaForCausalLM", COMMON | GQA, {"attention": "gqa"}, PLAIN | {"mlp_bias": False}, None, False
    ),
}
OPTIONAL = {"q_lora_rank", "num_kv_heads", "head_dim", "init_std", "tie_embeddings", "num_groups", "group_top_k"}
# What a config.json that lacks the setting means, where that is not our own default.
ABSENT = {
    "glm4_moe": {"partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "ernie4_5_moe": {"tie_word_embeddings": True},
}
DEFAULT_THETA = {"ernie4_5_moe": 500_000.0}


def architecture_of(m: ModelSection, biased: bool) -> str:
    """The model_type that computes what this model computes; biased: it has an expert bias other than 0. Raises HfError."""
    for model_type, a in ARCHITECTURES.items():
        fits = all(getattr(m, name) == value for name, value in a.ours.items())
        if a.takes_experts and fits and (a.bias is not None or not biased):
            return model_type
    raise HfError(
        f"no architecture of transformers computes model.attention = {m.attention!r} with model.score_function = "
        f"{m.score_function!r}, model.renormalize = {str(m.renormalize).lower()}, model.num_groups = {m.num_groups} and "
        f"{'an' if biased else 'no'} expert bias: sigmoid scores always have one (DeepSeek-V3, GLM-4-MoE), softmax scores with "
        "gqa, renormalize and one group (ERNIE 4.5), or with mla, no renormalize, one group and no bias (DeepSeek-V2)"
    )


def to_hf(m: ModelSection, model_type: str, seq_len: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a resolved model. seq_len: longest sequence trained on. dtype: of the weights, as torch names it."""
    a = ARCHITECTURES[model_type]
    config: dict[str, Any] = {"architectures": [a.kind], "model_type": model_type, **a.theirs}
    config |= {theirs: getattr(m, ours) for ours, theirs in a.names.items()}
    if m.attention == "mla":
        config |= {"num_key_value_heads": m.num_heads, "rope_interleave": True}
    if model_type in ("deepseek_v3", "glm4_moe"):
        config["num_nextn_predict_layers"] = 0  # their default is one layer of multi-token prediction
    if model_type == "ernie4_5_moe":
        config["moe_layer_end_index"] = m.num_layers - 1
    rope = {"rope_type": "default", "rope_theta": m.rope_theta}
    if model_type == "glm4_moe":
        rope["partial_rotary_factor"] = 1.0
    return config | {
        "rope_parameters": rope,
        "rope_theta": m.rope_theta,  # where readers older than transformers 5 look for it
        "max_position_embeddings": seq_len,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "dtype": dtype,
    }


def from_hf(config: dict[str, Any], experts: dict[str, int] | None = None) -> Config:
    """A configuration whose [model] section, resolved, computes what a checkpoint with this config.json does; its other
    sections say nothing.

    experts: for a dense model alone, num_experts and top_k of the sparse one that it becomes: every expert a copy of the
    dense MLP, the combine weights summing to 1, so that it begins as the same function (arXiv:2212.05055). Raises HfError,
    and ConfigError for sizes that the model cannot have.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise HfError(
            f"model_type = {model_type!r} of config.json is not an architecture that this model can compute: "
            f"choose a checkpoint of {', '.join(ARCHITECTURES)}"
        )
    a, config = ARCHITECTURES[model_type], ABSENT.get(model_type, {}) | config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise HfError(f"the rope settings of config.json are {rope!r}, not an object: restore the file")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise HfError(
            f"rope scaling {scaling!r} of config.json is not known here, which turns by plain RoPE: choose the checkpoint "
            "before its context was extended"
        )
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    for name, value in a.theirs.items():
        if config.get(name, value) != value:
            raise HfError(
                f"{name} = {config[name]!r} of config.json is not what this model computes, which is {name} = {value!r}: "
                "choose another checkpoint"
            )
    if not a.takes_experts and experts is None:
        raise HfError(
            f"config.json is of a dense model ({model_type}): name the experts that it is to become, --experts 8 --top-k 2"
        )
    found = dict(a.ours)
    for ours, theirs in a.names.items():
        value = config.get(theirs)
        if value is None and ours not in OPTIONAL:
            raise HfError(f"config.json has no {theirs}, which model_type = {model_type!r} must say: restore the file")
        if value is not None:
            found[ours] = value
    if not a.takes_experts:
        assert experts is not None, "refused above"
        found |= {**experts, "expert_hidden_dim": found["dense_hidden_dim"], "first_k_dense": 0, "renormalize": True}
    theta = rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA.get(model_type, 10_000.0)
    found["rope_theta"] = theta
    for name in ("norm_eps", "init_std", "routed_scaling_factor", "rope_theta"):
        if type(found.get(name)) is int:  # JSON has whole floats without a point
            found[name] = float(found[name])
    needed = {"data": {"seq_len": 1}, "optim": {"lr": 1.0}, "train": {"steps": 1, "batch_size": 1}}
    ours = resolve(validate({"model": found, **needed}))  # ConfigError, with the path model.x
    last = config.get("moe_layer_end_index", -1)
    if last not in (-1, ours.model.num_layers - 1):
        raise HfError(
            f"moe_layer_end_index = {last} of config.json ends the sparse layers before the last layer, which this model "
            "cannot: choose another checkpoint"
        )
    return ours


def is_interleaved(config: dict[str, Any]) -> bool:
    """Whether the rotary pairs of a checkpoint are neighbours."""
    return ARCHITECTURES[config["model_type"]].interleaved and config.get("rope_interleave", True) is not False
