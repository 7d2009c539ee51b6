"""The first 100 losses of a small run, as they were when the curve was last looked at.

After a change that is meant to alter them: `python -m tests.golden.test_golden_curve` writes the file anew; say in the
commit why the curve moved.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests import ranks
from tests.conftest import TINY, losses

GOLDEN = Path(__file__).parent / "imm_digits_100_steps.json"


def _curve(manifest: str, run_dir: Path) -> list[float]:
    ranks.train(1, *TINY, f"data.manifest={manifest}", f"run.dir={run_dir}", "train.max_steps=100")
    return losses(run_dir)


def test_100_steps_follow_the_golden_curve(digits, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    # Rounding differs between processors; over 100 steps of Adam it grows to about 1e-4, a wrong formula to 1e-2.
    np.testing.assert_allclose(_curve(digits, tmp_path / "run"), golden, rtol=2e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curve = _curve(sys.argv[1], Path(folder) / "run")
    GOLDEN.write_text(json.dumps(curve, indent=0) + "\n")
