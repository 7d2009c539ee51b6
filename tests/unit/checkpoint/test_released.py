"""The authors' checkpoints: read without running anything in them, mapped to the same function, refused by name."""

import contextlib
import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from imm_scale import build, storage
from imm_scale.checkpoint import export
from imm_scale.checkpoint.released import dit_layout, mapping, unpickler
from imm_scale.data.codec import open_codec
from imm_scale.data.manifest import Codec
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap, FlowMapConfig
from imm_scale.methods.imm import ImmConfig
from imm_scale.models.dit import DiTConfig
from tests import ranks
from tests.small_vae import save_small_vae
from tests.unit.checkpoint import released_files as files
from tests.unit.checkpoint.released_files import binbytes, called, in_a_storage, pickled, short, stack_global

SETTINGS = [
    {"temb_type": "identity", "f_type": "euler_fm"},
    {"temb_type": "stride", "f_type": "euler_fm"},
    {"temb_type": "identity", "f_type": "identity"},
    {"temb_type": "stride", "f_type": "simple_edm", "noise_schedule": "vp_cosine"},
]
LABELS = torch.tensor([0, 4, 2, 5])  # 5 is "no label"


def _flow_map(released: mapping.Released) -> FlowMap:
    flow_map = build.net(released.spec)
    export.put(flow_map, released.weights, "the test")
    return flow_map.eval().requires_grad_(False)


def _noise(count: int) -> Tensor:
    return 0.5 * torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def _one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, files.CLASSES + 1)[:, : files.CLASSES].float()


