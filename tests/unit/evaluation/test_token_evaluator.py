"""Evaluations of token nets: what their files say, and what samples then take from them."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from imm_scale import build, cli
from imm_scale import config as configs
from imm_scale.checkpoint import export
from imm_scale.config.schema import Config
from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.tokens.spaces import Tokens
from imm_scale.data.tokens.tokenizers import open_tokenizer
from imm_scale.errors import UserError
from imm_scale.evaluation import evaluators
from imm_scale.evaluation.command import READS
from imm_scale.parallel.world import World
from imm_scale.sampling import profiles, prompts
from imm_scale.sampling.draw import plan_of
from imm_scale.sampling.source import Source, config_of
from tests import small_tokens

ALONE = World()
NET = ["data.space.name=tokens", "model.name=token_transformer", "model.width=16", "model.depth=1", "model.heads=2"]


def _weights(folder: Path, words: list[str], manifest: str) -> str:
    """An exported net with every weight random, so that what it sees matters."""
    config = configs.load([], [*NET, *words]).config
    spec = build.model_spec(config, Manifest.load(manifest))
    torch.manual_seed(0)
    net = build.net(spec)
    weights = {name: value + 0.2 * torch.randn_like(value) for name, value in net.model.state_dict().items()}
    url = str(folder / "net.safetensors")
    export.write(spec, weights, url)
    return url


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return small_tokens.binary_digits(tmp_path_factory.mktemp("held"), 1600, 1790)


@pytest.fixture(scope="module")
def masked(tmp_path_factory, held_out):
    return _weights(tmp_path_factory.mktemp("masked"), ["method.name=masked"], held_out)


def _config(held_out: str, *words: str) -> Config:
    return configs.load([], [f"data.holdout_manifest={held_out}", *words]).config


def _evaluated(source: str, config: Config, folder: Path, said: list[str] | None = None):
    lines = [] if said is None else said
    evaluator = evaluators.choose(Source(source), config, ALONE, lines.append, str(folder))
    return evaluator.evaluate(config.sampling, config.evaluation)


def test_steps_of_a_product_head_cost_what_its_profile_says(masked, held_out, tmp_path):
    config = _config(held_out, "evaluation.steps=[1,4,64]")
    document = _evaluated(masked, config, tmp_path)
    for result in document["results"]:
        measures = {name: one["value"] for name, one in result["measures"].items()}
        assert result["metric"] == "nll_per_token" and result["value"] == measures["nll_per_token"]
        # Formula (1) from single tokens against the steps themselves, within four standard errors of the two.
        errors = [result["measures"][name]["error"] for name in ("nll_per_token", "product_uniform_per_token")]
        difference = measures["nll_per_token"] - measures["product_uniform_per_token"]
        assert abs(difference) < 4 * math.hypot(*errors) < 0.4
        assert measures["product_floor_per_token"] <= measures["product_uniform_per_token"] + 2 * result["error"]
    assert [result["function_evaluations"] for result in document["results"]] == [1, 4, 64]
    stored = document["profile"]
    assert list(stored["visible"]) == list(range(64)) and stored["weights"] == document["weights"]
    assert all(a >= b for a, b in zip(stored["fitted"], stored["fitted"][1:], strict=False))


def test_best_sizes_come_from_the_profile_of_these_weights_alone(masked, held_out, tmp_path):
    config = _config(held_out, "evaluation.steps=[4]", "sampling.grid=best")
    document = _evaluated(masked, config, tmp_path)
    (result,) = document["results"]
    sizes = [int(size) for size in result["grid"].split(",")]
    assert len(sizes) == 4 and sum(sizes) == 64
    url = str(tmp_path / "profile.json")
    Path(url).write_text(json.dumps(document["profile"]))
    sampling = dataclasses.replace(config.sampling, profile=url)
    written = profiles.written_out(Source(masked), sampling, [4], document["weights"])
    assert written[4].grid == result["grid"]
    with pytest.raises(UserError, match="is of other weights"):
        profiles.written_out(Source(masked), sampling, [4], "0" * 64)
    with pytest.raises(UserError, match="run imm-scale evaluate first"):
        profiles.written_out(Source(masked), config.sampling, [4], None)
    with pytest.raises(UserError, match="is no profile of a masked net"):
        profiles.load(masked)


def test_an_evaluation_is_read_again_and_confidence_has_no_likelihood(masked, held_out, tmp_path, monkeypatch):
    config = _config(held_out, "evaluation.steps=[2]", "evaluation.brier=16")
    first = _evaluated(masked, config, tmp_path)
    assert {"brier_1", "brier_4", "one_minus_brier_4"} < first["results"][0]["measures"].keys()
    monkeypatch.setattr(evaluators.TokenEvaluator, "_result", None)  # nothing is measured a second time
    assert _evaluated(masked, config, tmp_path)["results"] == first["results"]
    monkeypatch.undo()
    unsure = _config(held_out, "evaluation.steps=[2]", "sampling.order=confidence", "evaluation.num=24")
    (result,) = _evaluated(masked, unsure, tmp_path)["results"]
    assert result["metric"] == "one_minus_brier_4" and "nll_per_token" not in result["measures"]


def test_a_causal_net_is_measured_by_what_its_sampler_draws(held_out, tmp_path):
    words = ["method.name=next_block", "model.causal=true", "model.block=4", "model.head.kind=autoregressive"]
    source = _weights(tmp_path, words, held_out)
    results = {}
    for sampler in ("blocks", "verified"):
        words = ["evaluation.steps=[16]", "evaluation.num=48", f"sampling.sampler={sampler}"]
        config = config_of(Source(source), [f"data.holdout_manifest={held_out}", *words], READS)
        (results[sampler],) = _evaluated(source, config, tmp_path)["results"]
    blocks, verified = results["blocks"], results["verified"]
    assert blocks["function_evaluations"] == 16
    assert blocks["value"] == blocks["measures"]["nll_of_blocks"]["value"]
    assert verified["value"] == verified["measures"]["nll_one_at_a_time"]["value"]
    # One pass reads the beginning, and each round leaves at least one token.
    assert 1 <= verified["measures"]["tokens_a_pass"]["value"] <= 4
    assert verified["function_evaluations"] == pytest.approx(64 / verified["measures"]["tokens_a_pass"]["value"])
    assert verified["measures"]["accepted_1"]["value"] == 1.0  # q of the first is p


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repeats", "3"], "evaluation.repeats does nothing here"),
        (["evaluation.extractor.kind=pixels"], "does nothing here"),
        (["--gallery"], "no pictures"),
        (["--guidance", "2"], "is for flow maps"),
        (["--steps", "65"], "at most 64"),
        (["--steps", "2", "--num", "3"], "3 held-out samples leave no standard errors"),
        (["sampling.given=x.npy"], "is for imm-scale sample"),
    ],
)
def test_what_means_nothing_to_tokens_is_refused(masked, held_out, words, said, capsys):
    assert cli.main(["evaluate", masked, f"data.holdout_manifest={held_out}", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_held_out_tokens_there_is_nothing_to_measure(masked, capsys):
    assert cli.main(["evaluate", masked, "--steps", "2"]) == 2
    assert "set data.holdout_manifest" in capsys.readouterr().err


# --- what samples are given ---


def _known(masked: str, **settings):
    spec = export.read_spec(masked)[0]
    return prompts.known_tokens(dataclasses.replace(Config().sampling, **settings), spec)


@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_given_tokens_stay_where_they_are(masked, tmp_path, ending):
    import numpy as np

    rows = np.full((2, 64), prompts.UNKNOWN)
    rows[0, 5:9], rows[1, 60:] = 1, 0
    url = str(tmp_path / f"gaps.{ending}")
    if ending == "npy":
        np.save(url, rows)
    else:
        lines = [json.dumps({"tokens": [None if one < 0 else one for one in row]}) for row in rows.tolist()]
        Path(url).write_text("\n".join(lines))
    known = _known(masked, given=url)
    start = known.put(torch.full((3, 64), 2), torch.tensor([0, 1, 2]))
    assert (start[0, 5:9] == 1).all() and (start[1, 60:] == 0).all() and torch.equal(start[2], start[0])
    assert int((start == 2).sum()) == 3 * 64 - 12


def test_a_causal_net_is_given_beginnings_alone(masked, tmp_path):
    import numpy as np

    rows = np.full((2, 64), prompts.UNKNOWN)
    rows[0, :5], rows[1, 3] = 1, 1
    np.save(tmp_path / "gaps.npy", rows)
    spec = export.read_spec(masked)[0]
    causal = dataclasses.replace(spec, net=dataclasses.replace(spec.net, causal=True, positions="rotary"))
    for count, said in ((1, None), (2, "token 3 of sequence 1 is given behind")):
        np.save(tmp_path / f"{count}.npy", rows[:count])
        config = dataclasses.replace(Config().sampling, given=str(tmp_path / f"{count}.npy"))
        with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
            prompts.known_tokens(config, causal)


def test_tokens_are_no_latents_beside_themselves(masked, tmp_path, capsys):
    assert cli.main(["sample", masked, "--latents", "--out", str(tmp_path)]) == 2
    assert "--latents: tokens are drawn as they are" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_cannot_be_given_is_refused(masked, tmp_path):
    import numpy as np

    def saved(array) -> str:
        url = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.npy")
        np.save(url, array)
        return url

    def lines(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text(text)
        return str(path)

    archive = str(tmp_path / "samples.npz")
    np.savez(archive, arr_0=np.full((1, 64), prompts.UNKNOWN))
    for settings, said in (
        ({"given": saved(np.zeros((1, 63), np.int64))}, r"\(n, 64\) is needed"),
        ({"given": saved(np.full((1, 64), 7))}, "token 0 of sequence 0 is 7; ids are 0 to 1"),
        ({"given": saved(np.zeros((1, 64), np.int64))}, "nothing left to draw"),
        ({"given": saved(np.zeros((1, 64)))}, "ids are whole numbers"),
        ({"given": str(tmp_path / "none.npy")}, "is not there"),
        ({"given": lines('{"tokens": [0.5' + ", null" * 63 + "]}")}, r"holds no tokens \(0.5 is no whole number"),
        ({"given": lines('{"tokens": [true' + ", null" * 63 + "]}")}, "True is no whole number"),
        ({"given": lines('{"tokens": [' + str(2**70) + ", null" * 63 + "]}")}, "holds no tokens"),
        ({"given": lines('{"tokens": [1, null]}\n{"tokens": [1]}')}, "holds no tokens"),
        ({"given": lines("")}, r"\(n, 64\) is needed"),
        ({"given": archive}, "holds no tokens"),
        ({"given": saved(np.full((1, 64), prompts.UNKNOWN)), "given_blocks": 2}, "given_blocks=2 is for latents"),
        ({"prompt": "a", "given": "x"}, "give one of them"),
        ({"prompt": "a"}, "stand for images"),
    ):
        with pytest.raises(UserError, match=said):
            _known(masked, **settings)
    spec = export.read_spec(masked)[0]
    for tokenizer, prompt, said in (
        ("text27", "123 !", "no tokens of.*text27"),
        ("hf", "the", "name the folder.*--vae"),
    ):
        space = Tokens(64, TokenCodec(27, tokenizer, open_tokenizer("text27").hash), 1, ())
        with pytest.raises(UserError, match=said):
            prompts.known_tokens(
                dataclasses.replace(Config().sampling, prompt=prompt), dataclasses.replace(spec, space=space)
            )
    plan = plan_of(dataclasses.replace(Config().sampling, sampler="auto"), spec, 4, 2, 0)
    assert plan.known is None and plan.sampler == "unmask"
