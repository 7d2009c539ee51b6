"""Which precision networks compute in outside training: the flags of the process, where they hold, and refusals."""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from data_tools import encode
from imm_scale import cli, precision
from imm_scale.data.codec import VAECodec
from imm_scale.errors import UserError
from imm_scale.evaluation import networks
from tests.small_vae import save_small_vae

CPU = torch.device("cpu")


def _flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def torch_defaults() -> Iterator[None]:
    """As a fresh process has them: convolutions in tf32, matrix products not."""
    before = _flags()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _on_gpu(monkeypatch: pytest.MonkeyPatch, bf16: bool = True, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


# --- flags ---


def test_commands_start_without_tf32(capsys):
    for command in ("sample", "evaluate"):
        precision.set_tf32(True)
        assert cli.main([command, "/nowhere"]) == 2
        assert _flags() == (False, False)


def test_data_tools_start_without_tf32(capsys):
    assert encode.main(["--images", "/nowhere", "--out", "/nowhere/out", "--codec", "pixels"]) == 2
    assert _flags() == (False, False)


@pytest.mark.parametrize(
    ("name", "flags"), [("fp32", (False, False)), ("tf32", (True, True)), ("bf16", (False, False))]
)
def test_a_precision_holds_inside_and_the_flags_are_as_before_after_it(name, flags):
    with pytest.raises(ZeroDivisionError), precision.computing(name, CPU):
        assert _flags() == flags
        assert torch.is_autocast_enabled("cpu") == (name == "bf16")
        raise ZeroDivisionError
    assert _flags() == (False, True)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("name", "flags"), [("fp32", (False, False)), ("tf32", (True, True))])
def test_the_autoencoder_computes_in_its_precision_in_any_process(name, flags, tmp_path):
    codec = VAECodec(save_small_vae(tmp_path / "vae"), precision=name)
    seen = set()
    for module in codec._model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: seen.add(_flags()))
    stored = codec.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    assert seen == {flags}
    seen.clear()
    codec.decode(stored[:, :4])
    assert seen == {flags}


def test_feature_networks_compute_in_fp32_in_any_process():
    network = networks.TorchScript.__new__(networks.TorchScript)
    network._device, network._module = CPU, lambda images, scale: (_flags(), scale * images)
    flags, doubled = network._compute(torch.ones(1), {"scale": 2.0})
    assert flags == (False, False)
    assert doubled.item() == 2.0


def test_onnxruntime_takes_the_ranks_own_gpu_without_tf32():
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    gpu = ("CUDAExecutionProvider", {"device_id": 5, "use_tf32": 0})
    assert networks._providers(torch.device("cuda", 5), both) == [gpu, "CPUExecutionProvider"]
    assert networks._providers(CPU, both) == ["CPUExecutionProvider"]
    assert networks._providers(torch.device("cuda", 5), both[1:]) == ["CPUExecutionProvider"]


# --- what a machine computes in ---


def test_a_cpu_refuses_fp16_and_says_that_tf32_is_fp32():
    with pytest.raises(UserError, match=r"sampling\.precision=fp16 needs a GPU.*sampling\.precision=bf16"):
        precision.check("fp16", "sampling.precision")
    with pytest.warns(UserWarning, match="vae_precision=tf32 is a mode of NVIDIA GPUs"):
        precision.check("tf32", "vae_precision")
    precision.check("bf16", "precision")
    precision.check("fp32", "precision")


def test_a_precision_the_card_lacks_is_refused(monkeypatch):
    _on_gpu(monkeypatch, bf16=False, capability=(7, 5))
    for name in ("bf16", "tf32"):
        with pytest.raises(UserError, match=f"key={name}: Some Card has none.*key=fp16"):
            precision.check(name, "key")
    precision.check("fp16", "key")
    precision.check("fp32", "key")
    _on_gpu(monkeypatch)
    for name in ("fp32", "tf32", "bf16", "fp16"):
        precision.check(name, "key")


# --- compilers ---


def test_a_cpu_needs_a_cpp_compiler(monkeypatch):
    precision.check_compiler("train.compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train\.compile=true needs a C\+\+ compiler.*no-such-compiler.*CXX"):
        precision.check_compiler("train.compile")


def test_inductor_would_have_failed_there():
    """The same compiler is what torch would have looked for, in the middle of the first step."""
    from torch._inductor import config, cpp_builder, exc

    assert config.cpp.cxx == (None, "g++") or sys.platform == "darwin"
    cpp_builder.cpp_compiler_search.cache_clear()
    # Not monkeypatch: it would leave the key hidden from every compilation that follows.
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(exc.InvalidCxxCompiler):
        cpp_builder.get_cpp_compiler()
    cpp_builder.cpp_compiler_search.cache_clear()


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch):
    _on_gpu(monkeypatch)
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="compile=true needs triton"):
        precision.check_compiler("compile")
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: name)
    precision.check_compiler("compile")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match=r"C compiler for triton.*no-such-compiler"):
        precision.check_compiler("compile")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no gcc or clang"):
        precision.check_compiler("compile")