def _refusal(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        unpickler.load(io.BytesIO(data), "file.pkl")
    return str(caught.value)


@pytest.fixture
def net() -> files.Preconditioner:
    return files.preconditioner()


# The same function


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
def test_it_computes_what_the_released_object_computes(settings, tmp_path):
    net = files.preconditioner(**settings)
    flow_map = _flow_map(mapping.read(files.write(tmp_path / "net.pkl", net)))
    x = _noise(4)
    for s, t in ((0.0, 0.994), (0.3, 0.7), (0.5, 0.5001)):
        times = (torch.tensor([u], dtype=torch.float64) for u in (s, t))
        ours, theirs = flow_map(x, *times, LABELS), net(x, s, t, _one_hot(LABELS))
        # fp32 sums of some hundred terms of order 1, in another order.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        moved = (theirs - x).abs().max()
        assert moved > 0.1 or t - s < 0.01, "the net must matter for this test to mean anything"


def test_guidance_weighs_against_the_last_row_of_the_label_table(net, tmp_path):
    flow_map = _flow_map(mapping.read(files.write(tmp_path / "net.pkl", net)))
    x, s, t, labels = _noise(3), 0.2, 0.9, torch.tensor([1, 2, 3])
    guided = flow_map(x, *(torch.tensor([u], dtype=torch.float64) for u in (s, t)), labels, guidance_scale=1.5)
    nothing = torch.zeros(3, files.CLASSES)
    expected = 1.5 * net(x, s, t, _one_hot(labels)) - 0.5 * net(x, s, t, nothing)  # f is affine in G
    torch.testing.assert_close(guided, expected, rtol=0, atol=2e-5)


def test_the_spec_is_what_the_file_records_and_table_5_adds(tmp_path):
    net = files.preconditioner(temb_type="stride")
    net.T, net.eps, net.sigma_data, net.time_scale = 0.99, 0.006, 0.4, 500
    spec = mapping.read(files.write(tmp_path / "net.pkl", net)).spec
    assert spec.method == ImmConfig(
        flow_map=FlowMapConfig("ot_fm", "euler_fm", "t_minus_s", 500),
        t_min=0.006,
        t_max=0.99,
        label_drop=0.1,
        min_gap=0.0,
    )
    assert (spec.space.sigma_data, spec.space.shape, spec.space.num_classes) == (0.4, (4, 8, 8), 5)
    assert spec.net == DiTConfig(32, 2, 4, 2, channels=4, height=8, image_width=8, num_classes=5)
    mean, std = [0.86488, -0.27787343, 0.21616915, 0.3738409], [4.85503674, 5.31922414, 3.93725398, 3.9870003]
    assert spec.space.codec == Codec("vae", "not recorded", 64, 4, 8, tuple(mean), tuple(std))
    assert build.ModelSpec.from_json(spec.to_json()) == spec


def test_half_precision_weights_become_the_same_numbers_in_fp32(net, tmp_path):
    net.model.blocks.half()
    read = mapping.read(files.write(tmp_path / "net.pkl", net)).weights
    assert {value.dtype for value in read.values()} == {torch.float32}
    assert torch.equal(read["blocks.1.mlp.fc1.weight"], net.model.blocks[1].mlp.fc1.weight.float())


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_training_leftovers_beside_the_net_do_no_harm(protocol, net, tmp_path):
    net._init_kwargs["embedding_kwargs"] = OmegaConf.create({"scale": 1, "list": [1, 2]})
    settings = files.EasyDict(path="x", device=torch.device("cpu"), shape=torch.Size([4, 8]))
    (tmp_path / "net.pkl").write_bytes(files.dump({"ema": net, "dataset_kwargs": settings}, protocol))
    assert len(mapping.read(str(tmp_path / "net.pkl")).weights) == len(list(net.parameters())) - 1


def test_heads_come_from_the_modules_then_from_the_size_table(net, tmp_path):
    del net.model.num_heads
    assert mapping.read(files.write(tmp_path / "net.pkl", net)).spec.net.heads == 4
    for block in net.model.blocks:
        del block.attn.num_heads
    with pytest.raises(UserError, match=r"no num_heads, and a net 32 wide and 2 deep is none of DiT-S, DiT-B"):
        mapping.read(files.write(tmp_path / "net.pkl", net))
    assert dit_layout.heads_of(dit_layout.Network({}, {}), 1152, 28) == 16


def test_it_reads_and_exports_at_any_url(net, tmp_path):
    storage.write_bytes("memory://released/net.pkl", files.dump({"ema": net}))
    released = mapping.read("memory://released/net.pkl")
    export.write(released.spec, released.weights, "memory://released/model", "diffusers")
    spec, read = export.read("memory://released/model")
    assert spec == released.spec
    assert all(torch.equal(read[name], value) for name, value in released.weights.items())


# The command


def test_the_command_writes_a_model_that_works(tmp_path):
    net = files.preconditioner(temb_type="stride")
    source, out = files.write(tmp_path / "net.pkl", net), str(tmp_path / "net.safetensors")
    code, output = ranks.command_and_output("import", source, "--out", out)
    assert code == 0 and out in output and "second_time=t_minus_s, as the file records" in output and "--vae" in output
    spec, flow_map = export.load_net(out)
    assert spec.method.flow_map.second_time == "t_minus_s"
    times = (torch.tensor([u], dtype=torch.float64) for u in (0.1, 0.6))
    torch.testing.assert_close(
        flow_map(_noise(4), *times, LABELS), net(_noise(4), 0.1, 0.6, _one_hot(LABELS)), rtol=0, atol=1e-5
    )
    code, output = ranks.command_and_output("import", source, "--out", out, "--second-time", "s")
    assert code == 0 and "second_time=s, as given; the file records temb_type='stride'" in output
    assert export.read(out)[0].method.flow_map.second_time == "s"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nowhere.pkl", "--out", "OUT/x.safetensors"], "/nowhere.pkl does not exist"),
        (["OUT", "--out", "OUT/x.safetensors"], "is a folder"),
        (["OUT/net.pkl", "--out", "OUT/x.bin"], "must end in .safetensors"),
        (["OUT/net.pkl", "--out", "OUT/x.safetensors", "--vae", "/nowhere"], "/nowhere"),
        (["OUT/text.pkl", "--out", "OUT/x.safetensors"], "text.pkl is not a whole pickle"),
        (["OUT/empty.pkl", "--out", "OUT/x.safetensors"], "empty.pkl is not a whole pickle"),
    ],
)
def test_the_command_refuses(argv, message, net, tmp_path):
    files.write(tmp_path / "net.pkl", net)
    (tmp_path / "text.pkl").write_text("hello, this is no pickle")
    (tmp_path / "empty.pkl").write_bytes(b"")
    code, printed = ranks.command_and_output("import", *(word.replace("OUT", str(tmp_path)) for word in argv))
    assert code == 2 and message in printed and "Traceback" not in printed
    assert not (tmp_path / "x.safetensors").exists()


