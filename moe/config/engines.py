"""What each engine cannot do, in one sentence each: called by `moe.config.limits`."""

from __future__ import annotations

import math
from importlib.util import find_spec

from moe.config.schema import ASSIGNMENTS, RATES, Config, ConfigError, DeepSpeedSection


def require(holds: bool, sentence: str) -> None:
    """Raises ConfigError with the sentence unless it holds."""
    if not holds:
        raise ConfigError(sentence)


def check_shared(config: Config, world_size: int) -> None:
    """What several ranks may share beyond the experts."""
    p, m, b = config.parallel, config.model, config.balance
    for name in ("tp", "pp", "cp"):
        require(
            getattr(p, name) == 1 or config.train.engine == "megatron",
            f"parallel.{name} = {getattr(p, name)} is Megatron-core's, and train.engine = {config.train.engine!r}: set "
            f"parallel.{name} to 1, or train.engine to megatron",
        )
    shared = p.tp * p.pp * p.cp
    require(
        world_size % shared == 0,
        f"parallel.tp * parallel.pp * parallel.cp = {p.tp} * {p.pp} * {p.cp} does not divide the {world_size} ranks: start a "
        f"multiple of {shared} processes, or lower one of them",
    )
    parts = p.cp * math.lcm(2, p.tp)
    require(
        p.cp == 1 or config.data.seq_len % parts == 0,
        f"data.seq_len = {config.data.seq_len} is not divisible by {parts}: parallel.cp = {p.cp} gives a rank 2 of "
        f"{2 * p.cp} chunks of a sequence"
        + (f", which parallel.tp = {p.tp} divides again" if p.tp > 1 else "")
        + f": set it to a multiple of {parts}, or parallel.cp to 1",
    )
    for size, name in ((p.tp, "tp"), (p.cp, "cp")):
        for loss in ("aux_loss", "group_loss"):
            require(
                size == 1 or not getattr(b, loss),
                f"balance.{loss} = {getattr(b, loss)} is taken of whole sequences, and parallel.{name} = {size} gives a rank a "
                f"part of each: set it to 0 (the bias and balance.phi_loss balance there), or parallel.{name} to 1",
            )
    require(
        m.num_layers % p.pp == 0,
        f"parallel.pp = {p.pp} does not divide model.num_layers = {m.num_layers}: choose a divisor of {m.num_layers}",
    )
    require(
        p.pp == 1 or not m.tie_embeddings,
        f"model.tie_embeddings = true keeps one matrix at both ends of parallel.pp = {p.pp} stages: set it to false, or "
        "parallel.pp to 1",
    )
    require(
        p.pp == 1 or config.run.start_from is None,
        f"run.start_from = {config.run.start_from!r} is read by ranks that hold every layer, and parallel.pp = {p.pp} spreads "
        "them: start with parallel.pp = 1, save, and resume with more stages",
    )
    recorded = config.observe.record_scores
    require(
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
        require(
            width % p.tp == 0,
            f"parallel.tp = {p.tp} does not divide {name} = {width}: choose a divisor of it, or set parallel.tp to 1",
        )


def check_deepspeed(config: Config, cuda: bool) -> None:
    """Its own settings, and those that it has no part for."""
    d, p, default = config.deepspeed, config.parallel, DeepSpeedSection()
    if config.train.engine != "deepspeed":
        for name in DeepSpeedSection.model_fields:
            value = getattr(d, name)
            require(
                value == getattr(default, name),
                f"deepspeed.{name} = {value!r} is for the DeepSpeed engine, and train.engine = {config.train.engine!r}: "
                "set train.engine to deepspeed, or leave it out",
            )
        return
    require(
        d.start_from is None or config.run.start_from is None,
        f"deepspeed.start_from = {d.start_from!r} and run.start_from = {config.run.start_from!r} both say where to begin: "
        "leave one of them out",
    )
    require(
        p.data == "replicate",
        f"parallel.data = {p.data!r} is how the native engine shards, and train.engine = 'deepspeed' has stages for it: "
        "set deepspeed.zero_stage to 3, and parallel.data to replicate",
    )
    require(
        p.dispatch == "exact",
        f"parallel.dispatch = {p.dispatch!r} may repeat a step, which train.engine = 'deepspeed' cannot once it has "
        "reduced gradients: set parallel.dispatch to exact, or train.engine to native",
    )
    require(
        not d.offload_optimizer or (d.zero_stage > 0 and cuda),
        f"deepspeed.offload_optimizer = true moves a share of the optimizer's state from a GPU to the host, and there is "
        f"{'no share with deepspeed.zero_stage = 0' if cuda else 'no GPU'}: "
        f"set {'deepspeed.zero_stage to 1 or more' if cuda else 'it to false'}",
    )
    require(
        find_spec("deepspeed") is not None,
        "train.engine = 'deepspeed' needs the package deepspeed, which is not installed: pip install 'alf-moe[deepspeed]' "
        "(make setup installs it), or set train.engine to native",
    )


def check_megatron(config: Config, cuda: bool) -> None:
    """Settings that have no counterpart there."""
    m, p, t, b = config.model, config.parallel, config.train, config.balance
    if t.engine != "megatron":
        return
    engine = "train.engine = 'megatron'"
    require(
        find_spec("megatron") is not None,
        f"{engine} needs the package megatron-core, which is not installed: pip install 'alf-moe[megatron]', or set "
        "train.engine to native",
    )
    require(
        p.dispatch == "exact",
        f"parallel.dispatch = {p.dispatch!r} is the native engine's, and {engine} has dispatchers of its own: set "
        "parallel.dispatch to exact, or train.engine to native",
    )
    require(
        m.attention == "gqa",
        f"model.attention = {m.attention!r} is not connected to {engine}: set model.attention to gqa, or train.engine to native",
    )
    require(
        m.first_k_dense < m.num_layers,
        f"model.first_k_dense = {m.first_k_dense} leaves no MoE layer among model.num_layers = {m.num_layers}, and {engine} "
        "is for sparse models: lower model.first_k_dense, or set train.engine to native",
    )
    require(
        not config.data.document_mask,
        f"data.document_mask = true has no counterpart in {engine}: set it to false, or train.engine to native",
    )
    require(
        not b.aux_loss or b.aux_scope != "global",
        f"balance.aux_scope = 'global' needs the counts of all ranks before a backward pass, which {engine} does not wait "
        "for: choose micro_batch or sequence, or set train.engine to native",
    )
    require(
        b.method not in ASSIGNMENTS,
        f"balance.method = {b.method!r} assigns the batch itself, and {engine} routes by a bias alone: choose a rule, one of "
        f"{', '.join(RATES)}, or set train.engine to native",
    )
    if p.cp > 1:
        _check_context_parallel(config)
    require(
        cuda, f"{engine} needs a GPU, which Megatron-core asks for its device, and this run has none: set it to native"
    )


def _check_context_parallel(config: Config) -> None:
    """What its attention asks for. The kernels that know context parallelism are fused ones (Transformer Engine 2,
    dot_product_attention/utils.py, get_attention_backend): bfloat16, heads of a multiple of 8."""
    m, cp = config.model, config.parallel.cp
    require(
        find_spec("transformer_engine") is not None,
        f"parallel.cp = {cp} shares sequences between ranks, attention over shared sequences is Transformer Engine's, and it is "
        "not installed: pip install --no-build-isolation 'transformer_engine[pytorch]', or set parallel.cp to 1",
    )
    require(
        config.train.compute_dtype != "float32",
        f"train.compute_dtype = 'float32' is not what Transformer Engine's attention takes with parallel.cp = {cp}: set it to "
        "bfloat16, or parallel.cp to 1",
    )
    head_dim = m.head_dim or m.dim // m.num_heads
    require(
        head_dim % 8 == 0,
        f"model.head_dim = {head_dim} is no multiple of 8, which Transformer Engine's attention needs with parallel.cp = {cp}: "
        f"set it to {-(-head_dim // 8) * 8}, or parallel.cp to 1",
    )
