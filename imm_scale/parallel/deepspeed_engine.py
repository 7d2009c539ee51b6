"""The optimizer step under DeepSpeed ZeRO, and which slice of every state this rank owns.

The only file that imports deepspeed. The rest of the program sees `Engine`: a step, and named flat fp32 slices.
"""

import gc
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imm_scale import precision
from imm_scale.config.schema import Config
from imm_scale.data.batch import Batch
from imm_scale.data.sample_order import Layout
from imm_scale.methods.base import GroupLosses, Method, concatenated
from imm_scale.models.base import Backbone
from imm_scale.parallel.loss_scale import LossScale
from imm_scale.parallel.param_slice import MOMENTS, ParamSlice
from imm_scale.parallel.zero_config import block_numel, deepspeed_config, halves_gradients


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to; all but the loss are the same on every rank.

    Attributes:
        loss: this rank's share, a detached fp64 scalar: summed over ranks it is the mean over groups.
        grad_norm: the global gradient norm before clipping, inf or nan where a gradient was not finite.
        skipped: the gradient was not finite, and neither weights nor moments nor counters have changed on any rank.
        loss_scale: the factor the step ran with, None but for fp16.
        groups: losses and times of this rank's groups, padded slots included.
    """

    loss: Tensor
    grad_norm: float
    skipped: bool
    loss_scale: float | None
    groups: GroupLosses


class LossModule(nn.Module):
    """The module the engine wraps: a micro-batch in, its share of the loss out, both branches inside."""

    def __init__(self, net: nn.Module, method: Method, seed: int, alignment: int = 1):
        super().__init__()
        self.net = net
        self.method = method
        self.seed = seed
        self.alignment = alignment
        self.groups: GroupLosses | None = None

    def forward(self, x: Tensor, condition: Tensor, ordinal: Tensor, weight: Tensor) -> Tensor:
        """Sum of the real groups' losses (weight 1), fp64 scalar; `groups` keeps those of the last call, detached."""
        alignment = self.alignment if self.training else 1  # held-out batches are of other sizes
        losses = self.method.loss(self.net, Batch(0, x, condition, ordinal, weight, alignment), self.seed)
        self.groups = GroupLosses(losses.loss_G.detach(), losses.t_G.detach(), losses.monitors)
        return (losses.loss_G * weight).sum()


def check_device(config: Config) -> None:
    """Raises UserError for a precision that this machine lacks, or compiled blocks without a compiler."""
    precision.check(config.precision, "precision")
    if config.train.compile and config.zero.stage < 3:
        precision.check_compiler("train.compile")
    elif config.train.compile:
        # DeepSpeed's gathering hooks break the graph at every block: slower than eager, at the recompile limit.
        warnings.warn("train.compile=true is for zero.stage 0 to 2: at stage 3 this run is not compiled", stacklevel=2)


