"""States of cells and the tidy table, from folders written by hand; and what a study says of a known law."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from imm_scale.errors import UserError
from imm_scale.sweeps import definition, results, study
from imm_scale.sweeps.definition import Sweep
from launchers.sweep import main

STEPS = (1, 2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """5 sizes x 4 budgets x 2 seeds, the largest budget held out."""
    tmp_path = tmp_path_factory.mktemp("sweep")
    base = {"model": {"depth": 2, "heads": 2}, "data": {"latent_shape": [1, 8, 8], "num_classes": 10}}
    base["train"] = {"global_batch_size": 64, "micro_batch_size": 64}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    document = {
        "name": "known",
        "folder": str(tmp_path / "out"),
        "configs": ["base.yaml"],
        "sizes": {f"w{width}": {"model.width": width} for width in (16, 24, 40, 64, 96)},
        "budgets": {"flops": [1.0e11, 3.0e11, 9.0e11, 2.7e12]},
        "seeds": [0, 1],
        "hold_out": {"budgets": 1},
    }
    path = tmp_path / "known.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return definition.load(str(path))


@pytest.fixture
def sweep(written: Sweep) -> Iterator[Sweep]:
    """Submitted, but not run."""
    definition.write(written)
    yield written
    shutil.rmtree(written.folder)


def _record(step: int, loss: float = 0.1) -> str:
    return json.dumps({"step": step, "images_seen": 64 * step, "loss": loss, "grad_norm": 1.0, "step_seconds": 0.5})


def _finish(sweep: Sweep, cell: definition.Cell, distance: float, code: str = "c0ffee", calls: int = 1) -> None:
    """What a cell leaves that trained, was measured at two step counts, and got these distances."""
    run, last = Path(cell.run_dir), cell.config.train.max_steps
    (run / "evaluations").mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text(_record(last // 2 or 1) + "\n" + _record(last, 0.2) + "\n")
    entries = [
        {
            "metric": "frechet_latents",
            "steps": steps,
            "function_evaluations": calls * steps,
            "sampler": "pushforward",
            "grid": "uniform",
            "guidance_scale": 1.0,
            "num": 100,
            "values": [distance / steps, distance / steps],
            "mean": distance / steps,
            "std": 0.0,
        }
        for steps in STEPS
    ]
    evaluation = {"schema_version": 2, "step": last, "seconds": 1.0, "results": entries}
    (run / "evaluations" / f"step-{last:08d}-x.json").write_text(json.dumps(evaluation))
    results.write_state(sweep.folder, cell.name, "finished", code=code)


def _law(cell: definition.Cell) -> float:
    return 0.05 + 40.0 / cell.parameters**0.6 + 300.0 / cell.images**0.7


def test_every_cell_is_listed_with_its_state(sweep, capsys):
    done, diverged, failed, killed = sweep.cells[:4]
    _finish(sweep, done, 2.0)
    Path(diverged.run_dir).mkdir(parents=True)
    (Path(diverged.run_dir) / "metrics.jsonl").write_text(_record(5) + "\n" + _record(10, float("nan")) + "\n")
    assert results.divergence(results.outcome(sweep, diverged).records) == "loss is nan at step 10"
    results.write_state(sweep.folder, diverged.name, "diverged", "loss is nan at step 10", code="c0ffee")
    results.write_state(sweep.folder, failed.name, "failed", "OSError: disk full", code="c0ffee")
    results.write_state(sweep.folder, killed.name, "running", code="c0ffee")
    assert main(["collect", sweep.folder]) == 0
    printed = capsys.readouterr().out
    table = pq.read_table(Path(sweep.folder) / results.RESULTS).to_pylist()
    assert len(table) == len(sweep.cells) + 1  # one of them has two results
    states = {row["cell"]: row["state"] for row in table}
    assert [states[c.name] for c in sweep.cells[:5]] == ["finished", "diverged", "failed", "interrupted", "missing"]
    assert f"{failed.name}: failed: OSError: disk full" in printed
    assert "1 of 40 cells have results" in printed


def test_the_table_is_tidy(sweep):
    cell = sweep.cells[0]
    _finish(sweep, cell, 2.0, calls=2)  # as guidance has it: two forward passes a step
    first, second = results.rows(sweep, [results.outcome(sweep, cell)])
    assert (first["size"], first["seed"], first["budget_flops"], first["held_out"]) == ("w16", 0, 1e11, False)
    assert (first["steps"], first["mean"], first["num"], first["repeats"]) == (1, 2.0, 100, 2)
    assert (second["steps"], second["mean"]) == (2, 1.0)
    # 4 forward passes per image in training, one per step in inference, twice that with guidance.
    assert first["training_flops"] == 4 * cell.forward_flops * cell.images
    assert first["inference_flops"] == 2 * cell.forward_flops
    assert second["inference_flops"] == 4 * cell.forward_flops
    assert first["train_seconds"] == pytest.approx(0.5 * cell.config.train.max_steps)
    assert (first["last_loss"], first["train_step_reached"]) == (0.2, cell.config.train.max_steps)


def test_results_in_other_precisions_than_the_sweeps_are_not_its_rows(sweep):
    cell = sweep.cells[0]
    _finish(sweep, cell, 2.0)
    (file,) = (Path(cell.run_dir) / "evaluations").iterdir()
    document = json.loads(file.read_text())
    for result in document["results"]:
        result |= {"precision": "bf16", "compile": True, "mean": 9.0}
    (file.parent / f"{file.stem}-bf16.json").write_text(json.dumps(document))
    one = results.outcome(sweep, cell)
    assert [row["mean"] for row in results.rows(sweep, [one])] == [2.0, 1.0]
    assert {(row["precision"], row["compile"]) for row in results.rows(sweep, [one])} == {("fp32", False)}
    file.unlink()
    assert results.outcome(sweep, cell).state == "interrupted", "it has yet to be measured in its own precision"


@pytest.mark.parametrize(
    "changes",
    [
        {"num": 90}, {"repeats": 1}, {"labels": "0-4"}, {"grid": "edm"}, {"ema": "weight"}, {"guidance_scale": 1.5},
        {"reference_file": "ab" * 32}, {"extractor": {"kind": "pixels", "name": "pixels", "id": "ab" * 32}},
        {"steps": 3}, {"guidance_interval": [0.2, 0.8]}, {"seed": 1000}, {"sampler": "restart"}, {"guide": "ab" * 32},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_results_that_the_sweep_did_not_ask_for_are_not_its_rows(sweep, changes):
    cell = sweep.cells[0]
    _finish(sweep, cell, 2.0)
    (file,) = (Path(cell.run_dir) / "evaluations").iterdir()
    document = json.loads(file.read_text())
    for result in document["results"]:
        result |= {"mean": 0.001} | {key: value for key, value in changes.items() if key in result}
    document |= {key: value for key, value in changes.items() if key not in document["results"][0]}
    if "num" in changes:
        document["num"] = changes["num"]
    if "grid" in changes or "sampler" in changes:
        document |= changes
    (file.parent / f"{file.stem}-other.json").write_text(json.dumps(document))
    assert [row["mean"] for row in results.rows(sweep, [results.outcome(sweep, cell)])] == [2.0, 1.0]


def test_a_result_of_one_seed_has_no_spread(sweep):
    cell = sweep.cells[0]
    _finish(sweep, cell, 2.0)
    (file,) = (Path(cell.run_dir) / "evaluations").iterdir()
    document = json.loads(file.read_text())
    for result in document["results"]:
        result |= {"seeds": [0], "values": [1.0], "error": 0.25}
    file.write_text(json.dumps(document))
    first = results.rows(sweep, [results.outcome(sweep, cell)])[0]
    assert (first["std"], first["error"], first["repeats"]) == (None, 0.25, 1)


def test_a_study_says_what_its_cells_do_not_share(sweep):
    rows = [{"num": n, "repeats": 2, "reference": "a"} for n in (100, 90, 100)]
    rows = [{**row, "guidance_scale": 1.0, "metric": "frechet"} for row in rows]
    assert study.measured_under(rows) == "frechet of 2 x 100 or 2 x 90 samples, guidance 1, reference a"
    (note,) = study._unlike(rows)
    assert "different num (100, 90)" in note


def test_mixed_code_is_warned_of_with_both_commits(sweep, capsys):
    _finish(sweep, sweep.cells[0], 2.0, code="aaaaaaaaaaaa")
    _finish(sweep, sweep.cells[1], 2.0, code="bbbbbbbbbbbb+12345678")
    assert main(["collect", sweep.folder]) == 0
    warning = capsys.readouterr().err
    assert "different code versions are mixed" in warning
    assert "aaaaaaaaaaaa" in warning
    assert "bbbbbbbbbbbb+12345678" in warning


def test_a_run_that_was_refused_before_its_cell_began_has_failed(sweep):
    cell = sweep.cells[0]
    Path(cell.run_dir).mkdir(parents=True)
    status = Path(cell.run_dir) / "status.json"
    status.write_text(json.dumps({"state": "failed", "reason": "no manifest"}))
    one = results.outcome(sweep, cell)
    assert (one.state, one.reason) == ("failed", "no manifest")
    status.write_text(json.dumps({"state": "completed", "reason": "max_steps is reached"}))
    assert results.outcome(sweep, cell).state == "interrupted"  # trained, and still to be measured
    assert results.outcome(sweep, cell, "queued").state == "queued"


def test_a_study_recovers_the_law_its_cells_follow(sweep):
    noise = np.random.default_rng(0).standard_normal(len(sweep.cells))
    for cell, sign in zip(sweep.cells, noise, strict=True):
        _finish(sweep, cell, _law(cell) * float(np.exp(0.01 * sign)))
    analysis = study.analyse(results.rows(sweep, results.outcomes(sweep)))
    assert analysis.steps == [1, 2]
    constants = analysis.joints[1].intervals(level=0.99)
    # 0.99 because three constants are looked at; distances in two steps are half of those in one by construction.
    assert constants["E"].covers(0.05)
    assert constants["exponent_N"].covers(0.6)
    assert constants["exponent_D"].covers(0.7)
    assert len(analysis.joints[1].residuals_n) == 30, "the held-out budget is no part of the fit"
    assert len(analysis.checks) == 2 * 10
    # 90 % of 20, which are far from independent; 14 or fewer would happen once in 400 if they were.
    assert sum(check.inside for check in analysis.checks) >= 14
    assert len(analysis.powers) == 2 * 5
    by_parabola, projected = analysis.optima[1]
    exact = 0.7 / (0.6 + 0.7 * analysis.cost.power)
    assert projected.exponent.covers(exact)
    # The sizes lie to the right of the best ones: the case in which parabolas are off.
    assert abs(projected.exponent.value - exact) < abs(by_parabola.exponent.value - exact)
    forecast = analysis.forecasts[0]
    assert forecast.training_flops == pytest.approx(3 * 2.7e12)
    assert forecast.distance.covers(0.05 + 40.0 / forecast.parameters.value**0.6 + 300.0 / forecast.images**0.7)


def test_the_cheapest_choice_is_the_cheapest(sweep):
    for cell in sweep.cells:
        _finish(sweep, cell, _law(cell))
    rows = results.rows(sweep, results.outcomes(sweep))
    for choice in study.cheapest(rows):
        good = [row for row in rows if row["mean"] <= choice.target * (1 + 1e-9)]
        assert choice.inference_flops == min(row["inference_flops"] for row in good)
        assert choice.distance <= choice.target * (1 + 1e-9)


def test_a_study_of_nothing_is_refused(sweep):
    with pytest.raises(UserError, match="no cell of the sweep has a result"):
        study.analyse(results.rows(sweep, results.outcomes(sweep)))


def test_cells_that_do_not_fit_are_refused_by_the_planner(sweep, tmp_path, capsys):
    machine = ["--nodes", "1", "--gpus-per-node", "1", "--gpu", "h100-80gb"]
    assert main(["plan", sweep.folder, *machine]) == 0
    assert "GPU-hours" in capsys.readouterr().out
    document = yaml.safe_load((Path(sweep.folder).parent / "base.yaml").read_text())
    document["model"] = {"size": "DiT-XL/2", "patch_size": 1, "width": 8192, "depth": 64, "heads": 64}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(document))
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump({"configs": ["base.yaml"], "folder": str(tmp_path / "large")}))
    for command in ("plan", "submit"):
        assert main([command, str(path), *machine]) == 2
        assert "do not fit in h100-80gb: seed0" in capsys.readouterr().err
