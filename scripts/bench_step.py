"""One training step on the CPU: ours against Hugging Face transformers, the same function with the same weights.

    python scripts/bench_step.py [--repeats 20] [--dtype float32 bfloat16] [--out docs/bench_step.json]

Needs transformers >= 5.23. The model has 10 M parameters and is DeepSeek-V3-like without MLA, so that Glm4MoeForCausalLM is the
same function: sigmoid router with a selection bias, a shared expert, a dense first layer. Losses and gradients are compared
before anything is timed. Arms take turns on the same batch; a step is forward, backward, clipping and fused AdamW. All arms are
in one process, which keeps freed memory as training does.

- ours: the engine of training, with the default balancing rule and its statistics; and with every block compiled;
- transformers with its `eager` and `grouped_mm` experts; in bfloat16 with autocast over float32 weights, as ours keeps them, and$
  with bfloat16 weights, which is less work for its optimizer;
- bare operations: the matrix products (grouped ones with the same loads), attention and cross-entropy of a step alone, forward
  and backward. Norms, routing, sorting and the optimizer are not in it.

Peak memory: every arm in a process of its own, high-water mark of the resident set over three steps less what was resident before
the model. Routing is that of the initial router on random tokens; no balance is forced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Products that one arm has compiled shall not push out those of another: 1,024 are kept by default.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped_gemm import grouped_gemm
from moe.balance import build_balancer
from moe.config import Config, resolve, validate
from moe.model.loss import chunked_cross_entropy
from moe.parallel import Ranks
from moe.train.about import provenance
from moe.train.data import Batch
from moe.train.device import keep_freed_memory
from moe.train.engines.native import NativeEngine

BATCH, SEQ, VOCAB, DIM, LAYERS, HEADS, EXPERTS, TOP_K, HIDDEN, DENSE = 8, 256, 8192, 256, 4, 4, 32, 4, 64, 320
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative, of the loss and of each gradient's norm


def our_config(dtype: str) -> Config:
    """The model as our configuration."""
    model = {"vocab_size": VOCAB, "dim": DIM, "num_layers": LAYERS, "num_heads": HEADS, "first_k_dense": 1}
    model |= {"num_experts": EXPERTS, "top_k": TOP_K, "num_shared_experts": 1, "expert_hidden_dim": HIDDEN}
    model |= {"dense_hidden_dim": DENSE, "init_std": 0.02}
    tree = {
        "run": {"name": "bench"},
        "model": model,
        "data": {"seq_len": SEQ},
        "optim": {"lr": 1e-4, "warmup_steps": 0},
    }
    train = {"steps": 1, "batch_size": BATCH, "compute_dtype": dtype}
    return resolve(validate(tree | {"train": train, "balance": {"method": "coordinate"}}), 1)


def tokens() -> Batch:
    """Random ids."""
    ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


# -- the arms ----------------------------------------------------------------------------------------------------------


class Ours:
    """Our engine and balancer, as the training loop calls them on one rank."""

    def __init__(self, dtype: str, compiled: bool = False):
        config = our_config(dtype)
        self.engine = NativeEngine(config, Ranks(0, 1, torch.device("cpu")), 0)
        self.model = self.engine.model
        self.balancer = build_balancer(config.balance, list(self.model.routers), EXPERTS, TOP_K)
        if compiled:
            for block in self.model.blocks:
                block.compile()

    def backward(self) -> Tensor:
        """Loss of one forward and backward."""
        self.out = self.engine.forward_backward([tokens()])
        return self.out.losses_3[0] / (BATCH * SEQ)

    def step(self) -> None:
        """One optimizer step and the update of the bias."""
        self.backward()
        self.engine.step()
        self.balancer.step(self.out.stats)
        self.balancer.publish(list(self.model.routers.values()))

    def gradients(self) -> dict[str, Tensor]:
        """By our names."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class Theirs:
    """transformers' Glm4MoeForCausalLM with our initial weights."""

    def __init__(self, dtype: str, experts: str, half_weights: bool = False):
        from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

        config = Glm4MoeConfig(
            vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, head_dim=DIM // HEADS, intermediate_size=DENSE, moe_intermediate_size=HIDDEN,
            n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=TOP_K, first_k_dense_replace=1, n_group=1,
            topk_group=1, norm_topk_prob=True, rms_norm_eps=1e-6, tie_word_embeddings=False, use_cache=False,
            max_position_embeddings=SEQ, attn_implementation="sdpa", experts_implementation=experts,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        )  # fmt: skip
        self.model = Glm4MoeForCausalLM(config)
        weights = renamed(dict(Ours(dtype).model.named_parameters()))
        missing, unknown = self.model.load_state_dict(weights, strict=False)
        assert not unknown and all("e_score_correction_bias" in name for name in missing), (missing, unknown)
        self.autocast = dtype == "bfloat16" and not half_weights
        if half_weights:
            self.model.bfloat16()
        decayed = [p for name, p in self.model.named_parameters() if p.ndim >= 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim < 2 or "embed" in name]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def backward(self) -> Tensor:
        """Loss of one forward and backward."""
        inputs, targets = tokens()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(input_ids=inputs).logits
        loss = self.model.loss_function(logits, None, VOCAB, shift_labels=targets)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """One optimizer step."""
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """By their names."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def renamed(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under transformers' names."""
    theirs = {}
    for name, tensor in ours.items():
        tensor = tensor.detach()
        name = name.replace("blocks.", "model.layers.").replace("attention_norm", "input_layernorm")
        name = name.replace("mlp_norm", "post_attention_layernorm").replace("moe.router", "mlp.gate")
        name = name.replace("attention.w", "self_attn.").replace("moe.shared_experts", "mlp.shared_experts")
        for letter in "qkvo":
            name = name.replace(f"self_attn.{letter}.", f"self_attn.{letter}_proj.")
        name = name.replace("moe.experts.w13", "mlp.experts.gate_up_proj").replace(
            "moe.experts.w2", "mlp.experts.down_proj"
        )
        name = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name)
        name = name.replace("head.weight", "lm_head.weight").replace(".w2.weight", ".down_proj.weight")
        if name.endswith(".w13.weight"):
            stem = name.removesuffix(".w13.weight")
            theirs[f"{stem}.gate_proj.weight"], theirs[f"{stem}.up_proj.weight"] = tensor.chunk(2)
        else:
            theirs[name] = tensor
    return theirs


