"""A sweep file: what its cells are, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml

from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.models.dit import DiTConfig
from imm_scale.planner import flops
from imm_scale.planner.estimate import Data
from imm_scale.sweeps import definition
from launchers.sweep import main, plan_table

ROOT = Path(__file__).parents[3]
_BASE = {
    "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 2},
    "data": {"latent_shape": [1, 8, 8], "num_classes": 10},
    "train": {"global_batch_size": 64, "micro_batch_size": 64, "max_steps": 10},
}


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file over a base config of known shapes and returns its path."""

    def _write(name: str = "study", **document) -> str:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(_BASE))
        path = tmp_path / f"{name}.yaml"
        document = {"configs": ["base.yaml"], "folder": str(tmp_path / "out"), **document}
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return str(path)

    return _write


def test_cells_are_the_product_of_all_axes(write):
    sweep = definition.load(
        write(
            settings={"optimizer": {"lr": 2e-4}},
            sizes={"a": {"model.width": 16}, "b": {"model.width": 32}},
            grid={"method.k": [10, 12], "method.particles": [2, 4]},
            variants={"plain": {}, "warm": {"optimizer.warmup_images": 640, "ema.decays": [0.9]}},
            seeds=[3, 4],
        )
    )
    assert len(sweep.cells) == 2 * 2 * 2 * 2 * 2
    assert sweep.factors == ("size", "method.k", "method.particles", "variant", "seed")
    cell = sweep.cell("b-k=12-particles=2-warm-seed4")
    assert (cell.config.model.width, cell.config.method.k, cell.config.method.group_size) == (32, 12, 2)
    assert (cell.config.optimizer.warmup_images, cell.config.ema.decays, cell.config.seed) == (640, [0.9], 4)
    assert cell.config.optimizer.lr == 2e-4
    assert cell.run_dir.endswith("out/runs/b-k=12-particles=2-warm-seed4")
    assert cell.config.wandb.group == "study"


_METHODS = ROOT / "configs/method"


def test_a_variant_may_be_a_file(write):
    presets = {name: {"include": [str(_METHODS / f"{name}.yaml")]} for name in ("meanflow", "soflow")}
    presets["soflow"]["method.schedule_images"] = 640  # which the file leaves open
    sweep = definition.load(write(variants={"imm": {"method.k": 11}, **presets}, budgets={"flops": [1e8]}))
    imm, meanflow, soflow = (cell.config for cell in sweep.cells)
    assert (imm.method.name, imm.method.k) == ("imm", 11)
    assert (meanflow.method.derivative, meanflow.method.times.equal) == ("tangent", 0.75)
    assert (soflow.method.derivative, soflow.method.schedule_images) == ("difference", 640)
    assert meanflow.model == imm.model and meanflow.train.global_batch_size == 64
    # In forward passes an image: 3 + 1; 3 + 1.1 and 3 + 1 on the quarter of samples with s before t, as the micro-batch
    # of 64 is whole strata.
    steps = [config.train.max_steps for config in (imm, meanflow, soflow)]
    forward = sweep.cells[0].forward_flops * 64
    assert steps == [round(1e8 / (forward * units)) for units in (4.0, 3.275, 3.25)]


@pytest.mark.parametrize("files", ["meanflow.yaml", [1]])
def test_files_of_a_variant_are_a_list(write, files):
    with pytest.raises(UserError, match=r"variants\.a\.include=.* must be a list of config files"):
        definition.load(write(variants={"a": {"include": files}}))


def test_a_file_of_a_variant_that_is_not_there(write):
    with pytest.raises(UserError, match=r"variants\.a\.include: .*nowhere\.yaml"):
        definition.load(write(variants={"a": {"include": ["nowhere.yaml"]}}))


def test_steps_follow_from_a_budget(write):
    # 4 forward passes per image: two of each branch's, and a backward pass that counts as two.
    net = DiTConfig(width=32, depth=2, heads=2, patch_size=2, channels=1, height=8, image_width=8, num_classes=10)
    step = 4 * 64 * flops.forward_multiply_adds(net)
    by_flops = definition.load(write("flops", budgets={"flops": [7 * step, 20.4 * step]}))
    assert [cell.config.train.max_steps for cell in by_flops.cells] == [7, 20]
    assert [cell.training_flops for cell in by_flops.cells] == [7 * step, 20 * step]
    by_images = definition.load(write("images", budgets={"images": [640, 6400]}))
    assert [cell.config.train.max_steps for cell in by_images.cells] == [10, 100]
    assert [cell.images for cell in by_images.cells] == [640, 6400]