def _optimizer(config: Config, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    o = config.optimizer
    # The learning rate is set before every step; 0 here keeps DeepSpeed's own warm-up steps from moving weights.
    common: dict[str, Any] = {
        "lr": 0.0,
        "betas": (o.betas[0], o.betas[1]),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
    }
    if o.name == "radam":
        return torch.optim.RAdam(parameters, decoupled_weight_decay=True, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)  # on CPU, where offloaded states are, six times as fast


def _square_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of squares of all elements, a scalar added up in fp64."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square().sum()


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's to mend
    # Otherwise the first collective on CPU compiles an extension with g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its Muon, which no config chooses, decorates functions by this, and so loads torch's compiler at every start.
    compiler.compile = lambda: compiler.dummy_decorator
    return deepspeed


_LINEAR = nn.functional.linear  # torch's own


def _forget(net: nn.Module) -> None:
    """Takes a net out of what DeepSpeed's stage 3 keeps for the whole process and never empties."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    ours = set(net.modules())
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module not in ours]
    # An lru_cache on a method, keyed by coordinator and module; DeepSpeed's decorator hides it in a closure.
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
    # Stage 3 leaves one of its own there; in blocks that torch 2.11 compiles later it has no gradients for weights.
    nn.functional.linear = _LINEAR


class Engine:
    """A net under training.

    Args:
        config: the run.
        net: as the method wraps it, with the weights to start from; every rank must hold the same.
        method: the loss.
        layout: of the global batch over ranks and micro-batches.

    Attributes:
        before_update: called in each step when gradients are there and weights and moments are about to change.
    """

    def __init__(
        self,
        config: Config,
        net: Any,
        method: Method,
        layout: Layout,
    ):
        check_device(config)
        deepspeed = _import_deepspeed()
        precision.set_tf32(config.precision == "tf32")
        backbone: Backbone = net.model
        backbone.activation_checkpointing = config.train.activation_checkpointing
        if config.train.compile and config.zero.stage < 3:
            backbone.compile_blocks()
        self._named = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self._named]
        self._shapes = {name: tuple(p.shape) for name, p in self._named}
        settings = deepspeed_config(
            config, dist.get_world_size(), layout.accumulation, layout.samples_per_micro_batch, block_numel(backbone)
        )
        deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
        method.batch_size = layout.global_batch_size
        self._module = LossModule(net, method, config.seed, layout.alignment)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._module,
            optimizer=_optimizer(config, [p for _, p in self._named]),
            config=settings,
            dist_init_required=False,
        )
        self._stage = config.zero.stage
        self._accumulation = layout.accumulation
        self._scale = layout.accumulation * dist.get_world_size() / layout.num_groups
        self._num_groups = layout.num_groups
        self._grad_clip = config.train.grad_clip
        self._offload = config.zero.offload != "none"
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self.before_update: Callable[[], object] = lambda: None
        self._take_over_loss_scaling()
        if self._stage > 0:
            self._take_over_norm()
            if not halves_gradients(config):
                self._sum_in_fp32()
        self.device = self._engine.device
        self._create_moments()
        self.set_optimizer_steps(0)

    # --- stepping ---

    def step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step, or none on any rank where the gradient is not finite."""
        assert len(micro_batches) == self._accumulation
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss_scale = None if self.loss_scale is None else self.loss_scale.value
        scale = self._scale
        if loss_scale is not None and self._stage == 0:
            scale *= loss_scale
        elif loss_scale is not None:
            self._optimizer.override_loss_scale(loss_scale)  # DeepSpeed multiplies, and divides before it clips
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        groups: list[GroupLosses] = []
        for number, batch in enumerate(micro_batches, 1):
            loss = self._forward(batch)
            groups.append(self._module.groups)  # type: ignore[arg-type]
            # DeepSpeed divides by the accumulation and averages over ranks; the loss is a sum over real groups / G.
            self._engine.backward(loss * scale)
            total += loss.detach()
            if self._stage == 0 and number == self._accumulation:
                grad_norm = self._finish_whole_gradients(
                    loss_scale
                )  # here the host waits for the device, and only here
            if number == self._accumulation:
                self.before_update()
            self._engine.step()
        if self._stage > 0:  # DeepSpeed has skipped the step where this is not finite, at every precision
            grad_norm = float(self._engine.get_global_grad_norm())  # on the host since `_global_norm`
        skipped = not math.isfinite(grad_norm)
        if self.loss_scale is not None:
            self.loss_scale.update(skipped)
        together = concatenated(groups)
        return StepResult(total / self._num_groups, grad_norm, skipped, loss_scale, together)

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Sum, a scalar, of a micro-batch's losses under the current weights, without dropout; all ranks call it."""
        self._engine.eval()
        total = self._forward(batch).detach()
        self._engine.train()
        return total

    def _forward(self, batch: Batch) -> Tensor:
        tensors = (batch.x, batch.condition, batch.ordinal, batch.weight)
        return self._engine(*(tensor.to(self.device, non_blocking=True) for tensor in tensors))

    @torch.no_grad()
    def _finish_whole_gradients(self, loss_scale: float | None) -> float:
        """Norm and clipping at stage 0, where every rank holds the summed gradients whole.

        Where the norm is not finite it drops them: the optimizer passes over parameters without a gradient.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if loss_scale is not None:
            torch._foreach_div_(gradients, loss_scale)
        norm = float(_square_norm(gradients).sqrt())
        if not math.isfinite(norm):
            for parameter in self.parameters:
                parameter.grad = None
        elif self._grad_clip is not None and norm > self._grad_clip:
            torch._foreach_mul_(gradients, self._grad_clip / (norm + 1e-6))
        return norm

    def _global_norm(self) -> Tensor:
        """Norm of all ranks' gradients at stages 1 to 3, in host memory: the one value for which a step waits."""
        optimizer = self._optimizer
        if self._offload:  # it has taken the norm of each tensor on its way to the host
            mine = list(optimizer.norm_for_param_grads.values())
        else:
            mine = [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
        square = _square_norm(mine).to(self._engine.device)
        dist.all_reduce(square)
        return square.sqrt().float().cpu()

    def _take_over_norm(self) -> None:
        """DeepSpeed's own makes a copy of every gradient in fp64 and waits for the device up to four times."""
        if self._stage == 3:
            self._optimizer._get_norm_groups = lambda: [self._global_norm()]
        else:
            self._optimizer.scaled_global_norm = self._global_norm

    def _sum_in_fp32(self) -> None:
        """Reduces every gradient in fp32. DeepSpeed reduces in 16 bits what autocast computes in 16 bits.

        Weights are still gathered so at stage 3: they are rounded to what the layer rounds them to in any case.
        """
        self._optimizer.get_param_comm_dtype = lambda parameter: torch.float32
        buckets = self._optimizer.ipg_buckets
        self._optimizer.ipg_buckets = {torch.float32: buckets[torch.float32]}

    def _take_over_loss_scaling(self) -> None:
        """Puts aside the scalers DeepSpeed makes for fp16, see loss_scale.py."""
        self._engine.torch_autocast_z0_gradscaler = None
        if self._stage > 0:
            self._optimizer.torch_autocast_gradscaler = None

    # --- states ---

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self._stage == 0 else self._optimizer.optimizer

    def _flat_parameters(self) -> list[Tensor]:
        """The tensors the base optimizer steps: whole parameters at stage 0, this rank's flat partitions above."""
        if self._stage == 0:
            return [p for _, p in self._named]
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _create_moments(self) -> None:
        """Makes the optimizer's state exist before the first step, so that it can be loaded and saved at any time."""
        state = self._base_optimizer().state
        fused = self._base_optimizer().defaults.get("fused")
        for flat in self._flat_parameters():
            if not state[flat]:
                # Fused kernels read the counter on the device, the others on the host.
                state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
                for moment in MOMENTS:
                    state[flat][moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)

    def set_optimizer_steps(self, steps: int) -> None:
        """Sets Adam's step counter (DeepSpeed may have run a step on zero gradients at start)."""
        for state in self._base_optimizer().state.values():
            state["step"].fill_(float(steps))

    def optimizer_steps(self) -> int:
        """Adam's step counter, in one read: it is kept per tensor, on the device where its kernels are fused."""
        return int(torch.stack([state["step"] for state in self._base_optimizer().state.values()]).max())

    def held_slices(self) -> Iterator[ParamSlice]:
        """Everything this rank steps: at stage 0 whole parameters, above that its own slices."""
        state = self._base_optimizer().state
        for name, parameter in self._named:
            if self._stage == 0:
                tensors = {key: state[parameter][key].view(-1) for key in MOMENTS}
                yield ParamSlice(name, self._shapes[name], 0, {"weight": parameter.data.view(-1), **tensors})
            elif self._stage == 3:
                yield from self._stage3_slices(name, parameter)
            elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
                yield self._partition_slice(name, parameter._hp_mapping)  # type: ignore[attr-defined]

    def _partition_slice(self, name: str, mapping: Any) -> ParamSlice:
        flat = self._flat_parameters()[mapping.param_group_index]
        address, state = mapping.hp_fragment_address, self._base_optimizer().state[flat]
        tensors = {"weight": flat.data, **{key: state[key] for key in MOMENTS}}
        views = {key: tensor.narrow(0, address.start, address.numel) for key, tensor in tensors.items()}
        return ParamSlice(name, self._shapes[name], mapping.lp_fragment_address.start, views)

    def _stage3_slices(self, name: str, parameter: Any) -> Iterator[ParamSlice]:
        """An even split of the flattened parameter; the last ranks' slices end in padding, which is left out.

        DeepSpeed's `safe_get_local_fp32_param` would be a copy where the state is offloaded; these are live.
        """
        group, start, size = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        flat = self._flat_parameters()[group]
        offset = dist.get_rank() * size
        numel = min(size, parameter.ds_numel - offset)
        if numel > 0:
            state = self._base_optimizer().state[flat]
            tensors = {"weight": flat.data, **{key: state[key] for key in MOMENTS}}
            views = {key: tensor.narrow(0, start, numel) for key, tensor in tensors.items()}
            yield ParamSlice(name, self._shapes[name], offset, views)

    def master_slices(self) -> list[ParamSlice]:
        """What this rank saves and averages: over all ranks every element of every parameter once."""
        slices = list(self.held_slices())
        if self._stage > 0:
            return slices
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return [part for shard in slices if (part := shard.even_part(rank, world_size)) is not None]

    def publish_weights(self) -> None:
        """Makes the net compute with the weights of `held_slices`, after these were written to."""
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            for group in range(len(self._flat_parameters())):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)

    def close(self) -> None:
        """Lets go of the net, its optimizer and all of their memory, whoever still holds this object.

        They refer to one another in circles, so that only a collection frees them.
        """
        self._engine.destroy()
        _forget(self._module)
        vars(self).clear()
        gc.collect()
