"""The configuration: TOML files and dotted overrides -> one strict, frozen schema -> `resolve`.

Imports no torch, so that `alf-moe --help` and every refusal of a bad configuration answer at once.

    text = load(["configs/tiny.toml"], ["--train.steps", "100"])    # raises ConfigError
    config = resolve(text, world_size=2)                            # every derived value filled in, every limit checked

A user error is a `ConfigError`: one sentence with the dotted path of the setting, its value, the limit and the way out.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

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
    """Key/value heads (grouped-query attention); default: num_heads."""
    head_dim: Positive | None = None
    """Width of a head; default: dim / num_heads. Must be even (RoPE)."""
    attention: Literal["gqa"] = "gqa"
    """Kind of attention."""
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
    loss_chunk: Positive = 512
    """Tokens whose logits exist at one time."""
    deterministic: bool = False
    """Bitwise reproducible kernels where torch offers them; prints the flags that it sets."""
    max_skipped_steps: Positive = 10
    """Stop (exit code 4) after this many steps in a row with a loss or gradient that is not finite."""
    profile: bool = False
    """Write a profiler trace (and on CUDA a memory snapshot) of steps 6 to 8 into the run folder."""
    engine: Literal["native"] = "native"
    """What runs the model."""


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
    and coordinate; auto: set by the whiteness of successive load errors. Default: RATES of moe/config.py."""
    schedule: Literal["constant", "inverse_sqrt", "inverse", "linear"] = "constant"
    """The rate at step n: u, u/sqrt(n + n0), u/(n + n0), or linear to 0 at freeze_step."""
    schedule_offset: NonNegativeFloat = 0.0
    """n0 of the schedules inverse and inverse_sqrt."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up of the rate."""
    freeze_step: Positive | None = None
    """From this step on the bias stays; default: never (schedule linear: the last step)."""
    frozen_layers: list[NonNegative] = []
    """Layers, counted from 0, whose bias never moves."""
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


class ObserveSection(Section):
    log_every: Positive = 10
    """Steps between logged lines."""
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    """W&B: auto is online when WANDB_API_KEY is set and offline otherwise."""
    wandb_project: str = "alf-moe"
    """W&B project."""
    regret_every: NonNegative = 100
    """Steps between measurements of the regret; 0: never. Always 0 for group-limited routing and assignment baselines, for
    which the theory does not hold."""
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
    optim: OptimSection
    train: TrainSection
    balance: BalanceSection = BalanceSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    observe: ObserveSection = ObserveSection()

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts (L)."""
        return self.model.num_layers - self.model.first_k_dense

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks, when no sequence is padded (T of the balancing window)."""
        return self.train.batch_size * self.data.seq_len


# -- loading ---------------------------------------------------------------------------------------------------------


def load(files: list[str], overrides: list[str] | None = None) -> Config:
    """Read TOML files (later wins, lists replaced whole), apply `--a.b.c value` overrides, validate.

    Raises ConfigError. `run.name` defaults to the stem of the last file.
    """
    if not files:
        raise ConfigError("--config is missing: name at least one TOML file, for example --config configs/tiny.toml")
    tree: dict[str, Any] = {}
    for file in files:
        layer = _read_toml(file)
        _forget_rate(tree, layer)
        _merge(tree, layer)
    parsed = _parse_overrides(overrides or [])
    _forget_rate(
        tree, {"balance": {path[1]: value for path, value in parsed if path[0] == "balance" and len(path) == 2}}
    )
    for path, value in parsed:
        _set(tree, path, value)
    if isinstance(run := tree.setdefault("run", {}), dict):
        run.setdefault("name", Path(files[-1]).stem)
    return validate(tree)


