"""The page of the two axes: its numbers against ones written out, what is drawn, and the page in a real browser."""

import json
from pathlib import Path

import numpy as np
import pytest

from imm_scale import cli
from imm_scale.errors import UserError
from imm_scale.report.axes import figures, findings, page, points
from imm_scale.report.axes.efficiency import At, Spread, between, cost_of, efficiency, envelope, slope
from tests.browser import Browser
from tests.unit.report import evaluated

TOKENS = ("data.space.name=tokens", "model.name=token_transformer")
MASKED, CAUSAL = (*TOKENS, "method.name=masked"), (*TOKENS, "method.name=next_block", "model.causal=true")
JOINT = (*MASKED, "model.head.kind=autoregressive", "method.steps=[1,2]")
FLOW, IMM = ("method.name=flow_matching",), ("method.name=imm",)
M = 1_000_000
ROUNDING = 1e-12  # fp64


# --- numbers ---


def _curve(*pairs: tuple[float, float]) -> list[At]:
    return [At(*pair) for pair in pairs]


def test_the_envelope_is_what_no_cheaper_point_beats():
    assert envelope(_curve((3, 5), (1, 8), (2, 9), (3, 4), (9, 4))) == _curve((1, 8), (3, 4))


def test_costs_between_points_are_log_linear():
    """From 3 at cost 1 to 1 at cost 4: 2 lies half way, where the cost is the geometric mean."""
    assert cost_of(_curve((1, 3), (4, 1)), 2.0) == (pytest.approx(2.0, rel=ROUNDING), False)
    assert cost_of(_curve((1, 3), (4, 1)), 1.0) == (pytest.approx(4.0, rel=ROUNDING), False)
    assert cost_of(_curve((1, 3), (4, 1)), 3.0) == (1.0, False)
    assert cost_of(_curve((1, 3), (4, 1)), 5.0) == (1.0, True), "how little would do is not known"
    assert cost_of(_curve((1, 3), (4, 1)), 0.9) is None
    middle = between(_curve((1, 3), (4, 1)), 2)[1]
    assert middle == pytest.approx((2.0, 2.0), rel=ROUNDING), "what is drawn is what is read off"


BASE = _curve((1, 8), (2, 4), (4, 2))


@pytest.mark.parametrize(
    ("ours", "ratio", "is_bound"),
    [
        (_curve((1, 3), (4, 1)), 2.0, False),
        (BASE, 1.0, False),
        (_curve((16, 2)), 0.25, False),
        (_curve((1, 1.5)), 4.0, True),
        (_curve((1, 3), (8, 2.5)), None, False),
    ],
)
def test_efficiency_is_a_ratio_of_costs_at_the_best_of_the_baseline(ours, ratio, is_bound):
    found = efficiency(BASE, ours)
    assert (found.target, found.baseline, found.is_bound) == (2, 4, is_bound)
    assert found.ratio == (None if ratio is None else pytest.approx(ratio, rel=ROUNDING))


def test_slopes_are_exponents():
    assert slope(_curve(*((c, 5 * c**-1.5) for c in (1.0, 2.0, 7.0)))) == pytest.approx(-1.5, rel=ROUNDING)
    assert slope(_curve((1, 2), (1.05, 1))) is None, "at one cost there is none"
    assert slope(_curve((1, 2), (2, 0))) is None, "nor of one point above 0"


def test_a_spread_says_its_range_and_what_is_missing():
    assert Spread((2.0, 8.0)).text("not reached", is_ratio=True) == "4 (2 to 8)"
    assert Spread((2.0, 8.0)).text("not known") == "5 (2 to 8)"
    assert Spread((2.0,), is_bound=True).text("not reached") == "at least 2"
    assert Spread((None, None)).text("not reached") == "not reached"
    assert Spread((None, 2.0, 8.0)).text("not reached", True) == "not reached by 1 of 3; of the others 4 (2 to 8)"


# --- from runs ---


