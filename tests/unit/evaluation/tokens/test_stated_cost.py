"""What evaluations of token nets state of their cost, with weights nobody trained."""

from pathlib import Path
from typing import Any

import pytest

from imm_scale import build
from imm_scale import config as configs
from imm_scale.checkpoint import export
from imm_scale.data.manifest import Manifest
from imm_scale.evaluation.evaluators.tokens import TokenEvaluator
from imm_scale.evaluation.tokens import work
from imm_scale.parallel.world import World
from imm_scale.sampling.source import find
from tests import small_tokens

SMALL = (*small_tokens.NET, "model.width=8", "model.depth=1", "model.heads=2")
MASKED = ("method.name=masked",)
CAUSAL = ("method.name=next_block", "model.causal=true", "model.block=4")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> str:
    return small_tokens.binary_digits(tmp_path_factory.mktemp("digits"), last=96)


def _evaluated(folder: Path, manifest: str, *words: str) -> tuple[list[dict[str, Any]], build.ModelSpec]:
    """The results by steps, and the spec of what was measured on 16 sequences of 64 tokens."""
    data = (f"data.manifest={manifest}", f"data.holdout_manifest={manifest}", "evaluation.num=16")
    config = configs.load_words([*data, *SMALL, *words]).config
    spec = build.model_spec(config, Manifest.load(manifest))
    export.write(spec, build.net(spec).model.state_dict(), f"{folder}/w.safetensors")
    evaluator = TokenEvaluator(find(f"{folder}/w.safetensors"), config, World(), print, str(folder / "out"))
    return evaluator.evaluate(config.sampling, config.evaluation)["results"], spec


def test_a_masked_net_refines_all_tokens(tmp_path, manifest):
    results, spec = _evaluated(tmp_path, manifest, *MASKED, "evaluation.steps=[1,4]")
    assert [(one["sequence_passes"], one["refinement_passes"], one["passes"]) for one in results] == [
        (1, 1, 1),
        (1, 4, 4),
    ]
    assert [one["multiply_adds"] for one in results] == [work.of_masked(spec.net, steps, False) for steps in (1, 4)]


@pytest.mark.parametrize("sampler", ["blocks", "verified"])
def test_a_causal_net_goes_along_the_sequence(tmp_path, manifest, sampler):
    """Of verified decoding passes are measured, and every one of the 64 tokens but the first needs a fifth of one."""
    ((result,), spec) = _evaluated(tmp_path, manifest, *CAUSAL, "evaluation.steps=[16]", f"sampling.sampler={sampler}")
    passes = result["passes"]
    assert (result["sequence_passes"], result["refinement_passes"]) == (passes, 1)
    if sampler == "blocks":
        assert passes == 16 and result["multiply_adds"] == work.of_blocks(spec.net, 4)
    else:
        assert 1 + 63 / 5 <= passes <= 64
        assert result["multiply_adds"] == work.of_verified(spec.net, 64, 4, passes)
    assert result["flops_per_image"] == 2 * result["multiply_adds"]
