"""Metrics of a set of images that lies somewhere, whoever drew it."""

from collections.abc import Callable
from typing import Any

from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.evaluation import measures, networks
from imm_scale.evaluation.collect import Collector
from imm_scale.evaluation.images import ImageSet
from imm_scale.evaluation.records import with_error
from imm_scale.evaluation.reference import open_reference, shown
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World


def measure_images(images: ImageSet, config: Config, world: World, announce: Callable[[str], None]) -> dict[str, Any]:
    """Measures all images of a set against `evaluation.reference` and says the results.

    Returns:
        {name: {value, error, numerical_error}}.

    Raises:
        UserError: no reference, one of another extractor, or an extractor that takes latents.
    """
    evaluation = config.evaluation
    if evaluation.reference is None:
        raise UserError(f"{images.url} needs something to compare with: set evaluation.reference=FILE.npz")
    extractor = networks.open_extractor(evaluation.extractor, distributed.device(world))
    if extractor.takes != "images":
        raise UserError(f"{images.url} holds images: set evaluation.extractor.kind=pixels, torchscript or onnx")
    reference = open_reference(evaluation, extractor)
    measures.check(evaluation)
    height, width = next(images.read())[1].shape[1:3]
    reference.check(extractor, (height, width))
    measures.check_reference(evaluation.metrics, reference)
    collector = Collector(len(images), evaluation.compared, "image")
    for index, batch in shown(images.read(world.rank, world.size), len(images), world):
        collector.add(index, extractor(batch))
    results = measures.measure(evaluation.metrics, collector.merge_ranks(), reference, extractor)
    if world.is_main:
        for line in measures.warnings(len(images), len(reference.mean), reference):
            announce(f"warning: {line}")
        for name, one in results.items():
            announce(f"{name}  {with_error(one.value, one.error)}  ({len(images)} images)")
    return {name: one._asdict() for name, one in results.items()}
