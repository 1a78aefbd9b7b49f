"""What settings may not be together, and what follows from them: `resolve`, pure, called once after the last override."""

from __future__ import annotations

import os
import shutil

from moe.config.engines import check_deepspeed, check_megatron, check_shared, require
from moe.config.schema import ASSIGNMENTS, RATES, BalanceSection, Config, ModelSection


def resolve(config: Config, world_size: int = 1, cuda: bool = False) -> Config:
    """Fill in every derived setting and check every limit between settings; pure, called once after the last override.

    Raises ConfigError. The result is what is written to the run folder's config.toml.
    """
    _check_model(config)
    _check_ranks(config, world_size)
    _check_steps(config)
    require(
        config.train.kernels != "triton" or cuda,
        "train.kernels = 'triton' needs a GPU, and this run has none: set it to torch or auto",
    )
    _check_compile(config, cuda)
    _check_balance(config)
    _check_assignment(config, world_size)
    check_deepspeed(config, cuda)
    check_megatron(config, cuda)
    m, t, b, o = config.model, config.train, config.balance, config.observe
    kv_heads, head_dim = m.num_kv_heads or m.num_heads, m.head_dim or m.dim // m.num_heads
    in_theory = m.group_top_k >= m.num_groups and b.method not in ASSIGNMENTS and config.parallel.pp == 1
    return config.model_copy(
        update={
            "model": m.model_copy(
                update={
                    **({} if m.attention == "mla" else {"num_kv_heads": kv_heads, "head_dim": head_dim}),
                    "dense_hidden_dim": m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim,
                }
            ),
            "train": t.model_copy(
                update={
                    "micro_batch_size": t.micro_batch_size or t.batch_size // config.data_ranks(world_size),
                    "compute_dtype": t.compute_dtype or ("bfloat16" if cuda else "float32"),
                }
            ),
            "balance": b.model_copy(
                update={
                    "rate": b.rate or RATES[b.method] if b.method in RATES else None,
                    "freeze_step": b.freeze_step or (t.steps if b.schedule == "linear" else None),
                    "group_loss_groups": b.group_loss_groups or config.parallel.ep,
                }
            ),
            "observe": o.model_copy(update={"regret_every": o.regret_every if in_theory else 0}),
        }
    )


def _check_compile(config: Config, cuda: bool) -> None:
    t = config.train
    if not t.compile:
        return
    require(
        t.engine == "native",
        f"train.compile = true compiles the blocks of the native engine, and train.engine = {t.engine!r}: set one of them back",
    )
    require(
        t.activation_checkpointing != "selective",
        "train.compile = true hides from train.activation_checkpointing = 'selective' which operations are the expensive ones: "
        "set that to none or full, or train.compile to false",
    )
    compiler = os.environ.get("CXX", "g++")
    require(
        cuda or shutil.which(compiler) is not None,
        f"train.compile = true needs a C++ compiler on a CPU, and {compiler} is not there: install it (apt install g++), name "
        "another in the environment variable CXX, or set train.compile to false",
    )


def _check_model(config: Config) -> None:
    m = config.model
    require(
        m.top_k < m.num_experts,
        f"model.top_k = {m.top_k} leaves nothing to choose from model.num_experts = {m.num_experts}: "
        f"set model.top_k to at most {m.num_experts - 1} or raise model.num_experts",
    )
    require(
        m.first_k_dense < m.num_layers or (config.balance.method == "none" and m.first_k_dense == m.num_layers),
        f"model.first_k_dense = {m.first_k_dense} leaves no MoE layer among model.num_layers = {m.num_layers} for "
        f"balance.method = {config.balance.method!r}: lower model.first_k_dense"
        + (" or set balance.method to none" if m.first_k_dense == m.num_layers else ""),
    )
    (_check_mla if m.attention == "mla" else _check_gqa)(m)
    per_group = m.num_experts // m.num_groups
    require(
        m.num_experts % m.num_groups == 0 and (m.num_groups == 1 or per_group >= 2),
        f"model.num_groups = {m.num_groups} does not divide model.num_experts = {m.num_experts} into groups of two or "
        "more: choose such a divisor, or 1 for no groups",
    )
    require(
        m.group_top_k <= m.num_groups,
        f"model.group_top_k = {m.group_top_k} is more than model.num_groups = {m.num_groups}: choose at most that many",
    )
    allowed = m.group_top_k * per_group
    require(
        m.top_k < allowed,
        f"model.top_k = {m.top_k} leaves nothing to choose from the {allowed} experts of model.group_top_k = "
        f"{m.group_top_k} groups: raise model.group_top_k or lower model.top_k",
    )
    for name in ("dim", "expert_hidden_dim"):
        value = getattr(m, name)
        require(
            value % 8 == 0,
            f"model.{name} = {value} is not a multiple of 8, which grouped matrix products need "
            f"(16-byte strides): set it to {-(-value // 8) * 8}",
        )


MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _check_gqa(m: ModelSection) -> None:
    for name in MLA:
        require(
            getattr(m, name) is None,
            f"model.{name} = {getattr(m, name)} is for latent attention, and model.attention = 'gqa': set model.attention "
            "to mla, or leave it out",
        )
    require(
        m.head_dim is not None or m.dim % m.num_heads == 0,
        f"model.dim = {m.dim} is not divisible by model.num_heads = {m.num_heads}: change one of them or set model.head_dim",
    )
    head_dim = m.head_dim or m.dim // m.num_heads
    require(head_dim % 2 == 0, f"model.head_dim = {head_dim} is odd, and RoPE turns pairs: set an even model.head_dim")
    kv = m.num_kv_heads or m.num_heads
    require(
        m.num_heads % kv == 0,
        f"model.num_kv_heads = {kv} does not divide model.num_heads = {m.num_heads}: choose a divisor",
    )


def _check_mla(m: ModelSection) -> None:
    for name in ("num_kv_heads", "head_dim"):
        require(
            getattr(m, name) is None,
            f"model.{name} = {getattr(m, name)} is for grouped-query attention, and model.attention = 'mla': leave it out, "
            f"or set model.attention to gqa",
        )
    for name in MLA[1:]:
        require(
            getattr(m, name) is not None,
            f"model.{name} is missing, and model.attention = 'mla' needs it: set it (DeepSeek-V3: kv_lora_rank 512, "
            "qk_nope_head_dim 128, qk_rope_head_dim 64, v_head_dim 128)",
        )
    turned = m.qk_rope_head_dim or 0
    require(
        turned % 2 == 0,
        f"model.qk_rope_head_dim = {turned} is odd, and RoPE turns pairs: set an even model.qk_rope_head_dim",
    )