def test_the_autoencoder_is_recorded_when_it_is_named(net, tmp_path):
    source, out = files.write(tmp_path / "net.pkl", net), str(tmp_path / "net.safetensors")
    vae = save_small_vae(tmp_path / "vae", blocks=4)
    assert ranks.command_and_output("import", source, "--out", out, "--vae", vae)[0] == 0
    spec, _ = export.read(out)
    assert len(spec.space.codec.weights_hash) == 64
    assert open_codec(spec.space.codec, vae).factor == 8
    for folder in (vae, None):
        with pytest.raises(UserError, match=r"not recorded.*import the net again with --vae FOLDER"):
            open_codec(mapping.read(source).spec.space.codec, folder)
    code, output = ranks.command_and_output("import", source, "--out", out, "--vae", save_small_vae(tmp_path / "other"))
    assert code == 2 and "a factor of 2" in output and "sd-vae-ft-ema" in output


# What does not fit is refused by name


def _unlike(net: files.Preconditioner, change: str) -> None:
    model = net.model
    changes: dict[str, Any] = {
        "leftover weight": lambda: model.blocks[1].attn.register_parameter("extra", nn.Parameter(torch.ones(2))),
        "leftover module": lambda: setattr(model.blocks[0].attn, "q_norm", nn.LayerNorm(8)),
        "leftover buffer": lambda: model.t_embedder.register_buffer("freqs", torch.ones(128)),
        "weight outside": lambda: net.register_buffer("logvar", torch.ones(3)),
        "second model": lambda: setattr(net, "teacher", nn.Linear(1, 1)),
        "missing weight": lambda: setattr(model.blocks[0].mlp.fc2, "bias", None),
        "no s-embedder": lambda: delattr(model, "s_embedder"),
        "no blocks": lambda: setattr(model, "blocks", nn.ModuleList()),
        "label rows": lambda: setattr(model.y_embedder, "embedding_table", nn.Embedding(7, 32)),
        "learned sigma": lambda: setattr(model.final_layer, "linear", nn.Linear(32, 32)),
        "integer weight": lambda: setattr(model.final_layer.linear.bias, "data", torch.ones(16, dtype=torch.int64)),
        "positions": lambda: model.pos_embed.data[0, 3, 5].add_(2e-6),
        "rows first": lambda: model.pos_embed.data.copy_(torch.roll(model.pos_embed.data, 16, 2)),
        "positions are nan": lambda: model.pos_embed.data.fill_(torch.nan),
        "unlike heads": lambda: setattr(model.blocks[1].attn, "num_heads", 8),
        "tensor heads": lambda: setattr(model.blocks[1].attn, "num_heads", torch.ones(1)),
        "activation": lambda: setattr(model.blocks[1].mlp.act, "approximate", "none"),
        "frequencies": lambda: setattr(model.t_embedder, "embedding_type", "fourier"),
        "norm": lambda: setattr(model.final_layer.norm_final, "eps", 1e-5),
        "flow type": lambda: setattr(net, "f_type", "euler"),
        "schedule": lambda: setattr(net, "noise_schedule", ["fm"]),
        "schedule and flow": lambda: setattr(net, "noise_schedule", "vp_cosine"),
        "time embedding": lambda: setattr(net, "temb_type", None),
        "no time embedding": lambda: delattr(net, "temb_type"),
        "nan": lambda: setattr(net, "sigma_data", float("nan")),
        "true": lambda: setattr(net, "T", True),
        "huge": lambda: setattr(net, "eps", 2**63),
        "resolution": lambda: setattr(net, "img_resolution", 32),
    }
    changes[change]()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("leftover weight", "'blocks.1.attn.extra'"),
        ("leftover module", "'blocks.0.attn.q_norm."),
        ("leftover buffer", "'t_embedder.freqs'"),
        ("weight outside", "'logvar'"),
        ("second model", "one `model`"),
        ("missing weight", "blocks.0.mlp.fc2.bias"),
        ("no s-embedder", "s_embedder.mlp.0.bias"),
        ("no blocks", "blocks.0.mlp.fc1.weight"),
        ("label rows", "label_dim=5, its weights are of 6"),
        ("learned sigma", "final_layer.linear.bias is torch.float32 [32], needed: [16]"),
        ("integer weight", "final_layer.linear.bias is torch.int64"),
        ("positions", "pos_embed"),
        ("rows first", "pos_embed"),
        ("positions are nan", "pos_embed"),
        ("unlike heads", "num_heads"),
        ("tensor heads", "num_heads=a Tensor"),
        ("activation", "blocks.1.mlp.act.approximate='none'; this net has 'tanh' only"),
        ("frequencies", "t_embedder.embedding_type='fourier'"),
        ("norm", "final_layer.norm_final.eps=1e-05"),
        ("flow type", "f_type='euler'; known are identity, simple_edm, euler_fm"),
        ("schedule", "noise_schedule=a list; known are fm, vp_cosine"),
        ("schedule and flow", "needs trajectory 'ot_fm'"),
        ("time embedding", "temb_type=None; known are identity, stride"),
        ("no time embedding", "--second-time s or --second-time t_minus_s"),
        ("nan", "sigma_data=nan"),
        ("true", "T=True"),
        ("huge", "eps=9223372036854775808"),
        ("resolution", "img_resolution=32, its weights are of 8"),
    ],
)
def test_an_unlike_net_is_refused_by_name(change, name, net, tmp_path):
    _unlike(net, change)
    with pytest.raises(UserError) as caught:
        mapping.read(files.write(tmp_path / "net.pkl", net))
    assert name in str(caught.value) and "net.pkl" in str(caught.value)


