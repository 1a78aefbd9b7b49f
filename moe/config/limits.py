"""What settings may not be together, and what follows from them: `resolve`, pure, called once after the last override."""

from __future__ import annotations

from importlib.util import find_spec

from moe.config.schema import ASSIGNMENTS, RATES, BalanceSection, Config, ConfigError, DeepSpeedSection, ModelSection


def resolve(config: Config, world_size: int = 1, cuda: bool = False) -> Config:
    """Fill in every derived setting and check every limit between settings; pure, called once after the last override.

    Raises ConfigError. The result is what is written to the run folder's config.toml.
    """
    _check_model(config)
    _check_ranks(config, world_size)
    _check_steps(config)
    _require(
        config.train.kernels != "triton" or cuda,
        "train.kernels = 'triton' needs a GPU, and this run has none: set it to torch or auto",
    )
    _check_balance(config)
    _check_assignment(config, world_size)
    _check_deepspeed(config, cuda)
    _check_megatron(config, cuda)
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


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)


def _check_model(config: Config) -> None:
    m = config.model
    _require(
        m.top_k < m.num_experts,
        f"model.top_k = {m.top_k} leaves nothing to choose from model.num_experts = {m.num_experts}: "
        f"set model.top_k to at most {m.num_experts - 1} or raise model.num_experts",
    )
    _require(
        m.first_k_dense < m.num_layers or (config.balance.method == "none" and m.first_k_dense == m.num_layers),
        f"model.first_k_dense = {m.first_k_dense} leaves no MoE layer among model.num_layers = {m.num_layers} for "
        f"balance.method = {config.balance.method!r}: lower model.first_k_dense"
        + (" or set balance.method to none" if m.first_k_dense == m.num_layers else ""),
    )
    (_check_mla if m.attention == "mla" else _check_gqa)(m)
    per_group = m.num_experts // m.num_groups
    _require(
        m.num_experts % m.num_groups == 0 and (m.num_groups == 1 or per_group >= 2),
        f"model.num_groups = {m.num_groups} does not divide model.num_experts = {m.num_experts} into groups of two or "
        "more: choose such a divisor, or 1 for no groups",
    )
    _require(
        m.group_top_k <= m.num_groups,
        f"model.group_top_k = {m.group_top_k} is more than model.num_groups = {m.num_groups}: choose at most that many",
    )
    allowed = m.group_top_k * per_group
    _require(
        m.top_k < allowed,
        f"model.top_k = {m.top_k} leaves nothing to choose from the {allowed} experts of model.group_top_k = "
        f"{m.group_top_k} groups: raise model.group_top_k or lower model.top_k",
    )
    for name in ("dim", "expert_hidden_dim"):
        value = getattr(m, name)
        _require(
            value % 8 == 0,
            f"model.{name} = {value} is not a multiple of 8, which grouped matrix products need "
            f"(16-byte strides): set it to {-(-value // 8) * 8}",
        )


MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _check_gqa(m: ModelSection) -> None:
    for name in MLA:
        _require(
            getattr(m, name) is None,
            f"model.{name} = {getattr(m, name)} is for latent attention, and model.attention = 'gqa': set model.attention "
            "to mla, or leave it out",
        )
    _require(
        m.head_dim is not None or m.dim % m.num_heads == 0,
        f"model.dim = {m.dim} is not divisible by model.num_heads = {m.num_heads}: change one of them or set model.head_dim",
    )
    head_dim = m.head_dim or m.dim // m.num_heads
    _require(head_dim % 2 == 0, f"model.head_dim = {head_dim} is odd, and RoPE turns pairs: set an even model.head_dim")
    kv = m.num_kv_heads or m.num_heads
    _require(
        m.num_heads % kv == 0,
        f"model.num_kv_heads = {kv} does not divide model.num_heads = {m.num_heads}: choose a divisor",
    )


def _check_mla(m: ModelSection) -> None:
    for name in ("num_kv_heads", "head_dim"):
        _require(
            getattr(m, name) is None,
            f"model.{name} = {getattr(m, name)} is for grouped-query attention, and model.attention = 'mla': leave it out, "
            f"or set model.attention to gqa",
        )
    for name in MLA[1:]:
        _require(
            getattr(m, name) is not None,
            f"model.{name} is missing, and model.attention = 'mla' needs it: set it (DeepSeek-V3: kv_lora_rank 512, "
            "qk_nope_head_dim 128, qk_rope_head_dim 64, v_head_dim 128)",
        )
    turned = m.qk_rope_head_dim or 0
    _require(
        turned % 2 == 0,
        f"model.qk_rope_head_dim = {turned} is odd, and RoPE turns pairs: set an even model.qk_rope_head_dim",
    )