def test_the_largest_budgets_and_sizes_are_held_out(write):
    sizes = {"large": {"model.width": 32}, "small": {"model.width": 16}}
    sweep = definition.load(write(sizes=sizes, budgets={"images": [6400, 640]}, hold_out={"budgets": 1}))
    assert {cell.name for cell in sweep.cells if cell.held_out} == {"large-images6400-seed0", "small-images6400-seed0"}
    sweep = definition.load(write(sizes=sizes, budgets={"images": [6400, 640]}, hold_out={"sizes": 1}))
    assert {cell.factors["size"] for cell in sweep.cells if cell.held_out} == {"large"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"grid": {"method.kk": [1]}}, "cell kk=1-seed0: unknown key 'method.kk'; did you mean method.k?"),
        (
            {"sizes": {"a": {"model": {"widht": 1}}}},
            "cell a-seed0: unknown key 'model.widht'; did you mean model.width?",
        ),
        ({"gird": {}}, "unknown key 'gird'; did you mean grid?"),
        ({"grid": {"method.k": []}}, "grid.method.k is empty"),
        ({"budgets": {"flops": []}}, "budgets.flops is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"grid": {"method.k": [10, 10]}}, "are the same run"),
        ({"variants": {"a": {"seed": 1}, "b": {"seed": 1}}, "seeds": [2]}, "are the same run"),
        ({"grid": {"method.k": 10}}, "must be a list"),
        ({"budgets": {"flops": ["many"]}}, "'many' must be a number"),
        ({"budgets": {"flops": [1.0]}}, "less than one step"),
        ({"budgets": {"flops": [1.0e9], "images": [1000]}}, "must be in one unit"),
        ({"budgets": {"images": [640]}, "settings": {"train.max_steps": 3}}, "follows from budgets"),
        ({"budgets": {"images": [640]}, "hold_out": {"budgets": 1}}, "must leave some of 1"),
        ({"grid": {"method.particles": [3]}}, "multiple of 3"),
        ({"configs": ["nowhere.yaml"]}, "cannot read config"),
    ],
)
def test_mistakes_are_refused_with_their_place(write, document, message):
    with pytest.raises(UserError) as caught:
        definition.load(write(**document))
    assert message in str(caught.value)
    assert "study.yaml" in str(caught.value)


def test_a_size_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "study.yaml").write_text("sizes:\n  s: {model.width: 8}\n  s: {model.width: 16}\n")
    with pytest.raises(UserError, match=r"study\.yaml:3: sizes\.s stands here again, after line 2"):
        definition.load(str(tmp_path / "study.yaml"))


def test_a_folder_holds_one_sweep(write):
    first = definition.load(write("first", grid={"method.k": [10, 11]}))
    definition.write(first)
    definition.write(first)
    assert definition.load(first.folder) == first
    with pytest.raises(UserError, match="holds the sweep 'first', not 'second'"):
        definition.write(definition.load(write("second", grid={"method.k": [10, 11]})))
    with pytest.raises(UserError, match=r"cell k=10-seed0 has optimizer.lr: 0.0001 -> 0.5"):
        definition.write(definition.load(write("first", settings={"optimizer.lr": 0.5}, grid={"method.k": [10, 11]})))
    # More cells of the same sweep are welcome, and those that were there stay.
    definition.write(definition.load(write("first", grid={"method.k": [11, 12]})))
    assert {cell.name for cell in definition.load(first.folder).cells} == {"k=10-seed0", "k=11-seed0", "k=12-seed0"}


def test_a_folder_may_move(write, tmp_path):
    sweep = definition.load(write(grid={"method.k": [10]}))
    definition.write(sweep)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = definition.load(str(tmp_path / "elsewhere"))
    assert moved.cells[0].run_dir == f"{tmp_path}/elsewhere/runs/k=10-seed0"


def test_values_survive_the_way_into_a_config(write):
    value = "a b; $(touch x) 'quoted' \"é\"\n"
    sweep = definition.load(write(grid={"wandb.project": [value], "optimizer.eps": [1e-12]}))
    definition.write(sweep)
    cell = definition.load(sweep.folder).cells[0]
    assert (cell.config.wandb.project, cell.config.optimizer.eps) == (value, 1e-12)
    assert set(cell.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789=-._")


def test_plan_prints_every_cell_and_the_sum(write, capsys):
    path = write(sizes={"a": {"model.width": 16}, "b": {}}, budgets={"images": [640, 1280]}, hold_out={"budgets": 1})
    assert main(["plan", path]) == 0
    printed = capsys.readouterr().out
    sweep = definition.load(path)
    assert plan_table(sweep) in printed
    assert sum(line.endswith("held out") for line in printed.splitlines()) == 2
    assert f"4 cells, {sum(cell.training_flops for cell in sweep.cells):.3g} training FLOPs" in printed
    assert not Path(sweep.folder).exists()


def test_a_mistake_ends_with_2_and_one_line(write, capsys):
    assert main(["plan", write(grid={"objective.kk": [1]})]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["status", write()]) == 2
    assert "holds no sweep yet: submit" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweep_files_that_ship_are_valid(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def data(manifest, shape, classes, vocabulary=None):
        return Data((1, 8, 8) if vocabulary is None else shape, 10, 640.0, None, vocabulary)

    monkeypatch.setattr(definition, "_data", data)
    sweep = definition.load(str(path))
    assert sweep.description
    assert all(configs.validate(cell.config) is None for cell in sweep.cells)
    assert json.dumps([cell.factors for cell in sweep.cells])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["submit", "SWEEP", "--local", "1", "--time", "1:00"], "--time is for SLURM, and --local 1 runs"),
        (["retry", "SWEEP", "--local", "2", "--at-once", "4"], "--at-once is for SLURM"),
        (["submit", "SWEEP", "--local", "1", "--gpus-per-node", "8"], "--gpus-per-node is for SLURM"),
        (["status", "SWEEP", "--watch", "nan"], "--watch nan must be a number of seconds above 0"),
        (["status", "SWEEP", "--watch", "0"], "--watch 0.0 must be"),
    ],
)
def test_options_that_would_do_nothing_are_refused(write, argv, said, capsys):
    path = write(seeds=[0])
    assert main([path if word == "SWEEP" else word for word in argv]) == 2
    assert said in capsys.readouterr().err