@pytest.fixture
def image_runs(tmp_path) -> list[str]:
    """Flow matching reaches 0.5 with 8 M; IMM with 4, 2 and 1 M, by seed; two blocks with 4 M for one seed of two."""
    runs = []
    for seed, least in ((0, 4), (1, 2), (2, 1)):
        flow = [evaluated.image(steps, 1, steps * M, [4.0 / steps]) for steps in (1, 2, 4, 8)]
        runs.append(evaluated.run(tmp_path / f"flow-seed{seed}", flow, *FLOW, f"seed={seed}"))
        imm = [evaluated.image(steps, 1, steps * M, [max(0.5 * least / steps, 0.4)]) for steps in (1, 2, 4)]
        runs.append(evaluated.run(tmp_path / f"imm-seed{seed}", imm, *IMM, f"seed={seed}"))
    for seed, value in ((0, 0.5), (1, 0.7)):
        two = [evaluated.image(1, 2, 1.5 * M, [2.0]), evaluated.image(4, 2, 4.5 * M, [value])]
        runs.append(evaluated.run(tmp_path / f"two-seed{seed}", two, *IMM, "model.blocks=2", f"seed={seed}"))
    return runs


@pytest.fixture
def token_runs(tmp_path) -> list[str]:
    """A masked net whose excess is 0.8 / L, one with a joint head, and a causal one in blocks of 1, 2 and 8."""
    floors = {1: 0.75, 2: 0.4, 4: 0.1}
    masked = [evaluated.tokens(n, (1, n), n * M, 2 + 0.8 / n, 2.0, 2 + floor) for n, floor in floors.items()]
    joint = [evaluated.tokens(n, (1, n), n * 1.1 * M, 2 + 0.4 / n**2, 2.0) for n in (1, 2)]
    runs = [evaluated.run(tmp_path / "masked", masked, *MASKED), evaluated.run(tmp_path / "joint", joint, *JOINT)]
    for block, excess in ((1, 0.0), (2, 0.3), (8, 1.2)):
        one = [evaluated.tokens(64 // block, (64 // block, 1), M, 1.9 + excess, 1.9)]
        runs.append(evaluated.run(tmp_path / f"causal{block}", one, *CAUSAL, f"model.block={block}"))
    return runs


def test_runs_of_other_seeds_are_one_variant_and_give_the_spread(image_runs):
    (column,) = points.read(image_runs)
    assert [one.name for one in column.variants] == ["flow", "imm", "two"]
    assert column.baseline.name == "flow"
    imm, two = findings.scalings(column)
    assert (imm.work, imm.passes, imm.target, imm.seeds) == ("4 (2 to 8)", "4 (2 to 8)", 0.5, "3 training")
    assert two.work == "not reached by 1 of 2; of the others 1.78 (1.78 to 1.78)", "8 M over 4.5 M"
    assert two.passes == "not reached by 1 of 2; of the others 1 (1 to 1)", "4 steps of 2 blocks against 8"
    assert two.seeds == "2 training", "those that both have"


def test_references_that_each_run_draws_by_its_own_seed_are_one(tmp_path):
    """Of latents that are stored as distributions the reference is a draw too; another run's draw is another matter."""
    runs = []
    for seed, drawn_by in ((0, 0), (1, 1), (2, 0)):
        reference = {"id": f"{seed}", "manifest_hash": "data", "count": 10, "posterior_seed": drawn_by}
        result = [evaluated.image(1, 1, M, [1.0 + seed])]
        runs.append(evaluated.run(tmp_path / f"flow-seed{seed}", result, *FLOW, f"seed={seed}"))
        (url,) = (tmp_path / f"flow-seed{seed}" / "evaluations").iterdir()
        url.write_text(json.dumps(json.loads(url.read_text()) | {"reference": reference, "codec": {"kind": "vae"}}))
    (column,) = points.read(runs)
    assert sorted(column.variants[0].points[0].by_seed) == [0, 1]
    assert column.left_out == ("1 result measured otherwise",)


def test_slopes_along_both_axes(token_runs, image_runs):
    tokens, images = points.read([*token_runs, *image_runs])
    by_axis = {(one.what, one.axis, one.held): one for one in findings.slopes(tokens)}
    masked = by_axis["masked", "refinement", 1]
    assert (masked.work, masked.passes, masked.seeds) == ("-1", "-1", "no spread"), "an excess of 0.8 / L"
    assert by_axis["joint", "refinement", 1].work == "-2"
    causal = by_axis["causal1 and causal2 and causal8", "sequence", 1]
    assert causal.work == "not known: work stays the same", "blocks cost passes"
    assert causal.passes == "-1", "from 1.2 in 8 passes to 0.3 in 32; none of one token at a time has no logarithm"
    sequence = [one for one in findings.slopes(images) if one.axis == "sequence"]
    assert [(one.what, one.held, one.points) for one in sequence] == [("imm and two", 1, 2), ("imm and two", 4, 2)]


def test_sampling_seeds_of_a_single_run_give_a_spread_too(tmp_path):
    flow = [evaluated.image(8, 1, 8 * M, [0.5, 0.5, 0.5])]
    imm = [evaluated.image(1, 1, M, [1.0, 1.0, 0.5]), evaluated.image(4, 1, 4 * M, [0.5, 0.25, 0.5])]
    runs = [evaluated.run(tmp_path / "flow", flow, *FLOW), evaluated.run(tmp_path / "imm", imm, *IMM)]
    (scaling,) = findings.scalings(points.read(runs)[0])
    # 8 M over 4 M, over 4^(2/3) M, over 1 M.
    ratios = [8 / 4, 8 / 4 ** (2 / 3), 8 / 1]
    assert scaling.work == f"{np.exp(np.mean(np.log(ratios))):.3g} (2 to 8)" and scaling.seeds == "3 sampling"


def test_only_what_was_measured_alike_is_on_the_page_and_what_is_not_is_named(tmp_path):
    flow = [evaluated.image(n, 1, n * M, [4.0 / n]) for n in (1, 2)]
    others = [evaluated.image(4, 1, 4 * M, [0.1]) | {"num": 90}, evaluated.image(8, 1, 0, [0.2])]
    del others[1]["multiply_adds"]
    (column,) = points.read([evaluated.run(tmp_path / "flow", [*flow, *others], *FLOW)])
    assert [point.value for point in column.variants[0].points] == [4.0, 2.0, 0.2]
    assert [point.work for point in column.variants[0].points] == [M, 2 * M, None]
    assert column.left_out == (
        "1 result measured otherwise",
        "1 result of older files without their work: evaluate again to see them in all figures",
    )


# --- figures ---


def test_disks_have_areas_of_work_and_families_no_quality(token_runs):
    (column,) = points.read(token_runs)
    plot = figures.axes_map(column).axes[0]
    work = {tuple(disk.get_offsets()[0]): disk.get_sizes()[0] for disk in plot.collections}
    assert work[1, 4] / work[64, 1] == pytest.approx(4), "4 steps of 1 M, and blocks of 1 M in all"
    assert {float(disk.get_array()[0]) for disk in plot.collections} == {
        point.value for one in column.variants for point in one.points
    }
    assert len(plot.patches) == len(figures.families("tokens", 64)) == 4
    assert not any(patch.get_fill() for patch in plot.patches)
    expected = {"autoregressive": ((64, 64), (1, 1)), "masked": ((1, 1), (1, 64)), "multi-token": ((8, 32), (1, 1))}
    assert {f.name: f[1:] for f in figures.families("tokens", 64) if f.name in expected} == expected


def test_floors_are_dotted(token_runs):
    (column,) = points.read(token_runs)
    for kind, costs in (("work", [M, 2 * M, 4 * M]), ("passes", [1, 2, 4])):
        (dotted,) = [line for line in figures.quality(column, kind).axes[0].lines if line.get_linestyle() == ":"]
        assert (list(dotted.get_xdata()), list(dotted.get_ydata())) == (costs, [2.75, 2.4, 2.1])


# --- the page ---


def test_the_page_is_whole_and_readable(token_runs, image_runs, tmp_path, capsys):
    out = tmp_path / "axes.html"
    assert cli.main(["report", *token_runs, *image_runs, "--axes", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Baseline: masked, whose best is 2.2000." in printed and "Baseline: flow, whose best is 0.5000." in printed
    with Browser() as browser:
        for width in (1280, 400):
            seen = browser.look(out, width)
            assert (seen["pictures"], seen["broken"]) == (6, []), "three figures for each of two modalities"
            assert seen["overflow"] <= 0, "the page must not scroll sideways"
            assert seen["least_text"] >= 12
            assert "not reached by 1 of 2" in seen["text"]
        assert browser.complaints == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "b.html"], "--axes a.html writes that page alone: leave --out out"),
        (["--watch"], "leave --watch out"),
        (["--figures", "f"], "leave --figures out"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "run", "--axes", "a.html", *flags]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_runs_without_evaluations_and_sweeps_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"nothing is measured in .*run: imm-scale evaluate does it"):
        page.write([evaluated.run(tmp_path / "run", [])], str(tmp_path / "axes.html"))
    Path(tmp_path / "sweep.yaml").write_text("")
    assert cli.main(["report", str(tmp_path / "sweep.yaml"), "--axes", str(tmp_path / "a.html")]) == 2
    assert "give the folders of its runs" in capsys.readouterr().err