def _check_ranks(config: Config, world_size: int) -> None:
    p, ep, experts = config.parallel, config.parallel.ep, config.model.num_experts
    _check_shared(config, world_size)
    stage = world_size // p.pp
    _require(
        p.pp == 1 or stage % ep == 0,
        f"parallel.ep = {ep} does not divide the {stage} ranks of a stage ({world_size} ranks, parallel.pp = {p.pp}): set "
        f"parallel.ep to a divisor of {stage}, or lower parallel.pp",
    )
    _require(
        world_size % ep == 0,
        f"parallel.ep = {ep} does not divide the {world_size} ranks: start a multiple of {ep} processes "
        f"(make train NPROC={ep}) or set parallel.ep to a divisor of {world_size}",
    )
    _require(
        experts % ep == 0,
        f"parallel.ep = {ep} does not divide model.num_experts = {experts}: choose a divisor of {experts}",
    )
    edp, local = world_size // ep, experts // ep
    widths = (("dim", config.model.dim), ("expert_hidden_dim", 2 * config.model.expert_hidden_dim))
    rows = config.parallel.data == "shard" and config.train.engine == "native" and local % edp
    for name, width in widths if rows else ():
        _require(
            width % edp == 0,
            f"parallel.data = 'shard' cannot divide the {local} experts of a rank, nor model.{name} = "
            f"{getattr(config.model, name)}, over {edp} ranks (of {world_size}, parallel.ep = {ep}): "
            "raise parallel.ep, or set parallel.data to replicate",
        )
    recorded = config.observe.record_scores
    _require(
        config.parallel.dispatch == "exact" or not recorded,
        f"parallel.dispatch = 'padded' may run a step twice, and observe.record_scores = {recorded} would record it twice: "
        "set parallel.dispatch to exact while scores are recorded",
    )
    batch, micro, data = config.train.batch_size, config.train.micro_batch_size, config.data_ranks(world_size)
    who = f"{data} ranks" if data == world_size else f"{data} groups of parallel.tp * parallel.pp = {p.tp * p.pp} ranks"
    _require(
        batch % data == 0,
        f"train.batch_size = {batch} is not divisible by the {who}: set it to a multiple of {data}",
    )
    _require(
        micro is None or (batch // data) % micro == 0,
        f"train.micro_batch_size = {micro} does not divide the {batch // data} sequences of a rank "
        f"(train.batch_size = {batch} over {who}): choose a divisor of {batch // data}",
    )


def _check_shared(config: Config, world_size: int) -> None:
    """What several ranks may share beyond the experts."""
    p, m, b = config.parallel, config.model, config.balance
    _require(
        p.cp == 1,
        f"parallel.cp = {p.cp} shares a sequence in attention, which Megatron-core leaves to Transformer Engine and no engine "
        "here has been run with: set it to 1, and parallel.tp to share the activations of long sequences",
    )
    for name in ("tp", "pp"):
        _require(
            getattr(p, name) == 1 or config.train.engine == "megatron",
            f"parallel.{name} = {getattr(p, name)} is Megatron-core's, and train.engine = {config.train.engine!r}: set "
            f"parallel.{name} to 1, or train.engine to megatron",
        )
    _require(
        world_size % (p.tp * p.pp) == 0,
        f"parallel.tp * parallel.pp = {p.tp} * {p.pp} does not divide the {world_size} ranks: start a multiple of "
        f"{p.tp * p.pp} processes, or lower one of them",
    )
    _require(
        m.num_layers % p.pp == 0,
        f"parallel.pp = {p.pp} does not divide model.num_layers = {m.num_layers}: choose a divisor of {m.num_layers}",
    )
    _require(
        p.pp == 1 or not m.tie_embeddings,
        f"model.tie_embeddings = true keeps one matrix at both ends of parallel.pp = {p.pp} stages: set it to false, or "
        "parallel.pp to 1",
    )
    _require(
        p.pp == 1 or config.run.start_from is None,
        f"run.start_from = {config.run.start_from!r} is read by ranks that hold every layer, and parallel.pp = {p.pp} spreads "
        "them: start with parallel.pp = 1, save, and resume with more stages",
    )
    recorded = config.observe.record_scores
    _require(
        p.pp == 1 or not recorded,
        f"observe.record_scores = {recorded} needs every layer's scores on one rank, and parallel.pp = {p.pp} spreads the "
        "layers: set it to 0, or parallel.pp to 1",
    )
    if p.tp == 1:
        return
    widths = {
        "model.num_heads": m.num_heads,
        "model.num_kv_heads": m.num_kv_heads or m.num_heads,
        "model.vocab_size": m.vocab_size,
        "model.dense_hidden_dim": m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim,
        "model.num_shared_experts * model.expert_hidden_dim": m.num_shared_experts * m.expert_hidden_dim,
        "data.seq_len": config.data.seq_len,
    }
    for name, width in widths.items():
        _require(
            width % p.tp == 0,
            f"parallel.tp = {p.tp} does not divide {name} = {width}: choose a divisor of it, or set parallel.tp to 1",
        )
    for name in ("aux_loss", "group_loss"):
        _require(
            not getattr(b, name),
            f"balance.{name} = {getattr(b, name)} is taken of whole sequences, and parallel.tp = {p.tp} gives a rank a part of "
            "each: set it to 0 (the bias and balance.phi_loss balance there), or parallel.tp to 1",
        )


def _check_deepspeed(config: Config, cuda: bool) -> None:
    d, p, default = config.deepspeed, config.parallel, DeepSpeedSection()
    if config.train.engine != "deepspeed":
        for name in DeepSpeedSection.model_fields:
            value = getattr(d, name)
            _require(
                value == getattr(default, name),
                f"deepspeed.{name} = {value!r} is for the DeepSpeed engine, and train.engine = {config.train.engine!r}: "
                "set train.engine to deepspeed, or leave it out",
            )
        return
    _require(
        d.start_from is None or config.run.start_from is None,
        f"deepspeed.start_from = {d.start_from!r} and run.start_from = {config.run.start_from!r} both say where to begin: "
        "leave one of them out",
    )
    _require(
        p.data == "replicate",
        f"parallel.data = {p.data!r} is how the native engine shards, and train.engine = 'deepspeed' has stages for it: "
        "set deepspeed.zero_stage to 3, and parallel.data to replicate",
    )
    _require(
        p.dispatch == "exact",
        f"parallel.dispatch = {p.dispatch!r} may repeat a step, which train.engine = 'deepspeed' cannot once it has "
        "reduced gradients: set parallel.dispatch to exact, or train.engine to native",
    )
    _require(
        not d.offload_optimizer or (d.zero_stage > 0 and cuda),
        f"deepspeed.offload_optimizer = true moves a share of the optimizer's state from a GPU to the host, and there is "
        f"{'no share with deepspeed.zero_stage = 0' if cuda else 'no GPU'}: "
        f"set {'deepspeed.zero_stage to 1 or more' if cuda else 'it to false'}",
    )
    _require(
        find_spec("deepspeed") is not None,
        "train.engine = 'deepspeed' needs the package deepspeed, which is not installed: pip install 'alf-moe[deepspeed]' "
        "(make setup installs it), or set train.engine to native",
    )


def _check_megatron(config: Config, cuda: bool) -> None:
    m, p, t, b = config.model, config.parallel, config.train, config.balance
    if t.engine != "megatron":
        return
    engine = "train.engine = 'megatron'"
    _require(
        find_spec("megatron") is not None,
        f"{engine} needs the package megatron-core, which is not installed: pip install 'alf-moe[megatron]', or set "
        "train.engine to native",
    )
    _require(
        p.dispatch == "exact",
        f"parallel.dispatch = {p.dispatch!r} is the native engine's, and {engine} has dispatchers of its own: set "
        "parallel.dispatch to exact, or train.engine to native",
    )
    _require(
        m.attention == "gqa",
        f"model.attention = {m.attention!r} is not connected to {engine}: set model.attention to gqa, or train.engine to native",
    )
    _require(
        m.first_k_dense < m.num_layers,
        f"model.first_k_dense = {m.first_k_dense} leaves no MoE layer among model.num_layers = {m.num_layers}, and {engine} "
        "is for sparse models: lower model.first_k_dense, or set train.engine to native",
    )
    _require(
        not config.data.document_mask,
        f"data.document_mask = true has no counterpart in {engine}: set it to false, or train.engine to native",
    )
    _require(
        not b.aux_loss or b.aux_scope != "global",
        f"balance.aux_scope = 'global' needs the counts of all ranks before a backward pass, which {engine} does not wait "
        "for: choose micro_batch or sequence, or set train.engine to native",
    )
    _require(
        b.method not in ASSIGNMENTS,
        f"balance.method = {b.method!r} assigns the batch itself, and {engine} routes by a bias alone: choose a rule, one of "
        f"{', '.join(RATES)}, or set train.engine to native",
    )
    _require(
        cuda, f"{engine} needs a GPU, which Megatron-core asks for its device, and this run has none: set it to native"
    )


def _check_steps(config: Config) -> None:
    o, steps = config.optim, config.train.steps
    _require(
        o.warmup_steps <= steps,
        f"optim.warmup_steps = {o.warmup_steps} is more than train.steps = {steps}: lower it or raise train.steps",
    )
    group = config.observe.wandb_group
    _require(
        group is None or 1 <= len(group) <= 128,
        f"observe.wandb_group = {group!r} has {len(group or '')} characters, and W&B takes 1 to 128: shorten it, or leave it out",
    )
    name = config.run.name
    _require(
        name is None or (name not in ("", ".", "..") and "/" not in name and not name.startswith("-")),
        f"run.name = {name!r} is not a folder name: use letters, digits, '.', '_' and '-'",
    )


def check_rule(b: BalanceSection) -> None:
    """Limits between the settings of a bias rule. Raises ConfigError."""
    auto = ("proportional", "quantile", "coordinate")
    _require(
        b.rate != "auto" or b.method in (*auto, "none"),
        f"balance.rate = 'auto' does not fit balance.method = {b.method!r}, whose step is no measure of the error: "
        f"set a number, or a method of {', '.join(auto)}",
    )
    _require(
        b.method != "bip" or not isinstance(b.rate, float) or b.rate <= 1,
        f"balance.rate = {b.rate} is more than 1 for balance.method = 'bip', whose bias must stay at most 0: set 0.1 to 1",
    )
    _require(
        not (b.method in ("quantile", "coordinate") and isinstance(b.rate, float) and b.rate > 2),
        f"balance.rate = {b.rate} is more than 2 for balance.method = {b.method!r}, which then diverges: set 0.1 to 1",
    )
    _require(
        b.schedule == "constant" or (b.rate or RATES.get(b.method)) != "auto",
        f"balance.schedule = {b.schedule!r} needs a number to start from, and balance.rate is 'auto' for "
        f"balance.method = {b.method!r}: set balance.rate, or leave balance.schedule at constant",
    )


def _check_balance(config: Config) -> None:
    b, m = config.balance, config.model
    check_rule(b)
    _require(
        b.aux_selection == "biased" or b.aux_scope == "sequence",
        f"balance.aux_selection = {b.aux_selection!r} is for the sequence scope, and balance.aux_scope = {b.aux_scope!r}: "
        "set balance.aux_scope to sequence, or leave balance.aux_selection at biased",
    )
    groups = b.group_loss_groups or config.parallel.ep
    _require(
        not b.group_loss or (groups > 1 and m.num_experts % groups == 0),
        f"balance.group_loss_groups = {groups} does not divide model.num_experts = {m.num_experts} into two groups or "
        "more: choose such a divisor",
    )
    for layer in b.frozen_layers:
        _require(
            m.first_k_dense <= layer < m.num_layers,
            f"balance.frozen_layers has {layer}, which is no MoE layer: name layers from {m.first_k_dense} to "
            f"{m.num_layers - 1}",
        )


def _check_assignment(config: Config, world_size: int) -> None:
    b, m, t = config.balance, config.model, config.train
    if b.method not in ASSIGNMENTS:
        return
    _require(
        b.method == "hash" or (world_size == 1 and t.micro_batch_size in (None, t.batch_size)),
        f"balance.method = {b.method!r} looks at the whole batch at once, which {world_size} ranks with "
        f"train.micro_batch_size = {t.micro_batch_size or t.batch_size // world_size} do not: use one process (--nproc 1) "
        "and no micro-batches",
    )
    _require(
        b.method != "base" or m.top_k == 1,
        f"model.top_k = {m.top_k} does not fit balance.method = 'base', which gives a token one expert: set model.top_k to 1",
    )
    _require(
        m.num_groups == 1,
        f"model.num_groups = {m.num_groups} does not fit balance.method = {b.method!r}, which knows no groups: set it to 1",
    )


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML text; settings that are None are left out."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(exclude_none=True))
