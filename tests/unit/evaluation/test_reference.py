"""Reference files: ours, ADM's and EDM's; sets of images; what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from imm_scale.data.spaces import png
from imm_scale.errors import UserError
from imm_scale.evaluation import images
from imm_scale.evaluation.collect import Collector, chosen, group_of
from imm_scale.evaluation.extractors import Flat, Output
from imm_scale.evaluation.measures import measure, warnings
from imm_scale.evaluation.reference import Reference, of_images
from imm_scale.parallel.world import World
from tests import ranks

ALONE = World()
PIXELS = ["evaluation.extractor.kind=pixels"]


def _images(num: int, size: int = 6, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, channels), dtype=np.uint8)


def _folder(path, array: np.ndarray):
    path.mkdir()
    for i, image in enumerate(array):
        Image.fromarray(image.squeeze()).save(path / f"{i:04d}.png")
    return str(path)


@pytest.fixture
def reference_and_images(tmp_path) -> tuple[Reference, np.ndarray]:
    array = _images(300)
    return of_images(images.find(_folder(tmp_path / "images", array)), Flat("pixels"), 50, ALONE), array


def test_a_folder_gives_numpys_moments_and_comes_back_from_its_file(reference_and_images, tmp_path):
    reference, array = reference_and_images
    flat = array.reshape(300, -1) / 255.0
    np.testing.assert_allclose(reference.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(reference.covariance, np.cov(flat, rowvar=False), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(reference.kept, flat[chosen(300, 50)], rtol=1e-6)
    reference.save(str(tmp_path / "ref.npz"))
    again = Reference.load(str(tmp_path / "ref.npz"))
    assert (again.id, again.count, again.extractor) == (reference.id, 300, reference.extractor)
    again.check(Flat("pixels"))
    # What the ADM and EDM evaluators look up.
    with np.load(tmp_path / "ref.npz") as file:
        assert file["mu"].shape == (108,)
        assert file["sigma"].shape == (108, 108)


def test_files_of_other_evaluators_are_read_with_a_warning(reference_and_images, tmp_path, caplog):
    reference, _ = reference_and_images
    np.savez(tmp_path / "edm.npz", mu=reference.mean.numpy(), sigma=reference.covariance.numpy())
    extra = {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 3, 3, 3), np.uint8)}
    np.savez(tmp_path / "adm.npz", mu=reference.mean.numpy(), sigma=reference.covariance.numpy(), **extra)
    for name in ("edm.npz", "adm.npz"):
        loaded = Reference.load(str(tmp_path / name))
        assert loaded.id == reference.id
        assert loaded.count is None
        loaded.check(Flat("pixels"))
        assert "does not say which extractor" in caplog.text


@pytest.mark.parametrize("kind", ["npz", "tar"])
def test_other_homes_of_images_give_the_same(reference_and_images, tmp_path, kind, trained):
    reference, array = reference_and_images
    if kind == "npz":
        np.savez(tmp_path / "set.npz", arr_0=array, arr_1=np.zeros(300))
        source = images.find(str(tmp_path / "set.npz"))
    else:
        from imm_scale.sampling.parts import Parts

        parts = Parts(str(tmp_path / "shards"), "", [(0, 130), (130, 300)])
        for part, (start, stop) in enumerate(parts.ranges):
            parts.write(part, [{"png": png(image)} for image in array[start:stop]], [0] * (stop - start))
        source = images.find(parts.folder)
    assert len(source) == 300
    again = of_images(source, Flat("pixels"), 50, ALONE)
    # The same sums, in chunks of other sizes.
    np.testing.assert_allclose(again.covariance, reference.covariance, rtol=1e-9, atol=1e-15)
    assert torch.equal(again.kept, reference.kept)


def _of_folder(folder: str) -> tuple[np.ndarray, np.ndarray]:
    from imm_scale.parallel import world as distributed

    world = distributed.detect()
    distributed.init(world)
    reference = of_images(images.find(folder), Flat("pixels"), 50, world)
    return reference.covariance.numpy(), reference.kept.numpy()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_make_the_same_reference(reference_and_images, tmp_path, size):
    """300 images are 5 chunks; at 4 ranks some have one, some two. A set of 60 is one chunk: the others have none."""
    reference, array = reference_and_images
    for covariance, features in ranks.run(_of_folder, size, str(tmp_path / "images")):
        np.testing.assert_allclose(covariance, reference.covariance, rtol=1e-9, atol=1e-15)
        assert np.array_equal(features, reference.kept.numpy())
    few = _folder(tmp_path / "few", array[:60])
    for covariance, _ in ranks.run(_of_folder, size, few):
        np.testing.assert_allclose(covariance, np.cov(array[:60].reshape(60, -1) / 255.0, rowvar=False), atol=1e-12)


def test_random_groups_do_not_follow_labels():
    index = torch.arange(10_000)
    group = group_of(index)
    # Samples take classes in turn; each group must have every class: 100 of each, standard deviation 9.
    counts = torch.bincount(group * 10 + index % 10, minlength=100)
    assert counts.min() > 55
    assert counts.max() < 145


def test_nan_features_name_the_sample():
    collector = Collector(10, 5)
    features = torch.zeros(4, 3, dtype=torch.float64)
    features[2, 1] = torch.nan
    with pytest.raises(UserError, match="features of sample 7 are not finite"):
        collector.add(torch.arange(5, 9), Output(features))


def test_too_few_samples_are_warned_about(reference_and_images):
    reference, _ = reference_and_images
    assert warnings(200, 108, reference) == []
    (warning,) = warnings(100, 108, reference)
    assert "100 samples for 108 features" in warning
    assert "too large" in warning


def _fails(phrases: list[str], *argv: str) -> None:
    code, message = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 2, message
    assert all(phrase in message for phrase in phrases), message
    assert "Traceback" not in message


def test_mistakes_at_the_command_line(reference_and_images, tmp_path, trained, digits):
    reference, array = reference_and_images
    ref, npz = str(tmp_path / "ref.npz"), str(tmp_path / "set.npz")
    reference.save(ref)
    np.savez(npz, arr_0=array)
    # A reference from another extractor: both are named.
    _fails(["pixels", "latents", "use one for both"], "evaluate", trained, "--reference", ref, "--num", "64")
    # Images of another size than the reference's, or of two sizes in one set.
    np.savez(tmp_path / "small.npz", arr_0=_images(20, size=4))
    _fails(["4x4", "6x6"], "evaluate", str(tmp_path / "small.npz"), "--reference", ref, *PIXELS)
    Image.fromarray(_images(1, size=9)[0]).save(tmp_path / "images" / "zz.png")
    _fails(["9x9", "6x6", "zz.png"], "evaluate", "--make-reference", f"{tmp_path}/images", "--out", ref, *PIXELS)
    _fails(["latents", "pixels"], "evaluate", "--make-reference", npz, "--out", ref)
    _fails(["--out"], "evaluate", "--make-reference", npz, *PIXELS)
    _fails(["/nowhere"], "evaluate", "--make-reference", "/nowhere", "--out", ref, *PIXELS)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    _fails(["broken.npz"], "evaluate", npz, "--reference", f"{tmp_path}/broken.npz", *PIXELS)
    _fails(["evaluation.reference"], "evaluate", npz, *PIXELS)


def test_a_set_of_images_against_itself_by_the_command(reference_and_images, tmp_path):
    np.savez(tmp_path / "set.npz", arr_0=reference_and_images[1])
    ref = str(tmp_path / "ref.npz")
    argv = ["evaluate", "--make-reference", str(tmp_path / "set.npz"), "--out", ref, *PIXELS]
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 0, output
    assert "300 images, 108 features of pixels" in output
    metrics = "evaluation.metrics=[frechet,kernel,precision_recall,density_coverage]"
    argv = ["evaluate", str(tmp_path / "set.npz"), "--reference", ref, metrics, *PIXELS]
    code, output = ranks.run(ranks.command_and_output, 2, *argv)[0]
    assert code == 0, output
    assert "frechet_pixels  0.0000" in output or "frechet_pixels  -0.0000" in output
    for line in ("precision_pixels  1.0000", "recall_pixels  1.0000", "coverage_pixels  1.0000"):
        assert line in output
    np.savez(tmp_path / "few.npz", arr_0=reference_and_images[1][:20])
    argv = ["evaluate", str(tmp_path / "few.npz"), "--reference", ref, *PIXELS]
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 0, output
    assert "warning: 20 samples for 108 features" in output


def test_metrics_that_need_more_than_there_is(reference_and_images):
    reference, _ = reference_and_images
    collector = Collector(20, 20)
    collector.add(torch.arange(20), Output(torch.randn(20, 108, dtype=torch.float64)))
    features = collector.merge_ranks()
    bare = Reference(reference.mean, reference.covariance, None, None, None, {})
    with pytest.raises(UserError, match="moments only"):
        measure(["kernel"], features, bare, Flat("pixels"))
    with pytest.raises(UserError, match="logits"):
        measure(["inception_score"], features, reference, Flat("pixels"))
