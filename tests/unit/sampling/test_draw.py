"""Samples: image i is the same however many are drawn, in whatever batches, on however many ranks."""

import numpy as np
import pytest
import torch
from PIL import Image

from imm_scale.checkpoint import export
from imm_scale.parallel.world import World
from imm_scale.sampling.draw import SamplingPlan, collect, parse_labels, sample
from imm_scale.sampling.outputs import image_grid
from tests import ranks

PLAN = SamplingPlan(steps=2, grid="uniform", labels=tuple(range(10)), num=40, seed=3, guidance_scale=1.5, batch_size=16)


def _latents(run_dir: str, plan: SamplingPlan) -> np.ndarray:
    from imm_scale.parallel import world as distributed

    world = distributed.detect()
    distributed.init(world)
    spec, flow_map = export.load_net(run_dir)
    return collect(flow_map, spec, plan, world).numpy()


def _with(**changes: object) -> SamplingPlan:
    from dataclasses import replace

    return replace(PLAN, **changes)


def test_image_i_does_not_depend_on_num_or_ranks(trained):
    alone = ranks.run(_latents, 1, trained, PLAN)[0]
    for size, num in ((1, 23), (2, 40), (3, 37)):
        for z in ranks.run(_latents, size, trained, _with(num=num)):
            assert np.array_equal(z, alone[:num]), f"{num} images on {size} ranks"


def test_image_i_does_not_depend_on_the_batch_size(trained):
    plan = _with(num=200)
    alone = ranks.run(_latents, 1, trained, plan)[0]
    for batch_size in (7, 64, 130, 1000):
        assert np.array_equal(ranks.run(_latents, 1, trained, _with(num=200, batch_size=batch_size))[0], alone)


def test_seed_label_steps_and_guidance_matter(trained):
    spec, flow_map = export.load_net(trained)
    first = collect(flow_map, spec, PLAN, World())
    for changed in (_with(seed=4), _with(labels=(3,)), _with(steps=3), _with(guidance_scale=1.0)):
        assert not torch.equal(collect(flow_map, spec, changed, World()), first), changed


def test_labels_go_round(trained):
    spec, flow_map = export.load_net(trained)
    drawn = torch.cat([label for _, label, _ in sample(flow_map, spec, _with(labels=(7, 2, 5)), World())])
    assert drawn.tolist() == [(7, 2, 5)[i % 3] for i in range(40)]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("all", tuple(range(10))),
        ("0-2", (0, 1, 2)),
        ("3,7,1-2", (3, 7, 1, 2)),
        ("5:3,0-1:2", (5, 5, 5, 0, 0, 1, 1)),
    ],
)
def test_labels_are_parsed(text, labels):
    assert parse_labels(text, 10) == labels


def test_a_grid_has_a_row_a_class_and_a_column_a_sample():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    sheet = np.asarray(image_grid(images, labels=[0, 1]))
    assert sheet.shape == (2 * 5 - 1, 3 * 5 - 1)
    assert [[sheet[row, column] for column in (0, 5, 10)] for row in (0, 5)] == [[0, 2, 4], [1, 3, 5]]


def test_the_command_writes_grids_and_arrays(trained, tmp_path):
    argv = ["sample", trained, "--steps", "1,2", "--num", "20", "--labels", "0-4", "--out", str(tmp_path)]
    assert ranks.run(ranks.command, 1, *argv) == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"steps-{n}.{e}" for n in (1, 2) for e in ("json", "npz", "png")
    ]
    arrays = np.load(tmp_path / "steps-2.npz")
    assert arrays["arr_0"].shape == (20, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4] * 4
    picture = np.asarray(Image.open(tmp_path / "steps-2.png"))
    assert (picture[:32:4, :32:4] == arrays["arr_0"][0, :, :, 0]).all()


def test_an_exported_file_samples_as_its_run(trained, tmp_path):
    file = str(tmp_path / "digits.safetensors")
    assert ranks.run(ranks.command, 1, "export", trained, "--out", file, "--ema", "0.99") == [0]
    spec, flow_map = export.load_net(trained)
    exported_spec, exported = export.load_net(file)
    assert exported_spec == spec
    assert torch.equal(collect(exported, spec, PLAN, World()), collect(flow_map, spec, PLAN, World()))
    raw = export.read(trained, export.RAW_WEIGHTS)[1]
    averaged = export.read(file)[1]
    assert raw.keys() == averaged.keys()
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw), "the average is not the raw weights"
