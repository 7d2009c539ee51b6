"""The recipes in configs/ hold the published settings (IMM, Table 5), which stand here as printed in the paper."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from imm_scale import cli
from imm_scale import config as configs
from imm_scale.checkpoint.released.state_dicts import FAMILIES
from imm_scale.models import dit
from imm_scale.planner.flops import forward_multiply_adds
from tests import ranks, small_tokens

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET = {
    "data.latent_shape": [4, 32, 32],
    "data.num_classes": 1000,
    "data.flip": False,
    "precision": "tf32",
    "method.flow_map.trajectory": "ot_fm",
    "method.flow_map.parameterization": "euler_fm",
    "method.flow_map.second_time": "s",
    "data.space.sigma_data": 0.5,
    "method.name": "imm",
    "method.particles": 4,
    "method.kernel": "laplace",
    "method.mapping": "eta",
    "method.k": 12,
    "method.min_gap": 0.0,
    "method.t_min": 0.0,
    "method.t_max": 0.994,
    "method.a": 1.0,
    "method.b": 4.0,
    "method.label_drop": 0.1,
    "method.weight_factors": ["sigmoid", "dlog_snr_dt", "alpha"],
    "model.dropout": 0.0,
    "train.global_batch_size": 4096,
    "train.max_steps": 1_200_000,
    "train.grad_clip": None,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_images": 0,
    "optimizer.schedule": "constant",
    "ema.decays": [0.9999],
}
T_MINUS_S = IMAGENET | {
    "precision": "fp16",
    "method.flow_map.second_time": "t_minus_s",
    "method.min_gap": 1e-4,
    "method.a": 2.0,
}
BF16 = IMAGENET | {"precision": "bf16", "method.min_gap": 1e-4, "train.compile": True}
CIFAR10 = IMAGENET | {
    "data.latent_shape": [3, 32, 32],
    "data.num_classes": 1,
    "data.flip": True,
    "method.flow_map.parameterization": "simple_edm",
    "method.k": 15,
    "method.t_min": 0.006,
    "method.b": 5.0,
    "method.label_drop": 0.0,
    "model.dropout": 0.2,
    "train.max_steps": 400_000,
    "optimizer.name": "radam",
}
# recipe: settings, forward multiply-adds (G), parameters (M)
RECIPES = {
    "imagenet256_dit_s2": (IMAGENET, 6.06, 33),
    "imagenet256_dit_b2": (IMAGENET, 23.01, 130),
    "imagenet256_dit_l2": (IMAGENET, 80.71, 458),
    "imagenet256_dit_xl2": (IMAGENET, 118.64, 675),
    "imagenet256_dit_xl2_ts": (T_MINUS_S, 118.64, 675),
    "imagenet256_dit_xl2_bf16": (BF16, 118.64, 675),
}


@pytest.mark.parametrize("name", [*RECIPES, "cifar10_dit"])
def test_a_recipe_holds_the_published_settings(name):
    expected = CIFAR10 if name == "cifar10_dit" else RECIPES[name][0]
    config = configs.load([str(CONFIGS / f"{name}.yaml")]).config
    values = configs.flatten(config) | {"method.min_gap": config.method.resolved(config.precision).min_gap}
    assert {key: values[key] for key in expected} == expected
    assert values["run.name"] == name


@pytest.mark.parametrize("name", ["imagenet256_dit_s2", "imagenet256_dit_xl2", "cifar10_dit"])
@pytest.mark.parametrize(("precision", "gap"), [("fp32", 0.0), ("tf32", 0.0), ("bf16", 1e-4), ("fp16", 1e-4)])
def test_a_recipe_leaves_the_gap_to_the_precision(name, precision, gap):
    config = configs.load([str(CONFIGS / f"{name}.yaml")], [f"precision={precision}"]).config
    assert config.method.resolved(precision).min_gap == gap


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_the_published_net(name):
    _, multiply_adds, millions = RECIPES[name]
    config = configs.load([str(CONFIGS / f"{name}.yaml")]).config
    net = dit.size_config(config.model.size)
    assert forward_multiply_adds(net) / 1e9 == pytest.approx(multiply_adds, rel=1e-3)
    # Whole millions are printed, and the second time's embedder (0.2 to 1.63 M) is not in them.
    assert -0.5 <= dit.parameter_count(net) / 1e6 - millions <= 0.5 + 1.63


def test_every_recipe_can_be_loaded():
    for path in CONFIGS.glob("*.yaml"):
        configs.load([str(path)])


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_a_recipe_of_fine_tuning_means_what_the_imported_weights_do(family):
    config = configs.load([str(CONFIGS / f"finetune_{family}_xl2.yaml")]).config
    published = FAMILIES[family].flow_map
    assert config.method.flow_map == replace(published, second_time="s")
    assert config.method.t_max == 0.994  # below 1 for epsilon
    space, scale = config.data.space, 0.18215
    assert (space.sigma_data, space.mean, space.std) == (1.0, [0.0] * 4, [1 / scale] * 4)
    assert config.model.size == "DiT-XL/2"


# Sizes of the net and the data, for a run of a moment on one core
SMALL = [
    "precision=fp32",
    "data.latent_shape=[64]",
    "data.vocabulary=2",
    "data.num_classes=10",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "train.global_batch_size=32",
    "train.micro_batch_size=32",
    "train.max_steps=2",
    "train.compile=false",
    "train.holdout_every=2",
    "train.log_every=1",
    "train.peak_flops=1e12",
]
# millions of trainable parameters: 12 T D^2 a block and the tables of tokens, D x V each
TEXTS = {
    "text_masked_small": (12 * 12 * 0.384**2 + 12 * 6 * 0.384 * 0.128, []),
    "text_masked_base": (13 * 12 * 0.768**2 + 12 * 6 * 0.768 * 0.128 + 3 * 0.768 * 32.768, ["method.steps=[1,4]"]),
    "text_mtp_base": ((13 * 12 + 4) * 0.768**2 + 12 * 6 * 0.768 * 0.128 + 3 * 0.768 * 32.768, []),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_of_text_is_planned_for_a_cluster(name, capsys):
    millions, _ = TEXTS[name]
    words = ["--nodes", "4", "--gpus-per-node", "8", "--gpu", "h100-80gb", "--json"]
    assert cli.main(["plan", name, *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["parameters"]["total"] / 1e6 == pytest.approx(millions, rel=0.02)  # biases, norms, tables of bytes


def test_recipes_of_text_train(tmp_path):
    train = small_tokens.binary_digits(tmp_path / "train", last=128)
    held = small_tokens.binary_digits(tmp_path / "held", first=128, last=160)
    data = [f"data.manifest={train}", f"data.holdout_manifest={held}"]
    runs = [
        [str(CONFIGS / f"{name}.yaml"), *SMALL, *more, *data, f"run.dir={tmp_path / name}"]
        for name, (_, more) in TEXTS.items()
    ]
    ranks.train_each(1, runs)
    for name in TEXTS:
        assert json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["holdout_loss"] > 0