@pytest.mark.parametrize("document", [[1], {"ema": 1}, {"net": 1}, {"ema": {"model": 1}}, nn.Linear(1, 1)])
def test_a_pickle_of_something_else_is_refused(document, tmp_path):
    (tmp_path / "other.pkl").write_bytes(files.dump(document))
    with pytest.raises(UserError, match=r"other\.pkl is no checkpoint this importer knows"):
        mapping.read(str(tmp_path / "other.pkl"))


def test_a_module_in_itself_or_on_countless_paths_is_refused(net, tmp_path):
    net.model.blocks[0].attn.itself = net.model
    with pytest.raises(UserError, match="nested over 16 deep"):
        mapping.read(files.write(tmp_path / "net.pkl", net))
    net = files.preconditioner()
    for _ in range(14):  # 2^14 paths from 14 modules
        holder = nn.Identity()
        holder.left = holder.right = getattr(net.model, "end", nn.Identity())
        net.model.end = holder
    with pytest.raises(UserError, match="over 5000 modules"):
        mapping.read(files.write(tmp_path / "net.pkl", net))


# Hostile files

SYSTEM = stack_global("posix", "system")


def _hostile(canary: Path) -> dict[str, tuple[bytes, str]]:
    """name: (pickle that would write the canary if anything ran, what the refusal must name)"""
    command = short(f"touch {canary}")
    write = short(f"open({str(canary)!r}, 'w')")
    linear = stack_global("torch.nn.modules.linear", "Linear")
    empty = pickled(called(linear))[2:-1]
    return {
        "system by REDUCE": (pickled(called(SYSTEM, command)), "'posix.system'"),
        "os.system": (pickled(called(stack_global("os", "system"), command)), "'os.system'"),
        "eval by GLOBAL": (b"\x80\x02" + called(b"cbuiltins\neval\n", write) + b".", "'builtins.eval'"),
        "Python 2's eval": (b"\x80\x02" + called(b"c__builtin__\neval\n", write) + b".", "'builtins.eval'"),
        "eval by STACK_GLOBAL": (pickled(called(stack_global("builtins", "eval"), write)), "'builtins.eval'"),
        "by INST": (b"\x80\x02(" + command + b"iposix\nsystem\n.", "INST 'posix.system'"),
        "by OBJ": (b"\x80\x02(" + SYSTEM + command + b"o.", "'posix.system'"),
        "an allowed name by OBJ": (pickled(b"(", linear, command, b"o"), "OBJ"),
        "inside a storage": (in_a_storage(called(b"cposix\nsystem\n", command)), "'posix.system' inside"),
        "STACK_GLOBAL in a storage": (in_a_storage(called(SYSTEM, command)), "STACK_GLOBAL inside"),
        "INST in a storage": (in_a_storage(b"(" + command + b"iposix\nsystem\n"), "'posix.system' inside"),
        "dotted through a module": (
            pickled(called(stack_global("torch.nn.modules.module", "torch.os.system"), command)),
            "'torch.nn.modules.module.torch.os.system'",
        ),
        "dotted through an allowed one": (
            pickled(called(stack_global("collections", "OrderedDict.__init__.__globals__"), command)),
            "'collections.OrderedDict.__init__.__globals__'",
        ),
        "getattr": (pickled(called(stack_global("builtins", "getattr"), linear, short("x"))), "'builtins.getattr'"),
        "torch.load": (pickled(called(stack_global("torch.serialization", "load"), command)), "'torch.serialization"),
        "persistent id": (pickled(short("posix"), b"Q"), "BINPERSID"),
        "persistent id as text": (b"\x80\x02Pposix.system\n.", "PERSID 'posix.system'"),
        "extension code": (b"\x80\x02\x82\x01.", "EXT1"),
        "buffers": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "NEWOBJ_EX": (pickled(linear, b")}\x92"), "NEWOBJ_EX"),
        "BUILD on a class": (pickled(linear, b"}", short("__setstate__"), SYSTEM, b"sb"), "'posix.system'"),
        "BUILD of a name": (pickled(linear, b"}", short("a"), b"K\x01sb"), "no Record"),
        "BUILD with slots": (pickled(empty, b"}}", short("__class__"), linear, b"s\x86b"), "no dict"),
        "BUILD on a dict": (pickled(b"}}", short("items"), linear, b"sb"), "no Record"),
        "BUILD on an OrderedDict": (
            pickled(called(stack_global("collections", "OrderedDict")), b"}", short("items"), linear, b"sb"),
            "no Record",
        ),
        "BUILD twice": (pickled(empty, b"}", short("a"), b"Nsb}", short("b"), b"Nsb"), "twice"),
        "calling a number": (pickled(b"K\x01)R"), "no Name"),
        "calling what was called": (pickled(called(linear), b")R"), "no Name"),
        "a tuple as key": (pickled(b"})", b"\x85" * 100_000, b"Ns"), "a dict key"),
        "a tuple in a set": (pickled(b"\x8f()", b"\x85" * 100_000, b"\x90"), "a set element"),
        "a set of tuples": (pickled(called(stack_global("builtins", "set"), b"](N\x85e")), "a set element"),
        "bytes that are no storage": (
            pickled(called(stack_global("torch.storage", "_load_from_bytes"), binbytes(b"PK\x03\x04zip"))),
            "not a whole pickle",
        ),
        "no storage in the bytes": (in_a_storage(b"N"), "without a type"),
        "a long integer": (pickled(b"\x8a\x10" + b"\x7f" * 16), "64 bits"),
        "a length beyond the file": (pickled(b"\x8e" + b"\xff" * 6 + b"\0\0", b"x"), "ends too early"),
        "recalls nothing": (pickled(b"h\x05"), "recalls"),
        "no mark": (pickled(b"t"), "no mark"),
        "nothing to pop": (b"\x80\x04.", "not a sound pickle"),
        "odd items": (pickled(b"}(Nu"), "a key without a value"),
        "persistent without state": (
            pickled(called(stack_global("torch_utils.persistence", "_reconstruct_persistent_obj"), b"}")),
            "class_name or state",
        ),
    }