class Bare:
    """The matrix products, attention and cross-entropy of one step, forward and backward, and nothing else."""

    def __init__(self, dtype: str):
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        ours = Ours(dtype)
        ours.backward()
        rows, tokens_E = BATCH * SEQ, ours.out.stats.tokens_per_expert[0]

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape).mul_(0.02).to(kind).requires_grad_()

        def product(inner: int, outer: int) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
            x, w = leaf(rows, inner), leaf(outer, inner)
            return lambda: F.linear(x, w), (x, w)

        def grouped(inner: int, outer: int) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
            x, w = leaf(rows * TOP_K, inner), leaf(EXPERTS, outer, inner)
            return lambda: grouped_gemm(x, w, tokens_E), (x, w)

        def attention() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
            q, k, v = (leaf(BATCH, HEADS, SEQ, DIM // HEADS) for _ in range(3))
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v)

        # Every layer has tensors of its own, as in a step: the next layer does not find the last one's in the cache.
        targets = tokens().targets_BS.reshape(-1)
        self.operations = [product(DIM, DIM) for _ in range(4 * LAYERS)] + [attention() for _ in range(LAYERS)]
        for _ in range(LAYERS - 1):
            self.operations += [grouped(DIM, 2 * HIDDEN), grouped(HIDDEN, DIM)]
            self.operations += [product(DIM, 2 * HIDDEN), product(HIDDEN, DIM)]
        self.operations += [product(DIM, 2 * DENSE), product(DENSE, DIM)]
        h, w = leaf(rows, DIM), torch.randn(VOCAB, DIM).mul_(0.02).requires_grad_()
        chunk = our_config(dtype).train.loss_chunk
        self.operations.append(((lambda: chunked_cross_entropy(h, w, targets, chunk)), (h, w)))
        self.upstream = [torch.ones_like(run()) for run, _ in self.operations]

    def step(self) -> None:
        """Every operation once."""
        for (run, leaves), upstream in zip(self.operations, self.upstream, strict=True):
            torch.autograd.grad(run(), leaves, upstream)


def arms(dtype: str) -> dict[str, Callable[[], Any]]:
    """What competes, by name."""
    found: dict[str, Callable[[], Any]] = {"ours": lambda: Ours(dtype), "ours, compiled": lambda: Ours(dtype, True)}
    for experts in ("eager", "grouped_mm"):
        found[f"transformers {experts}"] = lambda experts=experts: Theirs(dtype, experts)
        if dtype == "bfloat16":
            found[f"transformers {experts}, bfloat16 weights"] = lambda experts=experts: Theirs(dtype, experts, True)
    return found | {"bare operations": lambda: Bare(dtype)}


# -- measuring ---------------------------------------------------------------------------------------------------------


def check(dtype: str, arm: Any, reference: Ours, name: str) -> None:
    """Same loss and gradients as ours. Raises SystemExit: what is not the same function is not timed."""
    loss, expected = float(arm.backward()), float(reference.backward())
    found, wanted = arm.gradients(), reference.gradients()
    wanted = renamed(wanted) if isinstance(arm, Theirs) else wanted
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    worst = max(float((found[n].float() - wanted[n].float()).norm() / wanted[n].float().norm()) for n in wanted)
    print(f"  {name}: loss {loss:.6f} (ours {expected:.6f}), gradients within {worst:.1e}")
    # Gradients of bfloat16 differ by its rounding, which top-k can turn into another choice: only the loss is held to it.
    if abs(loss / expected - 1) > TOLERANCE[dtype] or (dtype == "float32" and worst > 1e-3):
        raise SystemExit(f"{name} is not the same function: nothing is timed")
    for model in (arm.model, reference.model):
        model.zero_grad()


def seconds(built: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Of every arm's step, in turns."""
    found: dict[str, list[float]] = {name: [] for name in built}
    for repeat in range(repeats + 2):
        for name, arm in built.items():
            start = time.perf_counter()
            arm.step()
            if repeat >= 2:
                found[name].append(time.perf_counter() - start)
    return found


def _status(name: str) -> float:
    """MiB, of this process since its exec (ru_maxrss begins at the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def _peak(task: tuple[str, str, int]) -> float:
    dtype, name, threads = task
    torch.set_num_threads(threads)
    keep_freed_memory()
    if name.startswith("transformers"):
        import transformers  # noqa: F401  what the library itself takes is not the model's
    before = _status("VmRSS")
    arm = arms(dtype)[name]()
    for _ in range(3):
        arm.step()
    return _status("VmHWM") - before


def peak_memory(dtype: str, threads: int) -> dict[str, float]:
    """MiB of every arm, each in a fresh process with oneDNN's own setting."""
    os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        names = [name for name in arms(dtype) if name != "bare operations"]
        return dict(zip(names, pool.map(_peak, [(dtype, name, threads) for name in names], chunksize=1), strict=True))


def bench(dtype: str, repeats: int, threads: int) -> dict[str, Any]:
    """Check, time and weigh one dtype; print the table."""
    print(f"\n{dtype}")
    built = {name: make() for name, make in arms(dtype).items()}
    for name, arm in built.items():
        if name != "ours" and not isinstance(arm, Bare):
            check(dtype, arm, built["ours"], name)
    found = seconds(built, repeats)
    memory = peak_memory(dtype, threads)
    rival = min((name for name in found if name.startswith("transformers")), key=lambda name: min(found[name]))
    print(f"  {'':<44} {'ms, minimum':>12} {'median':>9} {'peak MiB':>9}")
    for name, values in found.items():
        weight = f"{memory[name]:9.0f}" if name in memory else ""
        print(f"  {name:<44} {1e3 * min(values):12.1f} {1e3 * statistics.median(values):9.1f} {weight}")
    best = min(min(values) for name, values in found.items() if name.startswith("ours"))
    print(f"  ours against {rival}: {min(found[rival]) / min(found['ours']):.2f} times as fast", end="; ")
    print(
        f"the better of ours: {min(found[rival]) / best:.2f}; bare / ours {min(found['bare operations']) / min(found['ours']):.0%}"
    )
    return {"dtype": dtype, "seconds": {k: [round(x, 5) for x in v] for k, v in found.items()}, "peak_mib": memory}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="append the result to this JSON-lines file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does; all arms are in this process and have it
    import transformers

    parameters = sum(p.numel() for p in Ours("float32").model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {BATCH} x {SEQ} tokens, {options.threads} threads")
    results = [bench(dtype, options.repeats, options.threads) for dtype in options.dtype]
    about = provenance() | {"transformers": transformers.__version__, "threads": options.threads}
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps({"about": about, "results": results}) + "\n")


if __name__ == "__main__":
    main()
