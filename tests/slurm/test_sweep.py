"""A sweep as an array on a real SLURM."""

from pathlib import Path

import yaml

from imm_scale.sweeps import definition, results
from launchers.sweep import main
from tests.slurm.test_training import soak

ROOT = Path(__file__).parents[2]


@soak
def test_an_array_trains_and_measures_every_cell(cluster, digits, tmp_path, capsys):
    document = yaml.safe_load((ROOT / "configs/sweep/digits_scaling_ci.yaml").read_text())
    document |= {
        "name": "lab",
        "folder": str(tmp_path / "out; $(touch pwned)"),
        "configs": [str(ROOT / "configs/demo.yaml")],
    }
    document["settings"]["data.manifest"] = digits
    document["budgets"] = {"images": [640]}
    del document["hold_out"]
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    assert main(["submit", str(path), "--cluster", "lab", "--gpus-per-node", "1", "--at-once", "1"]) == 0
    cluster.wait(int(capsys.readouterr().out.removeprefix("job ").split(":")[0]))
    sweep = definition.load(str(path))
    assert [one.state for one in results.outcomes(sweep)] == ["finished", "finished"]
    assert not list(tmp_path.rglob("pwned"))
    assert main(["submit", str(path), "--cluster", "lab"]) == 0
    assert "0 of 2 cells to run (2 finished)" in capsys.readouterr().err