@pytest.mark.parametrize("case", _hostile(Path("canary")))
def test_a_hostile_pickle_is_refused_and_nothing_runs(case, tmp_path):
    data, name = _hostile(tmp_path / "canary")[case]
    message = _refusal(data)
    assert name in message and "nothing in it was run" in message
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "case",
    [
        *("system by REDUCE", "os.system", "eval by GLOBAL", "Python 2's eval", "eval by STACK_GLOBAL"),
        *("by INST", "by OBJ", "inside a storage", "INST in a storage", "dotted through a module"),
    ],
)
def test_the_stock_unpickler_would_have_run_it(case, tmp_path):
    with contextlib.suppress(AssertionError, EOFError, TypeError):  # what the rest of the file makes of the result
        pickle.loads(_hostile(tmp_path / "canary")[case][0])  # noqa: S301 - it touches a file in tmp_path
    assert (tmp_path / "canary").exists()


def test_instructions_are_counted(monkeypatch):
    monkeypatch.setattr(unpickler, "_MAX_INSTRUCTIONS", 100)
    assert "more than 100 pickle instructions" in _refusal(pickled(b"N0" * 50, b"N"))
    assert "more than 1000 pickle instructions" in _refusal(in_a_storage(b"N0" * 500 + b"N"))


def test_a_memo_of_any_size_costs_nothing():
    # The stock unpickler allocates room for every index below this one: 34 GB.
    assert unpickler.load(io.BytesIO(b"\x80\x02Nr\xff\xff\xff\x7f."), "file.pkl") is None


