"""Exported pipelines, loaded by diffusers in a process without imm_scale, against our own nets and samples."""

import ast
import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imm_scale import build, rng, sampling
from imm_scale.checkpoint import export, pipeline_folder
from imm_scale.checkpoint.origin import Origin
from imm_scale.config.schema import SamplingConfig
from imm_scale.data.manifest import Codec
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.eulerian import EulerianConfig
from imm_scale.methods.eulerian.guidance import TrainingGuidanceConfig
from imm_scale.methods.flow_map import PARAMETERIZATIONS, SECOND_TIMES, TIME_INPUTS, FlowMapConfig
from imm_scale.methods.flow_matching import FlowMatching, FlowMatchingConfig
from imm_scale.methods.imm import ImmConfig
from imm_scale.methods.probability_path import TRAJECTORIES
from imm_scale.models.dit import DiTConfig
from imm_scale.registry import METHODS, register_method
from imm_scale.sampling.draw import plan_of
from imm_scale.sampling.job import Model
from tests import ranks
from tests.small_vae import save_small_vae

ELSEWHERE = Path(__file__).with_name("draw_elsewhere.py")
# Both sides compute the net in fp32, on samples of size 1: what is left is the order of its sums.
CLOSE = 1e-6


def _spec(method: Any, codec: Codec | None = None, **net: Any) -> build.ModelSpec:
    codec = codec or Codec("pixels", "", 8, 1, 1, (0.1,), (0.6,))
    channels = codec.channels
    where = Latents(0.5, (channels, 8, 12), codec, 3, ("a", "b", "c"))
    shape = {"channels": channels, "height": 8, "image_width": 12, "num_classes": 3}
    method = method.resolved("fp32")
    return build.ModelSpec(method, DiTConfig(32, 2, 2, 2, **shape, second_time=method.has_second_time, **net), where)


def _write(folder: Path, spec: build.ModelSpec, seed: int = 0, **how: Any) -> str:
    """A pipeline of weights of which none is 0 and samples are about as large as data."""
    torch.manual_seed(seed)
    state = {key: 0.1 * torch.randn_like(value) for key, value in build.net(spec).model.state_dict().items()}
    export.write(spec, state, str(folder), "diffusers", **how)
    return str(folder)


# --- the net, variant by variant ---


def _variants() -> list[FlowMapConfig]:
    """Every combination that goes together."""
    variants = []
    scales = [(1.0, "t"), (1000.0, "t"), (1.0, "ddpm_step")]
    assert {time_input for _, time_input in scales} == set(TIME_INPUTS)
    for *choice, (scale, time_input) in itertools.product(TRAJECTORIES, PARAMETERIZATIONS, SECOND_TIMES, scales):
        config = FlowMapConfig(*choice, scale, time_input)  # type: ignore[arg-type]
        try:
            config.validate()
        except UserError:
            continue
        variants.append(config)
    return variants


def _both(spec: build.ModelSpec) -> tuple[Any, Any]:
    """Our flow map, and the standalone transformer of its config, with the same random weights."""
    from imm_scale.checkpoint.standalone.flow_map_transformer import FlowMapTransformer

    pipeline_folder.check(spec)
    torch.manual_seed(0)
    ours = build.net(spec).eval()
    theirs = FlowMapTransformer(**json.loads(json.dumps(pipeline_folder.transformer_config(spec)))).eval()
    state = {key: 0.1 * torch.randn_like(value) for key, value in ours.model.state_dict().items()}
    ours.model.load_state_dict(state)
    theirs.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("flow_map", _variants(), ids=lambda c: "-".join(map(str, vars(c).values())))
