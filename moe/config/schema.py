"""The schema: every setting with its type, range, default and meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot run; its text is one sentence for the user. Exit code 2."""


class Section(BaseModel):
    """Base of all sections: unknown keys, NaN, infinities and silent type changes are refused; instances are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunSection(Section):
    name: str | None = None
    """Name of the run folder; default: name of the last configuration file."""
    folder: str = "runs"
    """Parent of the run folders."""
    seed: NonNegative = 0
    """Seed of the initial weights and of the data order."""
    start_from: str | None = None
    """Folder of a Hugging Face checkpoint whose weights and expert bias a new run takes; `alf-moe import` writes the model
    section that fits."""


class ModelSection(Section):
    vocab_size: Positive
    """Entries of the embedding; must not be smaller than the tokenizer's."""
    dim: Positive
    """Width of the residual stream (D)."""
    num_layers: Positive
    """Number of transformer layers, dense ones included."""
    num_heads: Positive
    """Query heads."""
    num_kv_heads: Positive | None = None
    """gqa: key/value heads; default: num_heads."""
    head_dim: Positive | None = None
    """gqa: width of a head; default: dim / num_heads. Must be even (RoPE)."""
    attention: Literal["gqa", "mla"] = "gqa"
    """Grouped-query attention, or multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""
    q_lora_rank: Positive | None = None
    """mla: width of the latent of the queries; default: queries are not compressed."""
    kv_lora_rank: Positive | None = None
    """mla: width of the latent that keys and values come from."""
    qk_nope_head_dim: Positive | None = None
    """mla: width of a head's query and key without position."""
    qk_rope_head_dim: Positive | None = None
    """mla: width of the part with position, whose key all heads share. Must be even (RoPE)."""
    v_head_dim: Positive | None = None
    """mla: width of a head's value."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of RMSNorm."""
    init_std: PositiveFloat = 0.006
    """Standard deviation of the initial weights (DeepSeekMoE, arXiv:2401.06066, section 4.1.3)."""
    scale_residual_init: bool = False
    """Divide the std of the projections that write to the residual stream by sqrt(2 num_layers)."""
    tie_embeddings: bool = False
    """Use the embedding as the output head."""
    first_k_dense: NonNegative = 1
    """The first k layers have a dense MLP instead of experts."""
    dense_hidden_dim: Positive | None = None
    """Hidden width of the dense MLP; default: (top_k + num_shared_experts) * expert_hidden_dim."""
    num_experts: Positive
    """Routed experts per MoE layer (E)."""
    top_k: Positive
    """Routed experts per token (K)."""
    num_shared_experts: NonNegative = 0
    """Experts that every token visits."""
    expert_hidden_dim: Positive
    """Hidden width of one expert (F)."""
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    """From router logit to affinity score."""
    renormalize: bool = True
    """Divide the chosen scores by their sum."""
    num_groups: Positive = 1
    """Group-limited routing: blocks of experts, contiguous (a node or device each)."""
    group_top_k: Positive = 1
    """Groups that a token may use: those with the largest sum of their two best biased scores."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Factor on the combine weights."""
    train_router: bool = True
    """false: the router keeps its initial weights (a control: only the bias balances)."""


