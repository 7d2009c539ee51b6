"""The parts of DeepSpeed that parallel/deepspeed_engine.py leans on without a promise that they stay, each by its name.

After a change of DeepSpeed's minor version: where one of these fails, read the new source before raising the bound in
pyproject.toml.
"""

import inspect
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from deepspeed.runtime import base_optimizer, compiler, engine, torch_autocast
from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3, stage_1_and_2
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import config as timers
from packaging.requirements import Requirement

from tests import ranks

BOTH = stage_1_and_2.DeepSpeedZeroOptimizer
THREE = stage3.DeepSpeedZeroOptimizer_Stage3
# (class, attribute that instances get, or that a method of it reads), as the Engine uses them.
ATTRIBUTES = [
    (BOTH, "single_partition_of_fp32_groups"),
    (BOTH, "averaged_gradients"),
    (BOTH, "norm_for_param_grads"),
    (BOTH, "ipg_buckets"),
    (BOTH, "torch_autocast_gradscaler"),
    (THREE, "fp32_partitioned_groups_flat"),
    (THREE, "averaged_gradients"),
    (THREE, "norm_for_param_grads"),
    (THREE, "ipg_buckets"),
    (THREE, "torch_autocast_gradscaler"),
    (THREE, "grad_position"),
    (THREE, "persistent_parameters"),
    (engine.DeepSpeedEngine, "torch_autocast_z0_gradscaler"),
]


@pytest.mark.parametrize(("owner", "name"), ATTRIBUTES, ids=lambda value: getattr(value, "__name__", value))
def test_attribute(owner, name):
    assert re.search(rf"self\.{name}\b", inspect.getsource(owner)), f"{owner.__name__} has no {name} any more"


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (BOTH, "scaled_global_norm", ["self", "norm_type"]),
        (BOTH, "update_lp_params", ["self"]),
        (BOTH, "override_loss_scale", ["self", "loss_scale"]),
        (THREE, "override_loss_scale", ["self", "loss_scale"]),
        (THREE, "get_param_id", ["self", "param"]),
        (base_optimizer.ZeROOptimizer, "get_param_comm_dtype", ["self", "param"]),
        (engine.DeepSpeedEngine, "get_global_grad_norm", ["self"]),
        (engine.DeepSpeedEngine, "destroy", ["self"]),
    ],
)
def test_method(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_both_stages_take_their_norm_where_the_engine_puts_its_own():
    assert "self.scaled_global_norm()" in inspect.getsource(BOTH.step)
    assert "self._get_norm_groups()" in inspect.getsource(_unwrapped(THREE.step))
    for step in (BOTH.step, _unwrapped(THREE.step)):
        assert "is_invalid_grad_norm(scaled_global_grad_norm)" in inspect.getsource(step), "what skips a step"


@pytest.mark.parametrize("owner", [BOTH, THREE])
def test_both_stages_choose_a_bucket_by_the_type_of_the_parameter(owner):
    source = inspect.getsource(owner)
    assert "self.ipg_buckets[comm_dtype]" in source and "self.get_param_comm_dtype(param)" in source


def test_weights_are_gathered_by_the_type_autocast_gave_them():
    assert torch_autocast.LOWER_PRECISION_SAFE_MODULES[0] is torch.nn.Linear
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert partition_parameters.get_allgather_dtype(parameter, parameter) == torch.float32
    setattr(parameter, torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)
    assert partition_parameters.get_allgather_dtype(parameter, parameter) == torch.bfloat16


def test_what_stage_3_keeps_for_the_whole_process():
    assert isinstance(parameter_offload.FWD_MODULE_STACK, list)
    wrapped = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    assert hasattr(_unwrapped(wrapped), "cache_clear")
    source = inspect.getsource(inspect.getmodule(PartitionedParameterCoordinator))
    assert source.count("lru_cache") == 1, "another cache that may hold a net"


def test_the_throughput_timer_waits_for_nothing_once_it_is_off():
    assert timers.DeepSpeedThroughputTimerConfig().enabled is True
    assert timers.get_timers_config({"timers": {"throughput": {"enabled": False}}}).enabled is False


def test_the_installed_version_is_within_the_bound():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (bound,) = [Requirement(word) for word in project["dependencies"] if word.startswith("deepspeed")]
    assert metadata.version("deepspeed") in bound.specifier
    assert "0.20.0" not in bound.specifier, "raise it when everything above holds there"


def _unwrapped(function):
    """What DeepSpeed's instrument_w_nvtx wraps."""
    return inspect.getclosurevars(function).nonlocals.get("func", function)


def _compiler_after(*argv: str) -> list[str]:
    assert ranks.command("train", *argv) == 0
    return [name for name in sys.modules if name.startswith("torch._inductor.") and name.endswith("lowering")]


def test_a_start_that_compiles_nothing_loads_no_compiler(tiny):
    """One to two seconds and 600 modules of every rank, for the decorators of an optimizer that no config chooses."""
    assert inspect.signature(compiler.compile).parameters == {} and compiler.dummy_decorator(print) is print
    assert ranks.run(_compiler_after, 1, *tiny, "train.max_steps=1", "zero.stage=1") == [[]]
