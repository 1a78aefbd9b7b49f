"""The DeepSpeed engine: our model and our expert parallelism, DeepSpeed's backward pass and ZeRO optimizer.

`deepspeed.zero_stage` says what the data-parallel ranks share: nothing (0), the optimizer's state (1), its gradients (2), the
parameters (3). DeepSpeed averages gradients over all ranks, experts too: a loss times the number of ranks makes sums of it.
bfloat16 is the model's own, as in the native engine: parameters stay float32 and are cast where they are used, which DeepSpeed's
bf16 (parameters) and torch_autocast (products) would do to the router as well.

State goes in and out in the native engine's form, so that a run may change engines and layouts between checkpoints.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import (
    groups,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moe.config import Config
from moe.model.experts import Experts, local_tensor
from moe.model.transformer import Transformer
from moe.parallel import Ranks
from moe.train.data import Batch
from moe.train.engines import StepOutput, StepResult, deepspeed_files
from moe.train.engines.accumulate import accumulate
from moe.train.engines.native import sum_of_squares
from moe.train.optim import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
EXPERT = "deepspeed_moe.experts.deepspeed_experts"
LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed allocates its bucket whole


class _SharedExperts(Experts, MoE):
    """Experts that DeepSpeed knows for such: gradients over the ranks that hold copies, norms over all."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already."""

    # DeepSpeed's checkpoints have a file an expert, and find it by this name.

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name, stacked in self.named_parameters():
            for index, expert in enumerate(stacked if keep_vars else stacked.detach()):
                destination[f"{prefix}{EXPERT}.{index}.{name}"] = expert

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, stacked in self.named_parameters():
            experts = [state_dict.pop(f"{prefix}{EXPERT}.{index}.{name}") for index in range(len(stacked))]
            state_dict[prefix + name] = torch.stack(experts)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DeepSpeedEngine:
    """See `moe.train.engines.Engine`."""

    def __init__(self, config: Config, ranks: Ranks, eos_id: int):
        self.config, self.ranks, self.stage = config, ranks, config.deepspeed.zero_stage
        _start(ranks)
        with torch.device(ranks.device):
            self.model = Transformer(config, ranks, eos_id)
        self.model.init_weights(config.run.seed)
        if ranks.ep_mesh is not None:
            self._share_experts(config.parallel.ep)
        self.parameters = dict(self.model.named_parameters())
        optimizer = build_optimizer(self.model, config.optim)
        optimizer.param_groups[:] = self._groups(optimizer.param_groups)
        self.engine: Any  # its annotations leave out what ZeRO adds
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=self._settings())
        self._prepare_moments()

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _share_experts(self, ep: int) -> None:
        """Plain parameters for DTensors, which DeepSpeed cannot flatten, and the marks that it knows experts by."""
        name = f"ep_size_{ep}"
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(ep)
        for module in self.model.modules():
            if not isinstance(module, Experts):
                continue
            module.w13, module.w2 = (nn.Parameter(local_tensor(w).detach().clone()) for w in (module.w13, module.w2))
            for weight in module.parameters():
                _mark(weight, allreduce=False, group_name=name)
                if self.stage == 3:  # refuses the class, and knows experts by these
                    group = groups._get_expert_data_parallel_group(name)
                    _mark(weight, ds_zero_placement_family="autoep_expert", ds_zero_partition_group_name=name)
                    _mark(weight, ds_zero_partition_process_group=group)
            if self.stage < 3:
                module.__class__ = _SharedExperts
                experts = self.config.model.num_experts
                _mark(module, num_experts=experts, num_local_experts=experts // ep, ep_size=ep, expert_group_name=name)

    def _groups(self, param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the optimizer, experts apart."""
        if self.ranks.ep_mesh is None:
            return param_groups
        experts = {id(p) for name, p in self.parameters.items() if ".experts." in name}
        apart = []
        for group in param_groups:
            kinds = {False: [], True: []}
            for parameter in group["params"]:
                kinds[id(parameter) in experts].append(parameter)
            if kinds[False]:
                apart.append({**group, "params": kinds[False], "name": "dense"})
            if kinds[True]:
                apart.append(
                    {**group, "params": kinds[True], "name": f"ep_size_{self.ranks.ep_mesh.size()}", "moe": True}
                )
        return apart

    def _settings(self) -> dict[str, Any]:
        c = self.config
        per_rank, micro = c.train.batch_size // self.ranks.world_size, c.train.micro_batch_size or 1
        bucket = min(LARGEST_BUCKET, sum(p.numel() for p in self.parameters.values()))
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": bucket}
        if c.deepspeed.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.ranks.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": per_rank // micro,
            "gradient_clipping": c.optim.grad_clip if self.stage else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # our AdamW, where the state is
            "steps_per_print": 2**31,
        }

    def _prepare_moments(self) -> None:
        """Zeros, which AdamW would make in its first step: a checkpoint may be loaded before it."""
        for part in self._updated():
            zeros = {key: torch.zeros_like(part, dtype=torch.float32) for key in MOMENTS}
            self._inner.state[part] = {"step": torch.zeros((), device=part.device), **zeros}
        self._find_moments()

    def _find_moments(self) -> None:
        """Let stages 1 and 2 know which part of the flat moments is which parameter's."""
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer if self.stage else self.engine.optimizer

    def _updated(self) -> list[Tensor]:
        """What AdamW updates on this rank: parameters, or flat parts of groups of them."""
        if self.stage == 0:
            return [p for p in self.parameters.values() if p.requires_grad]
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    # -- the step ------------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepOutput:
        world_size = self.ranks.world_size

        def backward(loss: Tensor) -> None:
            self.engine.backward(loss * world_size, scale_wrt_gas=False)

        return accumulate(self.config, self.ranks, micro_batches, self.engine, backward, self._micro_step)

    @contextmanager
    def _micro_step(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.engine.step()  # counts; at a boundary alone it updates

    def step(self) -> StepResult:
        if self.stage == 0:
            return self._plain_step()
        self.engine.step()
        applied = self.engine.was_step_applied()
        return StepResult(float(self.engine.get_global_grad_norm()) if applied else math.nan, applied)

    def _plain_step(self) -> StepResult:
        """Stage 0 in float32: DeepSpeed's clipping counts the experts of its own rank alone, and it skips nothing."""
        dense = sum_of_squares([p for name, p in self.parameters.items() if ".experts." not in name], self.ranks.device)
        experts = sum_of_squares([p for name, p in self.parameters.items() if ".experts." in name], self.ranks.device)
        total = (dense + self.ranks.sum_over_ep(experts)).item()
        norm = math.sqrt(total) if total >= 0 else math.nan
        if not math.isfinite(norm):
            self.discard()
            return StepResult(norm, False)
        if norm > (limit := self.config.optim.grad_clip):
            torch._foreach_mul_([p.grad for p in self.parameters.values() if p.grad is not None], limit / norm)
        self.engine.step()
        return StepResult(norm, True)

    def discard(self) -> None:
        if self.stage == 0:
            self.engine.zero_grad()
            return
        # Gradients are in buffers that only a step clears: one that is not finite is skipped and cleared.
        parameter = next(p for p in self.parameters.values() if p.requires_grad)
        gradient: Any = safe_get_full_grad(parameter)
        safe_set_full_grad(parameter, torch.full_like(gradient, math.nan))
        self.engine.step()
        assert not self.engine.was_step_applied(), "a step that is not finite must be skipped"

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    # -- state ---------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        return {name: self._whole(name, self._weight(p)) for name, p in self.parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        moments: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            for key in MOMENTS:
                moments[f"state.{name}.{key}"] = self._whole(name, self._moment(parameter, key))
            moments[f"state.{name}.step"] = self._steps()[0].clone()
        return {"model": self.weights() | dict(self.model.named_buffers()), "optimizer": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        buffers = dict(self.model.named_buffers())
        for name, value in state["model"].items():
            if name in buffers:
                buffers[name].copy_(value)
            else:
                self._set_weight(self.parameters[name], local_tensor(value))
        for name, value in state["optimizer"].items():
            owner, _, key = name.removeprefix("state.").rpartition(".")
            if key in MOMENTS:
                self._set_moment(self.parameters[owner], key, local_tensor(value))
        (taken,) = {int(value) for name, value in state["optimizer"].items() if name.endswith(".step")}
        for step in self._steps():
            step.fill_(taken)

    def write_files(self, folder: Path, balancer: dict[str, Tensor]) -> bool:
        if self.config.deepspeed.own_files:
            deepspeed_files.write(self.engine, folder, self._about(), balancer, self.ranks)
        return self.config.deepspeed.own_files

    def read_files(self) -> dict[str, Tensor] | None:
        if self.config.deepspeed.start_from is None:
            return None
        path = Path(self.config.deepspeed.start_from)
        param_groups = self.engine.optimizer.param_groups
        own = [{k: v for k, v in group.items() if k != "params"} for group in param_groups]
        balancer = deepspeed_files.read(self.engine, path, self._about(), self.ranks)
        for group, settings in zip(param_groups, own, strict=True):
            group.update(settings)  # the configuration's, not the file's
        self._find_moments()
        return balancer

    def _about(self) -> dict[str, Any]:
        """What DeepSpeed's files fit."""
        c = self.config
        own = {"deepspeed.zero_stage": self.stage, "parallel.ep": c.parallel.ep, "ranks": self.ranks.world_size}
        model = {f"model.{name}": value for name, value in c.model.model_dump().items()}
        return own | {"balance.method": c.balance.method} | model

    def _steps(self) -> list[Tensor]:
        return [self._inner.state[part]["step"] for part in self._updated()]

    def _whole(self, name: str, local: Tensor) -> Tensor:
        mesh = self.ranks.ep_mesh
        if mesh is None or ".experts." not in name:
            return local
        # A copy: what stages a checkpoint copies the storage under a DTensor, and ZeRO's is that of all parameters.
        return DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self.stage == 0:
            return self._inner.state[parameter][key]
        moment: Any = safe_get_full_optimizer_state(parameter, key)
        return moment

    def _set_weight(self, parameter: Any, value: Tensor) -> None:
        if self.stage == 3:
            part = self._part(parameter, value)
            parameter.ds_tensor.data.copy_(part)
            safe_set_local_fp32_param(parameter, part)
            return
        parameter.data.copy_(value)
        if self.stage:
            safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            self._inner.state[parameter][key].copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._part(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    @staticmethod
    def _part(parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a parameter under ZeRO-3, the last one padded."""
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
        part = value.flatten()[rank * size : (rank + 1) * size]
        return nn.functional.pad(part, (0, size - len(part)))


def _start(ranks: Ranks) -> None:
    """DeepSpeed's own view of the ranks, which `join_ranks` has joined."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))  # it insists; torchrun and its launcher set it
    # It calls collectives by names that torch 2.13 deprecates, on every rank in every step.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # a skipped step is said by the loop
    if ranks.device.type == "cpu":
        # Its shared-memory all-reduce would be compiled here, 43 s with c++, to replace gloo's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # one process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _mark(target: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(target, name, value)