@pytest.mark.parametrize(
    "net", [{}, {"qk_norm": True, "time_embedding": "fourier", "mlp_ratio": 2.0}], ids=["dit", "qk"]
)
def test_its_transformer_is_our_flow_map(flow_map, net):
    spec = _spec(FlowMatchingConfig(flow_map=flow_map, t_max=0.994), **net)
    ours, theirs = _both(spec)
    x, label = torch.randn(5, 1, 8, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        latest = 0.99 if flow_map.parameterization == "epsilon" else 1.0  # alpha_t is 0 at 1
        for (s, t), scale in itertools.product([(0.0, latest), (0.3, 0.7), (0.5, 0.5), (0.0, 0.0)], (1.0, 1.7)):
            times = (torch.tensor([time], dtype=torch.float64) for time in (s, t))
            torch.testing.assert_close(
                theirs(x, s, t, label, scale), ours(x, *times, label, scale), rtol=CLOSE, atol=CLOSE
            )


def _told(**settings: Any) -> build.ModelSpec:
    flow_map = FlowMapConfig(second_time="t_minus_s", time_scale=1.0)
    guidance = TrainingGuidanceConfig(kind="condition", largest=6.0)
    return _spec(EulerianConfig(flow_map=flow_map, guidance=guidance), guidance=True, **settings)


@pytest.mark.parametrize("time_embedding", ["positional", "fourier"])
def test_its_transformer_is_told_its_guidance(time_embedding):
    spec = _told(time_embedding=time_embedding)
    ours, theirs = _both(spec)
    x, label = torch.randn(5, 1, 8, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    s, t = (torch.tensor([time], dtype=torch.float64) for time in (0.2, 0.9))
    with torch.no_grad():
        for scale, low, high in ((1.0, 0.0, 1.0), (2.0, 0.3, 0.6), (6.0, 0.0, 1.0)):
            told = torch.tensor([[1 - 1 / scale, low, high]], dtype=torch.float64)
            expected = ours(x, s, t, label, guidance=told)
            torch.testing.assert_close(theirs(x, 0.2, 0.9, label, scale, (low, high)), expected, rtol=CLOSE, atol=CLOSE)
    for scale, interval, message in ((7.0, (0.0, 1.0), "from 1 to 6"), (2.0, (0.6, 0.9), "guidance_interval")):
        with pytest.raises(ValueError, match=message):
            theirs(x, 0.2, 0.9, label, scale, interval)


def test_a_net_that_is_told_has_no_guide_elsewhere():
    from imm_scale.checkpoint.standalone.flow_map_transformer import FlowMapTransformer
    from imm_scale.checkpoint.standalone.pipeline import FlowMapPipeline

    told, plain = (
        FlowMapTransformer(**pipeline_folder.transformer_config(spec)) for spec in (_told(), _spec(ImmConfig()))
    )
    for net, guide in ((told, plain), (plain, told)):
        with pytest.raises(ValueError, match="leave guide out"):
            FlowMapPipeline(net, guide=guide)([0])


def test_its_noise_is_ours():
    from imm_scale.checkpoint.standalone.pipeline import numbered_normals

    index = [0, 3, 2**32 + 5]
    for shape, stream in (((1, 8, 8), 0), ((3,), 4)):
        ours = rng.normal(11, "restart", torch.tensor(index), shape, stream)
        # Logarithms and cosines of two libraries may differ in the last bit of fp64, and then of fp32.
        torch.testing.assert_close(numbered_normals(11, "restart", index, shape, stream), ours, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_its_grids_are_ours(trajectory):
    from imm_scale.checkpoint.standalone.flow_map_transformer import FlowMapTransformer
    from imm_scale.checkpoint.standalone.pipeline import time_grid

    parameterization = "simple_edm"
    for method in (
        ImmConfig(flow_map=FlowMapConfig(trajectory, parameterization)),
        FlowMatchingConfig(flow_map=FlowMapConfig(trajectory, parameterization, "none")),
    ):
        spec = _spec(replace(method, t_min=0.006))
        theirs = FlowMapTransformer(**pipeline_folder.transformer_config(spec))
        ours = build.method(spec)
        for kind, steps in itertools.product(("auto", "uniform", "edm", "eta_1.4"), (1, 2, 4, 8)):
            chosen = ours.default_grid(steps) if kind == "auto" else kind
            try:
                expected = ours.grid(chosen, steps, spec.space).tolist()
            except UserError:
                with pytest.raises(ValueError, match=f"grid='{kind}'"):
                    time_grid(theirs, kind, steps)
                continue
            assert time_grid(theirs, kind, steps) == pytest.approx(expected, abs=1e-14)
        assert time_grid(theirs, [0.9, 0.4, 0.0], 2) == [0.9, 0.4, 0.0]
        for wrong in ([0.9, 0.4], [0.4, 0.9, 0.0], [1.2, 0.4, 0.0]):
            with pytest.raises(ValueError, match="times that fall"):
                time_grid(theirs, wrong, 2)


# --- samples, elsewhere ---

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
REMOTE = {"trust_remote_code": True}
Job = dict[str, Any]


def _job(
    name: str, folder: str, vae: str | None = None, guide: str | None = None, load: Job = REMOTE, **call: Any
) -> Job:
    call = {"class_labels": LABELS, **call}
    return {"name": name, "folder": folder, "vae": vae, "guide": guide, "load": load, "call": call}


def _ours(job: Job, vae: str | None = None) -> np.ndarray:
    """What `imm-scale sample` draws of a job."""
    spec, flow_map = export.load_net(job["folder"])
    if job["guide"] is not None:
        flow_map = flow_map.guided_by(export.load_net(job["guide"])[1])
    call = dict(job["call"])
    config = SamplingConfig(
        guidance_scale=call.get("guidance_scale", 1.0),
        guidance_interval=list(call.get("guidance_interval", (0.0, 1.0))),
        sampler=call.get("sampler", "pushforward"),
        grid=call.get("grid", "auto"),
        labels="0-2",
    )
    plan = plan_of(config, spec, call.get("num_inference_steps", 1), len(LABELS), call["seed"])
    z = torch.cat([z for _, _, z in sampling.sample(flow_map, spec, plan)])
    if call.get("output_type") == "latent":
        return z.float().numpy()
    return Model(spec, flow_map, spec.space.artifacts(vae, torch.device("cpu")), "").decode(z).numpy()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, np.ndarray, np.ndarray]]:
    """{name: (job, samples drawn elsewhere, ours)}: one process draws all: diffusers takes seconds to start."""
    root = tmp_path_factory.mktemp("pipelines")
    vae = save_small_vae(root / "autoencoder")
    weights_hash = hashlib.sha256(Path(vae, "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    codec = Codec("vae", weights_hash, 16, 4, 3, (0.1, -0.2, 0.0, 0.3), (0.7, 1.1, 0.9, 1.3))
    imm = _write(root / "imm", _spec(ImmConfig(t_min=0.006)))
    unit = _write(root / "unit", _spec(ImmConfig(), Codec("pixels", "", 8, 1, 1, (0.4,), (0.3,), pixel_range="unit")))
    flow = _write(root / "flow", _spec(FlowMatchingConfig(flow_map=FlowMapConfig(second_time="none"))))
    cosine = ImmConfig(flow_map=FlowMapConfig("vp_cosine", "simple_edm", "t_minus_s"), label_drop=0.0)
    latents = _write(root / "latents", _spec(cosine, codec), vae=vae)
    without = _write(root / "without", _spec(cosine, codec))
    weaker = _write(root / "weaker", _spec(FlowMatchingConfig(flow_map=FlowMapConfig("ot_fm", "identity", "none"))), 1)
    told = _write(root / "told", _told())
    guided = {"guidance_scale": 1.5, "seed": 3, "output_type": "latent"}
    jobs = [
        _job(f"{name} {sampler} {steps}", folder, num_inference_steps=steps, sampler=sampler, **guided)
        for name, folder, samplers in (
            ("imm", imm, ("pushforward", "restart", "pushforward_restart")),
            ("flow", flow, ("pushforward", "heun")),
        )
        for sampler in samplers
        for steps in (1, 2, 4, 8)
    ]
    jobs += [
        _job("interval", imm, num_inference_steps=4, guidance_interval=(0.2, 0.8), **guided),
        _job("told", told, num_inference_steps=2, guidance_interval=(0.4, 0.65), **guided),
        _job("guide", imm, guide=weaker, num_inference_steps=4, guidance_interval=(0.2, 0.8), **guided),
        _job("edm", imm, num_inference_steps=4, grid="edm", **guided),
        _job("unguided", latents, num_inference_steps=2, seed=0, output_type="latent"),
        _job("custom pipeline", imm, load={"custom_pipeline": imm, **REMOTE}, seed=1, output_type="latent"),
        _job("pixels", imm, num_inference_steps=2, seed=0),
        _job("pixels of 0 to 1", unit, num_inference_steps=2, seed=0),
        _job("vae inside", latents, num_inference_steps=2, seed=0),
        _job("vae given", without, vae, num_inference_steps=2, seed=0),
    ]
    index = torch.arange(len(LABELS))
    noise = rng.normal(7, "sample", index, (1, 8, 12))
    jobs.append(_job("noise given", imm, num_inference_steps=2, latents=noise.tolist(), output_type="latent"))
    elsewhere = _draw_elsewhere(root, jobs)
    jobs[-1]["call"] = {"seed": 7, "num_inference_steps": 2, "output_type": "latent"}
    return {job["name"]: (job, elsewhere[job["name"]], _ours(job, vae)) for job in jobs}


def _draw_elsewhere(root: Path, jobs: list[Job]) -> dict[str, np.ndarray]:
    nothing = root / "nothing" / "imm_scale"
    nothing.mkdir(parents=True)
    (nothing / "__init__.py").write_text("raise ImportError('there is no imm_scale here')\n")
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(nothing.parent), "HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ELSEWHERE), str(root / "jobs.json"), str(root / "drawn.npz")]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    with np.load(root / "drawn.npz") as drawn:
        return dict(drawn)


def test_latents_drawn_elsewhere_are_ours(drawn):
    compared = 0
    for name, (job, theirs, ours) in drawn.items():
        if job["call"].get("output_type") == "latent":
            assert theirs.shape == ours.shape
            np.testing.assert_allclose(theirs, ours, rtol=CLOSE, atol=CLOSE, err_msg=name)
            compared += 1
    assert compared == 3 * 4 + 2 * 4 + 7
    sets = [theirs for job, theirs, _ in drawn.values() if theirs.shape == (len(LABELS), 1, 8, 12)]
    distinct = {np.round(samples, 3).tobytes() for samples in sets}
    # In one step the three samplers of IMM are one, and so are flow matching's two; in two pushforward_restart does not
    # come to its restart.
    assert len(distinct) == len(sets) - 4


@pytest.mark.parametrize("name", ["pixels", "pixels of 0 to 1", "vae inside", "vae given"])
def test_images_drawn_elsewhere_are_ours(name, drawn):
    _, theirs, ours = drawn[name]
    ours = ours[..., 0] if ours.shape[-1] == 1 else ours
    assert theirs.dtype == ours.dtype == np.uint8 and theirs.shape == ours.shape
    assert len(np.unique(theirs)) > 20
    # A value near the middle between two grey levels may be rounded either way.
    difference = np.abs(theirs.astype(int) - ours.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


# --- the folder ---


def test_what_is_in_a_folder(tmp_path):
    spec = _spec(ImmConfig())
    origin = Origin("run", 700, 44_800, 0.99)
    folder = _write(tmp_path / "model", spec, origin=origin)
    assert sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()) == [
        "imm_scale.json",
        "model_index.json",
        "pipeline.py",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/flow_map_transformer.py",
    ]
    weights = load_file(f"{folder}/transformer/diffusion_pytorch_model.safetensors")
    read_spec, read = export.read(folder)
    assert read_spec == spec and read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    record = json.loads(Path(folder, "imm_scale.json").read_text())
    assert record["weights"] == {"run": "run", "step": 700, "images_seen": 44_800, "ema": 0.99}


def test_code_outside_the_package_needs_torch_and_diffusers_alone():
    allowed = {"torch", "diffusers", "numpy", *sys.stdlib_module_names}
    for name in ("pipeline.py", "flow_map_transformer.py"):
        tree = ast.parse((Path(pipeline_folder.__file__).parent / "standalone" / name).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        assert {module.partition(".")[0] for module in modules} <= allowed


def test_a_run_s_export_says_which_weights_it_holds(trained, tmp_path):
    file, folder = str(tmp_path / "net.safetensors"), str(tmp_path / "net")
    export.export(trained, file, ema=0.0)
    export.export(file, folder, format="diffusers")
    for source in (file, folder):
        export.read(source, ema=0.0, step=2)
        with pytest.raises(UserError, match=r"holds weights of average 0\.0 alone, not of 0\.99"):
            export.read(source, ema=0.99)
        with pytest.raises(UserError, match=r"holds weights of step 2 alone, not of 1"):
            export.read(source, step=1)
    spec, weights = export.read(trained, ema=0.99)
    export.write(spec, weights, file)
    with pytest.raises(UserError, match=r"does not say which average it holds, 0\.99 was asked for"):
        export.read(file, ema=0.99)


def _refusals() -> list[str]:
    """What is said of models with parts of a plugin, which registers them in this process alone."""
    from tests import points_plugin as points

    class Sideways(FlowMatching):
        def sample(self, net: Any, start: Any, condition: Any, steps: Any) -> Any:
            return start

    register_method("sideways")(Sideways)
    register_method("another_loss")(type("AnotherLoss", (FlowMatching,), {}))
    flow = _spec(FlowMatchingConfig(flow_map=FlowMapConfig(second_time="none")))
    net, space = points.PerceptronArchitecture(2, 3, 8, 1), points.Points((2,), 1.0, 3)
    pipeline_folder.check(
        replace(flow, method=replace(flow.method, name="another_loss"))
    )  # it samples as its base does
    messages = []
    for spec in (
        replace(flow, method=replace(flow.method, name="sideways")),
        replace(flow, net=net),
        build.ModelSpec(points.DenoiserConfig(), net, space),
    ):
        try:
            pipeline_folder.check(spec)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_what_diffusers_cannot_say_is_refused_by_name():
    sideways, perceptron, points = ranks.run(_refusals, 1)[0]
    assert "no code for the method 'sideways', so" in sideways
    assert "no code for the backbone 'perceptron', so" in perceptron
    assert "the backbone 'perceptron' nor for the sample space 'points' nor for the method 'denoiser'" in points
    assert all("a .safetensors file holds any model" in message for message in (sideways, perceptron, points))


def test_a_vae_goes_with_latents_of_its_own(tmp_path):
    vae = save_small_vae(tmp_path / "vae")
    with pytest.raises(UserError, match="draws pixels"):
        _write(tmp_path / "a", _spec(ImmConfig()), vae=vae)
    other = Codec("vae", "0" * 64, 16, 4, 3, (0.0,) * 4, (1.0,) * 4)
    with pytest.raises(UserError, match="use the same weights"):
        _write(tmp_path / "b", _spec(ImmConfig(), other), vae=vae)
    with pytest.raises(UserError, match=r"a \.safetensors file holds no autoencoder"):
        export.check_out("x.safetensors", "safetensors", vae)


def test_a_folder_of_another_model_is_left_alone(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="that imm-scale did not write"):
        _write(tmp_path, _spec(ImmConfig()))
    assert "Stable" in (tmp_path / "model_index.json").read_text()


def test_weights_in_16_bits_keep_the_conditioning_in_fp32():
    from imm_scale.checkpoint.standalone.flow_map_transformer import FlowMapTransformer

    torch.manual_seed(0)
    net = FlowMapTransformer(**pipeline_folder.transformer_config(_spec(ImmConfig()))).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, label = torch.randn(8, 1, 8, 12, dtype=torch.float64), torch.arange(8) % 3
    with torch.no_grad():
        whole = net(x, 0.2, 0.9, label)
        net.to(torch.bfloat16)
        rounded = net(x, 0.2, 0.9, label)
        near, nearer = net.t_embedder(700.0), net.t_embedder(700.001)
    assert rounded.dtype == torch.float64
    assert 0 < float((rounded - whole).std()) < 2e-2 * float((whole - x).std())  # bf16 has 8 bits
    # A step of 1e-6 in t moves each angle by 1e-3 at most, which an input of 8 bits would not show in most of them.
    assert near.dtype == torch.float32 and 0 < float((near - nearer).abs().max()) < 1e-2


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_of_ours_can_be_exported(name):
    """Those that sample a flow map; one that does not must be refused, and say so here."""
    config: Any = METHODS.config(name)()
    if name in ("masked", "next_block"):
        with pytest.raises(UserError, match=f"no code for the method '{name}'"):
            pipeline_folder.check(_spec(config))
    else:
        pipeline_folder.check(_spec(config))


def test_settings_the_code_does_not_know_are_refused(monkeypatch):
    spec = _spec(ImmConfig(), qk_norm=True)
    known = {key: values for key, values in pipeline_folder._NET.items() if key != "qk_norm"}
    monkeypatch.setattr(pipeline_folder, "_NET", known)
    with pytest.raises(UserError, match=r"no code for model\.qk_norm=True, so"):
        pipeline_folder.check(spec)
    monkeypatch.setitem(pipeline_folder._FLOW_MAP, "trajectory", ("vp_cosine",))
    with pytest.raises(UserError, match=r"nor for method\.flow_map\.trajectory=ot_fm, so"):
        pipeline_folder.check(spec)