def test_the_source_text_of_a_class_is_not_executed(net, tmp_path):
    net.source = f"open({str(tmp_path / 'canary')!r}, 'w')"
    mapping.read(files.write(tmp_path / "net.pkl", net))
    assert not (tmp_path / "canary").exists()


def test_attributes_with_dangerous_names_are_data(net, tmp_path):
    linear = net.model.final_layer.linear
    linear.__dict__.update({"__setstate__": "x", "__class__": "y", "__reduce__": "z", "state": 1, "args": 2})
    assert mapping.read(files.write(tmp_path / "net.pkl", net)).spec.net.depth == 2


def test_deeply_nested_data_are_read_and_dropped_without_recursion():
    data = pickled(b"]" * 100_000, b"a" * 99_999)
    unpickler.load(io.BytesIO(data), "file.pkl")


def _tensor_call(storage: bytes, *layout: bytes) -> bytes:
    return pickled(called(stack_global("torch._utils", "_rebuild_tensor_v2"), storage, *layout, b"\x89", b"}"))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("offset", "size", "stride", "name"),
    [
        (
            b"K\x00",
            b"K\x04K\x04\x86",
            b"K\x03K\x01\x86",
            "does not fit",
        ),  # torch's own rebuilding would enlarge the storage
        (b"K\x05", b"K\x04K\x02\x86", b"K\x03K\x01\x86", "does not fit"),
        (b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85", "does not fit"),
        (b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\xff\x85", "does not fit"),
        (b"K\x00", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85", "larger than its storage"),
        (b"K\x00", b"K\x02\x85", b"K\x01K\x01\x86", "does not fit"),
        (b"K\x00", b"N\x85", b"K\x01\x85", "does not fit"),
        (b"K\x00", b"N", b"K\x01\x85", "wrong kind"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(offset, size, stride, name):
    storage = torch.arange(12.0).reshape(4, 3)
    function, (data,) = storage.storage().__reduce__()
    assert function.__name__ == "_load_from_bytes"
    load = called(stack_global("torch.storage", "_load_from_bytes"), binbytes(data))
    sound = unpickler.load(io.BytesIO(_tensor_call(load, b"K\x00", b"K\x04K\x03\x86", b"K\x03K\x01\x86")), "file.pkl")
    assert torch.equal(sound, storage)
    assert name in _refusal(_tensor_call(load, offset, size, stride))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_two_tensors_on_one_storage_are_refused():
    _, (data,) = torch.ones(2).storage().__reduce__()
    load = called(stack_global("torch.storage", "_load_from_bytes"), binbytes(data)) + b"\x94"
    rebuild = stack_global("torch._utils", "_rebuild_tensor")
    tensors = [called(rebuild, storage, b"K\x00", b"K\x02\x85", b"K\x01\x85") for storage in (load, b"h\x00")]
    assert "share one storage" in _refusal(pickled(*tensors, b"\x86"))


def test_a_damaged_file_is_refused_or_read_but_never_a_surprise(net, tmp_path):
    data = files.dump({"ema": net.model.x_embedder, "state": {"a": [1, 2.5, None, True], "b": {"c"}}})
    draw = random.Random(0)
    for _ in range(400):
        damaged = bytearray(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
        for _ in range(draw.randrange(4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            unpickler.load(io.BytesIO(bytes(damaged)), "file.pkl")
        except UserError:
            continue
    for cut in range(0, len(data), 17):
        assert "file.pkl" in _refusal(data[:cut])


# Exports as folders


def _spec() -> build.ModelSpec:
    return build.ModelSpec(
        ImmConfig().resolved("fp32"),
        DiTConfig(32, 1, 2, 2, channels=1, height=8, image_width=8, num_classes=3),
        Latents(0.5, (1, 8, 8), Codec("pixels", "", 8, 1, 1, (0.1,), (0.3,)), 3, ("a", "b", "c")),
    )


@pytest.fixture
def exported(tmp_path: Path) -> tuple[build.ModelSpec, dict[str, Tensor], str]:
    """A spec, random weights, and the folder they were written to."""
    spec = _spec()
    state = {name: torch.randn_like(value) for name, value in build.net(spec).model.state_dict().items()}
    export.write(spec, state, str(tmp_path / "model"), "diffusers")
    return spec, state, str(tmp_path / "model")


def test_a_folder_loads_back_bit_for_bit(exported):
    spec, state, folder = exported
    read_spec, read = export.read(folder)
    assert read_spec == spec and read.keys() == state.keys()
    assert all(torch.equal(read[name].view(torch.int32), state[name].view(torch.int32)) for name in state)


def test_every_form_exports_to_every_other(exported, tmp_path):
    folder = exported[2]
    file, again = str(tmp_path / "model.safetensors"), str(tmp_path / "again")
    for argv in ((folder, "--out", file), (file, "--out", again, "--format", "diffusers")):
        assert ranks.command_and_output("export", *argv) == (0, f"{argv[2]}\n")
    files = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) == 6
    for name in files:
        assert Path(again, name).read_bytes() == Path(folder, name).read_bytes()


def test_a_folder_samples(exported, tmp_path):
    argv = ["sample", exported[2], "--steps", "2", "--num", "3", "--labels", "0-2", "--batch-size", "4"]
    assert ranks.run(ranks.command, 1, *argv, "--out", str(tmp_path / "pictures")) == [0]
    assert (tmp_path / "pictures" / "steps-2.npz").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"_class_name": "AutoencoderKL"}', "describes no model of imm-scale"),
        ("[1]", "describes no model of imm-scale"),
        ("{", "is not JSON"),
        ('{"_class_name": "ImmScaleFlowMap", "version": 1}', "lacks a field"),
        ('{"_class_name": "ImmScaleFlowMap"}', "lacks a field"),
    ],
)
def test_a_folder_of_something_else_is_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        export.read(str(tmp_path))


@pytest.mark.parametrize(
    ("record", "message"),
    [("{", "is not JSON"), ("[1]", "lacks a field"), ('{"spec": {}}', "lacks a field"), ("{}", "lacks a field")],
)
def test_a_record_that_says_too_little_is_refused(record, message, exported):
    Path(exported[2], "imm_scale.json").write_text(record)
    with pytest.raises(UserError, match=message):
        export.read(exported[2])


def test_folders_of_version_0_1_are_read(exported, tmp_path):
    """A config.json of the spec beside the weights, both at the top."""
    spec, state, _ = exported
    (tmp_path / "old").mkdir()
    config = {"_class_name": "ImmScaleFlowMap", **json.loads(spec.to_json())}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    save_file(state, str(tmp_path / "old" / "diffusion_pytorch_model.safetensors"))
    read_spec, read = export.read(str(tmp_path / "old"))
    assert read_spec == spec and all(torch.equal(read[name], state[name]) for name in state)
    export.export(str(tmp_path / "old"), str(tmp_path / "old"), format="diffusers")
    assert not (tmp_path / "old" / "config.json").exists() and export.read(str(tmp_path / "old"))[0] == spec


def test_a_folder_without_weights_is_refused_by_name(exported):
    Path(exported[2], "transformer", "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors does not exist"):
        export.read(exported[2])


@pytest.mark.parametrize(
    ("out", "format", "message"),
    [
        ("x.bin", "safetensors", "--format diffusers for a folder"),
        ("x.safetensors", "diffusers", "writes a folder"),
        ("run", "diffusers", "is a run folder"),
        ("x", "onnx", "'onnx' is unknown; choose one of safetensors, diffusers"),
    ],
)
def test_an_out_that_does_not_fit_its_format(out, format, message, exported, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=message):
        export.export(exported[2], str(tmp_path / out), format=format)