def validate(tree: dict[str, Any]) -> Config:
    """Build the schema from plain nested dicts; every problem becomes a one-sentence ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error)) from None


def _read_toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {file} does not exist: name a TOML file, for example configs/tiny.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read ({error}): name a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {file} is not valid TOML ({error}): correct that line") from None


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _forget_rate(tree: dict[str, Any], layer: dict[str, Any]) -> None:
    # A rate is meant for its method: a later file or override that names another method starts from that one's default.
    old, new = tree.get("balance"), layer.get("balance")
    if isinstance(old, dict) and isinstance(new, dict) and new.get("method", old.get("method")) != old.get("method"):
        old.pop("rate", None)


def _parse_overrides(words: list[str]) -> list[tuple[list[str], Any]]:
    # Parsed here rather than by tyro, whose errors are boxes of several lines and whose unions of sections are
    # sub-commands: values are TOML values and meet the same validation, with the same sentences, as the files.
    found = []
    words = list(words)
    while words:
        flag = words.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError(f"the argument {flag!r} is not understood: overrides look like --train.steps 100")
        flag, equals, text = flag.partition("=")
        if not equals:
            if not words or (words[0].startswith("--") and len(words[0]) > 2):
                raise ConfigError(f"{flag} has no value: write {flag} VALUE (for a switch true or false)")
            text = words.pop(0)
        found.append((flag[2:].replace("-", "_").split("."), _toml_value(text)))
    return found


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text in ("True", "False"):
            return text == "True"
        return text


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{'.'.join(path)} is not a setting: {key} is a value, not a section")
    tree[path[-1]] = value


# -- sentences -------------------------------------------------------------------------------------------------------


def _fields_at(path: tuple[Any, ...]) -> dict[str, FieldInfo]:
    fields = Config.model_fields
    for key in path:
        annotation = fields[key].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return {}
        fields = annotation.model_fields
    return fields


def sentence(error: ValidationError, section: tuple[str, ...] = ()) -> str:
    """The first problem in one sentence; section: where in Config the validated object stands."""
    first = error.errors()[0]
    where, value, context = section + first["loc"], first["input"], first.get("ctx", {})
    if where[:2] == ("balance", "rate"):
        where = where[:2]  # without the branch of the union
    path = ".".join(str(key) for key in where)
    match first["type"]:
        case "extra_forbidden":
            known = list(_fields_at(where[:-1]))
            near = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {'.'.join([*map(str, where[:-1]), near[0]])}?"
                if near
                else f"known here: {', '.join(known)}"
            )
            return f"{path} = {value!r} is not a setting: {hint}"
        case "missing":
            return f"{path} is missing: set it in the configuration file or with --{path} VALUE"
        case "literal_error":
            choices = [c.strip(" '") for c in context["expected"].replace(" or ", ", ").split(",")]
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"{path} = {value!r} is not known{hint}: choose one of {', '.join(choices)}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}[
                first["type"]
            ]
            bound = context.get("gt", context.get("ge", context.get("lt", context.get("le"))))
            return f"{path} = {value!r} is out of range: it must be {sign} {bound:g}"
        case "finite_number":
            return f"{path} = {value!r} is not finite: give a number"
        case (
            "int_type"
            | "float_type"
            | "bool_type"
            | "string_type"
            | "dict_type"
            | "model_type"
            | "model_attributes_type"
        ):
            kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text in quotes"}
            wanted = kind.get(first["type"].removesuffix("_type"), "a section with settings of its own")
            return f"{path} = {value!r} has the wrong type: it must be {wanted}"
        case _:
            return f"{path} = {value!r} is refused: {first['msg'][0].lower()}{first['msg'][1:]}"


# -- resolve ---------------------------------------------------------------------------------------------------------


def resolve(config: Config, world_size: int = 1, cuda: bool = False) -> Config:
    """Fill in every derived setting and check every limit between settings; pure, called once after the last override.

    Raises ConfigError. The result is what is written to the run folder's config.toml.
    """
    _check_model(config)
    _check_ranks(config, world_size)
    _check_steps(config)
    _check_balance(config)
    _check_assignment(config, world_size)
    m, t, b, o = config.model, config.train, config.balance, config.observe
    in_theory = m.group_top_k >= m.num_groups and b.method not in ASSIGNMENTS
    return config.model_copy(
        update={
            "model": m.model_copy(
                update={
                    "num_kv_heads": m.num_kv_heads or m.num_heads,
                    "head_dim": m.head_dim or m.dim // m.num_heads,
                    "dense_hidden_dim": m.dense_hidden_dim or (m.top_k + m.num_shared_experts) * m.expert_hidden_dim,
                }
            ),
            "train": t.model_copy(
                update={
                    "micro_batch_size": t.micro_batch_size or t.batch_size // world_size,
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


def _check_ranks(config: Config, world_size: int) -> None:
    ep, experts = config.parallel.ep, config.model.num_experts
    _require(
        world_size % ep == 0,
        f"parallel.ep = {ep} does not divide the {world_size} ranks: start a multiple of {ep} processes "
        f"(make train NPROC={ep}) or set parallel.ep to a divisor of {world_size}",
    )
    _require(
        experts % ep == 0,
        f"parallel.ep = {ep} does not divide model.num_experts = {experts}: choose a divisor of {experts}",
    )
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    _require(
        batch % world_size == 0,
        f"train.batch_size = {batch} is not divisible by the {world_size} ranks: set it to a multiple of {world_size}",
    )
    _require(
        micro is None or (batch // world_size) % micro == 0,
        f"train.micro_batch_size = {micro} does not divide the {batch // world_size} sequences of a rank "
        f"(train.batch_size = {batch} over {world_size} ranks): choose a divisor of {batch // world_size}",
    )


def _check_steps(config: Config) -> None:
    o, steps = config.optim, config.train.steps
    _require(
        o.warmup_steps <= steps,
        f"optim.warmup_steps = {o.warmup_steps} is more than train.steps = {steps}: lower it or raise train.steps",
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
        not (b.method in ("quantile", "bip", "coordinate") and isinstance(b.rate, float) and b.rate > 2),
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
