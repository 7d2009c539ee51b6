"""Configs: includes, merging, overrides, and what a mistake is answered with."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from imm_scale import config as configs
from imm_scale.choices import MethodConfig, option
from imm_scale.errors import UserError
from imm_scale.registry import METHODS

ROOT = Path(__file__).parents[3]


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_files_merge_left_to_right_after_their_includes_then_overrides(tmp_path):
    _write(tmp_path / "parts" / "base.yaml", "seed: 1\noptimizer:\n  lr: 1e-3\n  eps: 1.0e-6\n")
    first = _write(
        tmp_path / "a.yaml", "include: parts/base.yaml\noptimizer:\n  lr: 2e-3\nema:\n  decays: [0.9, 0.99]\n"
    )
    second = _write(tmp_path / "b.yaml", "ema: {decays: [0.5]}\n")
    loaded = configs.load([first, second], ["seed=7", "run.name=x=y"])
    assert loaded.config.seed == 7
    assert loaded.config.optimizer.lr == 2e-3
    assert loaded.config.optimizer.eps == 1e-6
    assert loaded.config.ema.decays == [0.5]
    assert loaded.config.run.name == "x=y"
    assert loaded.origins["optimizer.lr"] == f"{first}:3"
    assert loaded.origins["seed"] == "command line"


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        (["train.max_step=4"], ["train.max_step", "did you mean train.max_steps?"]),
        (["max_steps=4"], ["'max_steps'", "train.max_steps"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "fast", "float"]),
        (["precision=fp8"], ["precision", "fp8", "bf16"]),
        (["zero.stage=4"], ["zero.stage=4", "[0, 3]"]),
        (["zero=2"], ["zero is a section", "zero.stage"]),
        (["train.global_batch_size=4098"], ["4098", "multiple of 4", "4100"]),
        (["train.micro_batch_size=6"], ["train.micro_batch_size=6", "8"]),
        (["method.flow_map.trajectory=vp_cosine"], ["euler_fm", "ot_fm", "simple_edm"]),
        (["method.name=flow_matching", "method.k=3"], ["method.k", "imm", "not of flow_matching", "leave it out"]),
        (["method.name=imn"], ["'imn'", "did you mean imm?", "flow_matching"]),
        (["model.name=unet"], ["backbone 'unet'", "dit", "plugins="]),
        (["method.kk=3"], ["method.kk", "did you mean method.k?"]),
        (["plugins=[no_such_module]"], ["no_such_module", "PYTHONPATH"]),
        (["method.t_min=0.5", "method.t_max=0.4"], ["0.5", "0.4"]),
        (["method.label_drop=1.0"], ["label_drop=1.0"]),
        (["ema.decays=[1.0]"], ["ema.decays"]),
        (["optimizer.betas=[0.9]"], ["betas", "2 values"]),
        (["zero.stage=0", "zero.offload=optimizer"], ["zero.offload", "zero.stage"]),
        (["train.max_steps=0"], ["train.max_steps=0", "[1, inf)"]),
        (["sampling.steps=[]"], ["sampling.steps"]),
        (["seed=[1"], ["seed=[1", "YAML"]),
        (["train.init_ema=0"], ["train.init_ema=0.0 does nothing without train.init_from"]),
        (["train.init_step=5"], ["train.init_step=5 does nothing without train.init_from"]),
        (["train.init_allow_change=[model]"], ["train.init_allow_change=['model'] does nothing without"]),
        (["train.init_from=x", "train.init_allow_change=[model.head]"], ["'model.head'", "did you mean model.heads?"]),
        (["train.init_from=x", "train.init_ema=1.0"], ["train.init_ema=1.0", "[0, 1)"]),
        (["train.init_from=x", "train.init_step=0"], ["train.init_step=0", "[1, inf)"]),
        (["data.space.std=[0.5,0]"], ["data.space.std=[0.5, 0.0]", "(0, inf)"]),
        (["data.space.mean=[.nan]"], ["data.space.mean", "finite"]),
        (["method.flow_map.parameterization=epsilon", "method.t_max=1"], ["method.t_max=1", "0.994"]),
    ],
)
def test_a_mistake_names_the_value_and_the_remedy(overrides, phrases):
    with pytest.raises(UserError) as caught:
        configs.load([], overrides)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_an_unknown_key_in_a_file_is_found_by_line(tmp_path):
    path = _write(tmp_path / "c.yaml", "seed: 3\ntrain:\n  max_steps: 5\n  checkpoint_evry: 2\n")
    with pytest.raises(
        UserError, match=r"c\.yaml:4: unknown key 'train\.checkpoint_evry'; did you mean train\.checkpoint_every"
    ):
        configs.load([path])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nprecision: fp32\nseed: 2\n", r"a\.yaml:3: seed stands here again, after line 1"),
        ("run:\n  name: a\nseed: 1\nrun:\n  dir: b\n", r"a\.yaml:4: run stands here again, after line 1"),
        ("train:\n  max_steps: 1\n  max_steps: 2\n", r"a\.yaml:3: train\.max_steps stands here again, after line 2"),
        ("zero: {extra: {timers: {a: 1, a: 2}}}\n", r"a\.yaml:1: zero\.extra\.timers\.a stands here again"),
        ("evaluation:\n  metrics:\n    - {name: kernel, name: frechet}\n", r"a\.yaml:3: evaluation\.metrics\.name"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text, said, tmp_path):
    with pytest.raises(UserError, match=said):
        configs.load([_write(tmp_path / "a.yaml", text)])


def test_files_that_cannot_be_used_are_named(tmp_path):
    for path, message in (
        (str(tmp_path / "none.yaml"), "cannot read"),
        (_write(tmp_path / "broken.yaml", "a: [1"), "not valid YAML"),
        (_write(tmp_path / "list.yaml", "- 1\n"), "must be a mapping"),
        (_write(tmp_path / "loop.yaml", "include: loop.yaml\n"), "includes itself"),
    ):
        with pytest.raises(UserError, match=message):
            configs.load([path])


def test_the_resolved_config_reads_back_the_same(tmp_path):
    loaded = configs.load([], ["zero.extra.zero_optimization.reduce_bucket_size=5", "data.latent_shape=[4,32,32]"])
    text = configs.to_yaml(loaded.config)
    assert configs.from_yaml(text) == loaded.config
    assert configs.load([_write(tmp_path / "again.yaml", text)]).config == loaded.config


def test_keys_of_version_0_1_are_read_with_one_line_that_says_so(tmp_path, caplog):
    old = "flow_map:\n  second_time: none\n  sigma_data: 0.25\nobjective:\n  name: flow_matching\n  k: 3\n"
    new = ["method.name=flow_matching", "method.flow_map.second_time=none", "data.space.sigma_data=0.25"]
    loaded = configs.load([_write(tmp_path / "old.yaml", old)], ["flow_map.time_embedding=fourier"])
    assert loaded.config == configs.load([], [*new, "model.time_embedding=fourier"]).config
    assert len(caplog.records) == 1
    warning = "old.yaml:2: flow_map.second_time is read as method.flow_map.second_time, and 4 keys like it"
    assert warning in caplog.text


def test_another_method_replaces_the_keys_of_the_file_below(tmp_path):
    base = _write(tmp_path / "base.yaml", "method:\n  k: 3\n  label_drop: 0.2\n")
    top = _write(tmp_path / "top.yaml", "include: base.yaml\nmethod:\n  name: flow_matching\n")
    method = configs.load([top]).config.method
    assert (method.name, method.label_drop, method.group_size) == ("flow_matching", 0.2, 1)
    beside = _write(tmp_path / "beside.yaml", "method:\n  k: 3\n  name: flow_matching\n")
    with pytest.raises(UserError, match=r"beside\.yaml:2: method\.k is a key of the method imm"):
        configs.load([base, beside])


@pytest.mark.parametrize("word", ["method.k=3", "method.min_gap=null", "objective.min_gap=null", "objective.k=3"])
def test_a_key_that_the_chosen_method_has_not_is_refused_where_it_is_typed(word, tmp_path):
    """However the method was chosen; a file below, or one of version 0.1, may have it."""
    path = _write(tmp_path / "a.yaml", "method:\n  name: flow_matching\n")
    for files, overrides in (([path], [word]), ([], ["method.name=flow_matching", word])):
        with pytest.raises(UserError, match=r"command line: method\.(k|min_gap) is a key of the method imm"):
            configs.load(files, overrides)
    above = _write(tmp_path / "b.yaml", "method:\n  k: 3\n")
    with pytest.raises(UserError, match=r"b\.yaml:2: method\.k is a key of the method imm"):
        configs.load([path, above])
    assert configs.load([above, path]).config.method.name == "flow_matching"


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.load().config.seed = 1  # type: ignore[misc]


def test_every_key_has_a_sentence_and_can_be_explained():
    loaded = configs.load([], ["method.k=11"])
    for key, entry in configs.entries(loaded.config).items():
        assert entry.help.endswith("."), key
        assert entry.help in configs.explain(key, loaded)
    text = configs.explain("method.k", loaded)
    assert "default  12" in text
    assert "current  11  (command line)" in text
    assert "optimizer.eps" in configs.explain("optimizer", loaded)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    configs.load([str(path)])


def test_variants_of_one_config_know_nothing_of_each_other():
    base = configs.load([]).config
    one = configs.changed(base, {"train.max_steps": 7, "ema.decays": [0.5]}, "one")
    two = configs.changed(base, {"seed": 3}, "two")
    assert (one.train.max_steps, one.ema.decays, one.seed) == (7, [0.5], 0)
    assert two == replace(base, seed=3) and base == configs.load([]).config
    two.ema.decays.append(0.1)
    assert (
        configs.changed(base, {"seed": 4}, "three").ema.decays == base.ema.decays == configs.load([]).config.ema.decays
    )


@dataclasses.dataclass(frozen=True)
class _InnerConfig:
    depth: int = option(1, "")


@dataclasses.dataclass(frozen=True)
class _MineConfig(MethodConfig):
    name: str = option("mine", "")
    inner_of_mine: _InnerConfig = dataclasses.field(default_factory=_InnerConfig)


def test_sections_of_a_class_that_is_registered_later_are_known(monkeypatch):
    """What is kept of the sections that there are does not outlive a change of the registry."""
    assert not configs.is_section("method.inner_of_mine")
    with monkeypatch.context() as patch:
        patch.setitem(METHODS._classes, "mine", SimpleNamespace(Config=_MineConfig))
        assert configs.is_section("method.inner_of_mine")
    assert not configs.is_section("method.inner_of_mine")


def test_a_config_shares_no_list_with_the_next_one():
    first = configs.load([], ["seed=1"]).config
    kept = list(first.ema.decays)
    first.ema.decays.append(0.5)
    assert configs.load([], ["seed=1"]).config.ema.decays == kept == configs.Config().ema.decays
