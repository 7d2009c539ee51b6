"""`imm-scale evaluate`: a checkpoint, all of a run's as they come, a search, a reference to make, a set of images."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imm_scale import build, storage
from imm_scale.checkpoint import export
from imm_scale.config.schema import Config
from imm_scale.data.manifest import Manifest
from imm_scale.errors import UserError
from imm_scale.evaluation import gallery, images, networks, reference, watch
from imm_scale.evaluation import guidance_search as search
from imm_scale.evaluation.evaluator import Evaluator
from imm_scale.evaluation.records import FOLDER
from imm_scale.evaluation.sets import measure_images
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling import guides
from imm_scale.sampling import source as sources
from imm_scale.sampling.job import open_artifacts
from imm_scale.sampling.source import Source

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Arguments:
    """The command's own flags.

    Attributes:
        source: run, checkpoint, export, or set of images; None with make_reference.
        guidance: scales, each evaluated; none takes the config's.
        watch, poll: evaluate checkpoints as they come, looking every so many seconds.
        search: words such as guidance=1.0:3.0 steps=1,2.
        make_reference: what to make a reference of.
        out: the reference to write, or the folder for evaluations of exports.
        gallery: other sources to draw beside this one, or None for no gallery.
    """

    source: str | None
    guidance: tuple[float, ...] = ()
    watch: bool = False
    poll: float = 30.0
    search: tuple[str, ...] = ()
    make_reference: str | None = None
    out: str | None = None
    gallery: tuple[str, ...] | None = None


def run(arguments: Arguments, overrides: Sequence[str], world: World, announce: Announce) -> None:
    """Raises UserError for flags that do not go together, and whatever else the user can mend."""
    if arguments.poll <= 0:
        raise UserError(f"--poll {arguments.poll} must be above 0")
    if arguments.make_reference is not None:
        _make_reference(arguments, overrides, world, announce)
        return
    if arguments.source is None:
        raise UserError("name a run, a checkpoint, exported weights or a set of images to evaluate")
    if arguments.watch:
        watch.wait_for_run(arguments.source, announce if world.is_main else lambda line: None, arguments.poll)
    elif not export.is_export(arguments.source) and images.is_image_set(arguments.source):
        config = sources.config_of(Source(""), overrides)
        distributed.init(world)
        measure_images(images.find(arguments.source), config, world, announce)
        return
    source = sources.find(arguments.source)
    if arguments.out is not None and source.run_dir is not None:
        raise UserError(f"--out {arguments.out}: evaluations of a run lie in its folder, leave --out away")
    config = sources.config_of(source, overrides)
    distributed.init(world)
    _evaluate(arguments, source, config, world, announce)


def _evaluate(arguments: Arguments, source: Source, config: Config, world: World, announce: Announce) -> None:
    scales = arguments.guidance or (config.sampling.guidance_scale,)
    if not arguments.search:
        guides.check_scales(config.sampling, scales)

    def at_all_scales(evaluator: Evaluator) -> None:
        for scale in scales:
            sampling = dataclasses.replace(config.sampling, guidance_scale=scale)
            evaluator.evaluate(sampling, config.evaluation)

    def loaded(newest: Source) -> Evaluator:
        evaluator = Evaluator(newest, config, world, announce, arguments.out or FOLDER)
        assert evaluator.model is not None  # read now, before the run removes it
        return evaluator

    def prepare(step_source: Source) -> Callable[[], object]:
        evaluator = loaded(step_source)
        if world.is_main:
            announce(f"step {step_source.step}")
        return lambda: at_all_scales(evaluator)

    if arguments.watch:
        watch.watch(config, world, prepare, announce, arguments.poll)
    elif arguments.search:
        _search(arguments, source.use_newest(world, loaded)[1], announce)
    elif arguments.gallery is not None:
        others = [sources.find(url) for url in arguments.gallery]
        gallery.write(source, others, config, world, announce)
    else:
        at_all_scales(source.use_newest(world, loaded)[1])


# --- search ---

_TOLERANCE = 0.05  # of w; the distance is flat around its minimum
_MOST_POINTS = 10


def _search(arguments: Arguments, evaluator: Evaluator, announce: Announce) -> None:
    config = evaluator.config
    search_range = search.parse(arguments.search, config.evaluation.steps)
    optima = []
    for steps in search_range.steps:
        evaluation = dataclasses.replace(config.evaluation, steps=[steps])

        def measure(guidance: float, evaluation=evaluation) -> tuple[float, ...]:  # type: ignore[no-untyped-def]
            sampling = dataclasses.replace(config.sampling, guidance_scale=guidance)
            return tuple(evaluator.evaluate(sampling, evaluation)["results"][0]["values"])

        optima.append(search.minimize(steps, measure, search_range.low, search_range.high, _TOLERANCE, _MOST_POINTS))
    lines = [best.describe() for best in optima]
    if evaluator.world.is_main:
        announce("\n".join(lines))
        _write_search(arguments, evaluator, optima)


def _write_search(arguments: Arguments, evaluator: Evaluator, optima: Sequence[search.Best]) -> None:
    """RUN/searches/step-NNNNNNNN-ID.json; the points themselves are ordinary evaluation files."""
    if evaluator.source.run_dir is None:
        return
    sampling = evaluator.config.sampling
    computed: dict[str, object] = {"precision": sampling.precision, "compile": sampling.compile}
    if evaluator.model.guide is not None:
        computed["guide"] = evaluator.model.guide.text
    key = hashlib.sha256(json.dumps([*arguments.search, computed, *map(str, optima)]).encode()).hexdigest()[:12]
    url = storage.join(evaluator.source.run_dir, "searches", f"step-{evaluator.source.step:08d}-{key}.json")
    storage.write_text(
        url, json.dumps({"asked": arguments.search, **computed, "best": [best.as_dict() for best in optima]}, indent=1)
    )


# --- reference ---


def _make_reference(arguments: Arguments, overrides: Sequence[str], world: World, announce: Announce) -> None:
    source = arguments.make_reference
    assert source is not None
    if arguments.out is None or not arguments.out.endswith(".npz"):
        raise UserError(f"--make-reference {source} needs --out FILE.npz")
    config = sources.config_of(Source(""), overrides)
    distributed.init(world)
    device = distributed.device(world)
    extractor = networks.open_extractor(config.evaluation.extractor, device)
    most = config.evaluation.compared
    if source.endswith(".json"):
        space = build.space(config, Manifest.load(source))
        decode = open_artifacts(space, config.sampling, device) if extractor.takes == "images" else None
        statistics = reference.of_manifest(source, extractor, most, world, config.seed, space, decode)
    else:
        statistics = reference.of_images(images.find(source), extractor, most, world)
    if world.is_main:
        statistics.save(arguments.out)
        announce(
            f"{arguments.out}: {statistics.count} images, {len(statistics.mean)} features of {extractor.name}, "
            f"id {statistics.id[:12]}"
        )