class DataSection(Section):
    path: str = "data/enwik8-8192"
    """Folder written by `alf-moe prepare`."""
    seq_len: Positive
    """Tokens of one training sequence (S)."""
    mix: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Weight per source of the folder; empty: every source by its number of tokens."""
    document_mask: bool = False
    """Attention does not cross the end of a document."""


class ParallelSection(Section):
    ep: Positive = 1
    """Ranks that share the experts of a layer; divides the number of ranks and of experts."""
    tp: Positive = 1
    """Megatron-core: ranks that share the matrices of attention, dense MLPs, shared experts, embedding and head; between them,
    each has a part of every sequence. Routed experts stay whole."""
    pp: Positive = 1
    """Megatron-core: stages, each of num_layers / pp layers, through which micro-batches pass (1F1B)."""
    cp: Positive = 1
    """Megatron-core with Transformer Engine: ranks that share every sequence, each with two of 2 * cp chunks of it, and exchange
    keys and values in attention."""
    data: Literal["replicate", "shard"] = "replicate"
    """What data-parallel ranks hold: all of the parameters and optimizer state (DDP), or a share (FSDP2; under Megatron-core, of
    the optimizer's state alone)."""
    dispatch: Literal["exact", "padded"] = "exact"
    """How rows travel between the ranks of ep: blocks of their own size, for which the host waits once a layer; or blocks of
    capacity_factor, without a wait, and a step in which one overflows is repeated with exact blocks: nothing is dropped."""
    capacity_factor: Annotated[float, Field(ge=1)] = 1.5
    """Padded dispatch: rows of a block over their mean, for every pair of ranks and micro-batch; ep is always enough."""


class OptimSection(Section):
    lr: PositiveFloat
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW, first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW, second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW, epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; never on norms and embeddings."""
    grad_clip: PositiveFloat = 1.0
    """Limit of the global gradient norm."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Warm-up then cosine, or warm-up, stable, decay (WSD)."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    decay_share: Share = 0.2
    """WSD: share of the steps in the final linear decay."""
    final_lr_share: Share = 0.1
    """Last learning rate as a share of the peak."""


class TrainSection(Section):
    steps: Positive
    """Optimizer steps."""
    batch_size: Positive
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_size: Positive | None = None
    """Sequences of one forward pass on one rank; default: no accumulation."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Matrix products and activations; default: bfloat16 on CUDA, float32 on CPU. Parameters stay float32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute nothing, cheap operations, or whole layers in the backward pass."""
    compile: bool = False
    """torch.compile each block of the native engine; on a CPU that takes a C++ compiler. Faster steps, and about a minute
    before the first and before the first evaluation."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Routing, permute, experts and combine: auto takes Triton on CUDA (for the experts the faster where measured), else torch."""
    loss_chunk: Positive = 512
    """Tokens whose logits exist at one time."""
    deterministic: bool = False
    """Bitwise reproducible kernels where torch offers them; prints the flags that it sets."""
    max_skipped_steps: Positive = 10
    """Stop (exit code 4) after this many skipped steps in a row: gradient not finite, or spike_sigma."""
    spike_sigma: NonNegativeFloat = 6.0
    """Skip a step whose loss is above the mean of the last 128 by this many of their standard deviations; 0: never."""
    timeout_s: PositiveFloat = 600.0
    """Seconds without progress of a rank, after which the missing rank and all stacks are reported and the run ends."""
    profile: bool = False
    """Write a profiler trace (and on CUDA a memory snapshot) of steps 6 to 8 into the run folder."""
    engine: Literal["native", "deepspeed", "megatron"] = "native"
    """What runs the model: torch alone, DeepSpeed's ZeRO (its own section), or Megatron-core's layers and dispatchers, which
    need GPUs (docs/engines.md)."""


class DeepSpeedSection(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What data-parallel ranks share instead of holding it whole: 0 nothing, 1 the optimizer's state, 2 and its gradients,
    3 and the parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the memory of the host; needs a GPU and zero_stage 1 or more."""
    own_files: bool = False
    """Checkpoints hold DeepSpeed's own files as well, for its tools; --resume needs them not."""
    start_from: str | None = None
    """A checkpoint with own_files, or a folder of DeepSpeed's, whose weights, optimizer state and bias a new run takes; of the
    same ranks and zero_stage."""


RATES: dict[str, float | str] = {
    "sign": 1e-3,
    "proportional": 1e-2,
    "rms": 1e-3,
    "smebu": 5e-4,
    "quantile": 1.0,
    "bip": 1.0,
    "coordinate": "auto",
}
"""Default of balance.rate by method: published values where there are any (docs/theory.md)."""

ASSIGNMENTS = ("bip_leaky", "sinkhorn", "base", "expert_choice", "hash")
"""Methods that choose the experts of a batch themselves; all but hash see the whole batch: on one rank only."""


class BalanceSection(Section):
    method: Literal[
        "none",
        "sign",
        "proportional",
        "rms",
        "smebu",
        "quantile",
        "bip",
        "coordinate",
        "bip_leaky",
        "sinkhorn",
        "base",
        "expert_choice",
        "hash",
    ] = "coordinate"
    """How experts are balanced: the rule that moves their bias after each step, or one of the baselines that assign a
    batch (docs/theory.md)."""
    rate: Annotated[PositiveFloat | Literal["auto"] | None, Field(union_mode="left_to_right")] = None
    """Step size of the bias update: score units for sign, proportional, rms and smebu, the share of the way for quantile
    and coordinate; auto: set by the whiteness of successive load errors. Default: RATES of moe/config/schema.py."""
    schedule: Literal["constant", "inverse_sqrt", "inverse", "linear"] = "constant"
    """The rate at step n: u, u/sqrt(n + n0), u/(n + n0), or linear to 0 at freeze_step."""
    schedule_offset: NonNegativeFloat = 0.0
    """n0 of the schedules inverse and inverse_sqrt."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up of the rate."""
    freeze_step: Positive | None = None
    """From this step on the bias stays; default: never (schedule linear: the last step)."""
    frozen_layers: list[NonNegative] = []
    """Layers, counted from 0, whose bias (and shares of phi_loss) never move."""
    clip: PositiveFloat | None = None
    """Limit of the normalised load error |(L - A) / L| that a rule sees; default: none."""
    centre: bool = True
    """Subtract the mean of the bias after each update: does not change the routing, stops drift."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """smebu: beta of the momentum."""
    kappa: PositiveFloat = 2.0
    """smebu: slope of tanh(kappa e)."""
    aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the auxiliary balance loss E * sum_k f_k P_k."""
    aux_scope: Literal["micro_batch", "sequence", "global"] = "micro_batch"
    """Where f and P are taken: one micro-batch, each sequence (DeepSeek-V3), or f over all ranks and the micro-batches of
    the step so far (one more all-reduce a micro-batch)."""
    aux_selection: Literal["biased", "unbiased"] = "biased"
    """What f of the sequence scope counts: the routing itself, or the top K of the scores alone, as DeepSeek-V3."""
    group_loss: NonNegativeFloat = 0.0
    """Coefficient of the balance loss over contiguous groups of experts (DeepSeekMoE's device-level loss)."""
    group_loss_groups: Positive | None = None
    """Groups of group_loss; default: parallel.ep."""
    phi_loss: NonNegativeFloat = 0.0
    """Coefficient of phi-balancing, sum_k P_k (1 + log m_k), m the running mean of P."""
    phi_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """phi_loss: the new batch's share in m."""
    simbal_loss: NonNegativeFloat = 0.0
    """Coefficient of SimBal, sum |R^T R - 1| of the router matrix R (published: 0.1)."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""


class EvaluateSection(Section):
    every: NonNegative = 0
    """Steps between evaluations; 0: only after the last step."""
    batch_size: Positive = 16
    """Sequences of one forward pass on one rank."""
    max_tokens: Positive | None = None
    """Held-out tokens to use; default: all."""


class CheckpointSection(Section):
    every: NonNegative = 0
    """Steps between checkpoints; 0: only after the last step and on a signal."""
    keep: Positive = 2
    """Newest checkpoints to keep."""
    keep_every: NonNegative = 0
    """Keep those at a multiple of this many steps as well; 0: no others."""
    background: bool = True
    """Write checkpoints while training goes on; the last one and those after a signal are always waited for."""


class ObserveSection(Section):
    log_every: Positive = 10
    """Steps between logged lines."""
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    """W&B: auto is online when WANDB_API_KEY is set and offline otherwise."""
    wandb_project: str = "alf-moe"
    """W&B project."""
    wandb_group: str | None = None
    """W&B group of runs that belong together, such as the seeds and methods of a comparison; the job type is
    balance.method."""
    regret_every: NonNegative = 100
    """Steps between measurements of the regret, at which large layers take turns; 0: never. Always 0 for group-limited
    routing and assignment baselines, for which the theory does not hold, and with parallel.pp > 1, where no rank sees the
    scores of every layer."""
    regret_tokens: Positive = 2048
    """Tokens of one measurement, over all ranks; at least one sequence a rank."""
    regret_reservoir: Positive = 4096
    """Tokens kept for the best bias in hindsight; with room for every token measured, static regret is exact."""
    record_scores: NonNegative = 0
    """Record the router scores of this many steps into <run>/scores, for alf-moe theory --streams recorded=FILE."""
    record_from: Positive = 1
    """First step whose scores are recorded."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device for MFU; default: a table of GPUs, measured on CPU."""


class Config(Section):
    """One training run."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    optim: OptimSection
    train: TrainSection
    balance: BalanceSection = BalanceSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    observe: ObserveSection = ObserveSection()

    def data_ranks(self, world_size: int) -> int:
        """Ranks, or groups of ranks (parallel.tp * parallel.pp * parallel.cp), that see different sequences."""
        return world_size // (self.parallel.tp * self.parallel.pp * self.parallel.cp)

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts (L)."""
        return self.model.num_layers - self.model.first_k_dense

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks, when no sequence is padded (T of the balancing window)."""
        return self.train.batch_size * self.data.seq_len