def _check_ranks(config: Config, world_size: int) -> None:
    p, ep, experts = config.parallel, config.parallel.ep, config.model.num_experts
    check_shared(config, world_size)
    stage = world_size // p.pp
    require(
        p.pp == 1 or stage % ep == 0,
        f"parallel.ep = {ep} does not divide the {stage} ranks of a stage ({world_size} ranks, parallel.pp = {p.pp}): set "
        f"parallel.ep to a divisor of {stage}, or lower parallel.pp",
    )
    require(
        world_size % ep == 0,
        f"parallel.ep = {ep} does not divide the {world_size} ranks: start a multiple of {ep} processes "
        f"(make train NPROC={ep}) or set parallel.ep to a divisor of {world_size}",
    )
    require(
        experts % ep == 0,
        f"parallel.ep = {ep} does not divide model.num_experts = {experts}: choose a divisor of {experts}",
    )
    edp, local = world_size // ep, experts // ep
    widths = (("dim", config.model.dim), ("expert_hidden_dim", 2 * config.model.expert_hidden_dim))
    rows = config.parallel.data == "shard" and config.train.engine == "native" and local % edp
    for name, width in widths if rows else ():
        require(
            width % edp == 0,
            f"parallel.data = 'shard' cannot divide the {local} experts of a rank, nor model.{name} = "
            f"{getattr(config.model, name)}, over {edp} ranks (of {world_size}, parallel.ep = {ep}): "
            "raise parallel.ep, or set parallel.data to replicate",
        )
    recorded = config.observe.record_scores
    require(
        config.parallel.dispatch == "exact" or not recorded,
        f"parallel.dispatch = 'padded' may run a step twice, and observe.record_scores = {recorded} would record it twice: "
        "set parallel.dispatch to exact while scores are recorded",
    )
    batch, micro, data = config.train.batch_size, config.train.micro_batch_size, config.data_ranks(world_size)
    shared = p.tp * p.pp * p.cp
    who = (
        f"{data} ranks" if shared == 1 else f"{data} groups of parallel.tp * parallel.pp * parallel.cp = {shared} ranks"
    )
    require(
        batch % data == 0,
        f"train.batch_size = {batch} is not divisible by the {who}: set it to a multiple of {data}",
    )
    require(
        micro is None or (batch // data) % micro == 0,
        f"train.micro_batch_size = {micro} does not divide the {batch // data} sequences of a rank "
        f"(train.batch_size = {batch} over {who}): choose a divisor of {batch // data}",
    )


def _check_steps(config: Config) -> None:
    o, steps = config.optim, config.train.steps
    require(
        o.warmup_steps <= steps,
        f"optim.warmup_steps = {o.warmup_steps} is more than train.steps = {steps}: lower it or raise train.steps",
    )
    group = config.observe.wandb_group
    require(
        group is None or 1 <= len(group) <= 128,
        f"observe.wandb_group = {group!r} has {len(group or '')} characters, and W&B takes 1 to 128: shorten it, or leave it out",
    )
    name = config.run.name
    require(
        name is None or (name not in ("", ".", "..") and "/" not in name and not name.startswith("-")),
        f"run.name = {name!r} is not a folder name: use letters, digits, '.', '_' and '-'",
    )


def check_rule(b: BalanceSection) -> None:
    """Limits between the settings of a bias rule. Raises ConfigError."""
    auto = ("proportional", "quantile", "coordinate")
    require(
        b.rate != "auto" or b.method in (*auto, "none"),
        f"balance.rate = 'auto' does not fit balance.method = {b.method!r}, whose step is no measure of the error: "
        f"set a number, or a method of {', '.join(auto)}",
    )
    require(
        b.method != "bip" or not isinstance(b.rate, float) or b.rate <= 1,
        f"balance.rate = {b.rate} is more than 1 for balance.method = 'bip', whose bias must stay at most 0: set 0.1 to 1",
    )
    require(
        not (b.method in ("quantile", "coordinate") and isinstance(b.rate, float) and b.rate > 2),
        f"balance.rate = {b.rate} is more than 2 for balance.method = {b.method!r}, which then diverges: set 0.1 to 1",
    )
    require(
        b.schedule == "constant" or (b.rate or RATES.get(b.method)) != "auto",
        f"balance.schedule = {b.schedule!r} needs a number to start from, and balance.rate is 'auto' for "
        f"balance.method = {b.method!r}: set balance.rate, or leave balance.schedule at constant",
    )


def _check_balance(config: Config) -> None:
    b, m = config.balance, config.model
    check_rule(b)
    require(
        b.aux_selection == "biased" or b.aux_scope == "sequence",
        f"balance.aux_selection = {b.aux_selection!r} is for the sequence scope, and balance.aux_scope = {b.aux_scope!r}: "
        "set balance.aux_scope to sequence, or leave balance.aux_selection at biased",
    )
    groups = b.group_loss_groups or config.parallel.ep
    require(
        not b.group_loss or (groups > 1 and m.num_experts % groups == 0),
        f"balance.group_loss_groups = {groups} does not divide model.num_experts = {m.num_experts} into two groups or "
        "more: choose such a divisor",
    )
    for layer in b.frozen_layers:
        require(
            m.first_k_dense <= layer < m.num_layers,
            f"balance.frozen_layers has {layer}, which is no MoE layer: name layers from {m.first_k_dense} to "
            f"{m.num_layers - 1}",
        )


def _check_assignment(config: Config, world_size: int) -> None:
    b, m, t = config.balance, config.model, config.train
    if b.method not in ASSIGNMENTS:
        return
    require(
        b.method == "hash" or (world_size == 1 and t.micro_batch_size in (None, t.batch_size)),
        f"balance.method = {b.method!r} looks at the whole batch at once, which {world_size} ranks with "
        f"train.micro_batch_size = {t.micro_batch_size or t.batch_size // world_size} do not: use one process (--nproc 1) "
        "and no micro-batches",
    )
    require(
        b.method != "base" or m.top_k == 1,
        f"model.top_k = {m.top_k} does not fit balance.method = 'base', which gives a token one expert: set model.top_k to 1",
    )
    require(
        m.num_groups == 1,
        f"model.num_groups = {m.num_groups} does not fit balance.method = {b.method!r}, which knows no groups: set it to 1",
    )


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML text; settings that are None are left out."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(exclude_none=True))
