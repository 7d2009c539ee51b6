"""`imm-scale evaluate`: a checkpoint, all of a run's as they come, a search, a reference to make, a set of images."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from imm_scale import build, storage
from imm_scale import config as configs
from imm_scale.checkpoint import export
from imm_scale.checkpoint.format import committed_steps
from imm_scale.config.schema import Config, SamplingConfig
from imm_scale.data.manifest import Manifest
from imm_scale.errors import UserError
from imm_scale.evaluation import cost_quality, evaluators, gallery, images, measures, networks, reference, watch
from imm_scale.evaluation import guidance_search as search
from imm_scale.evaluation.evaluators import tokens
from imm_scale.evaluation.evaluators.base import Evaluator
from imm_scale.evaluation.evaluators.distances import check_reference
from imm_scale.evaluation.records import FOLDER, Conditions
from imm_scale.evaluation.sets import measure_images
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling import check as samples
from imm_scale.sampling import source as sources
from imm_scale.sampling.job import open_artifacts
from imm_scale.sampling.source import Source

Announce = Callable[[str], None]
# Keys of the config that each way of evaluating reads
_SAMPLING = (*(f"sampling.{item.name}" for item in dataclasses.fields(SamplingConfig)), "sampling.guide.")
_OF_SAMPLES = tuple(key for key in _SAMPLING if key not in ("sampling.steps", "sampling.num"))
_OF_GALLERY = tuple(key for key in _SAMPLING if key not in ("sampling.num", "sampling.grid", "sampling.batch_size"))
_COMMON = ("plugins", "seed", "data.manifest", "data.holdout_manifest")
_IMAGE_READS = (
    *("plugins", "evaluation.metrics", "evaluation.reference", "evaluation.reference_entry"),
    *("evaluation.compared", "evaluation.extractor."),
)
_REFERENCE_READS = (
    *("plugins", "seed", "data.space.", "evaluation.compared", "evaluation.extractor."),
    *("sampling.vae", "sampling.vae_precision"),
)
READS = (*_COMMON, "evaluation.", *_OF_SAMPLES)


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
        may_come: whether the run may be started later.
    """

    source: str | None
    guidance: tuple[float, ...] = ()
    watch: bool = False
    poll: float | None = None
    search: tuple[str, ...] = ()
    make_reference: str | None = None
    out: str | None = None
    gallery: tuple[str, ...] | None = None
    may_come: bool = False


def check(arguments: Arguments, overrides: Sequence[str]) -> None:
    """What can be known before weights or images are read, and before a job waits in a queue. Raises UserError."""
    _check_flags(arguments)
    if arguments.make_reference is not None:
        _check_files(sources.config_of(Source(""), overrides, _REFERENCE_READS), arguments.make_reference)
    elif arguments.source is None:
        raise UserError("name a run, a checkpoint, exported weights or a set of images to evaluate")
    elif _is_image_set(arguments):
        _refuse(arguments, "a set of images is measured as it is", "guidance", "search", "gallery", "out")
        _check_measures(sources.config_of(Source(""), overrides, _IMAGE_READS), configs.settings_of(overrides))
    else:
        is_there = not arguments.may_come or storage.exists(storage.join(arguments.source, "config.yaml"))
        source = sources.find(arguments.source) if is_there else Source("")
        if arguments.out is not None and source.run_dir is not None:
            raise UserError(f"--out {arguments.out}: evaluations of a run lie in its folder, leave --out away")
        config = sources.config_of(source, overrides, _reads(arguments))
        if is_there:  # of a run that comes later nobody knows the config yet
            _check_samples(arguments, source, config, configs.settings_of(overrides))
    if arguments.out is not None:
        storage.check_writable(storage.parent(arguments.out))


def _is_image_set(arguments: Arguments) -> bool:
    url = arguments.source
    assert url is not None
    return not arguments.watch and not export.is_export(url) and images.is_image_set(url)


def _check_files(config: Config, *others: str) -> None:
    """Raises UserError for files that are named and not there."""
    evaluation = config.evaluation
    named = {"evaluation.reference": evaluation.reference, "evaluation.extractor.file": evaluation.extractor.file}
    for key, url in [*named.items(), *(("--make-reference", other) for other in others)]:
        if url is not None and not storage.exists(url):
            raise UserError(f"{key}={url} does not exist")


def _check_measures(config: Config, typed: Collection[str]) -> None:
    """Raises UserError for what no samples could be measured by."""
    _check_files(config)
    networks.check(config.evaluation.extractor, typed)
    measures.check(config.evaluation)


def _check_samples(arguments: Arguments, source: Source, config: Config, typed: Collection[str]) -> None:
    """Raises UserError for samples that could not be drawn, or not be measured, before anything is read."""
    scales, steps = _scales(arguments, config)
    for scale in scales:
        configs.changed(config, {"sampling.guidance_scale": scale}, f"guidance {scale:g}")
    if evaluators.measures_tokens(source, config):
        _check_tokens(arguments, config, typed)
    else:
        _check_measures(config, typed)
        if arguments.gallery is None:
            check_reference(config)
    sampling = config.sampling
    if arguments.gallery is not None:
        steps, sampling = sampling.steps, dataclasses.replace(sampling, grid="auto")
    if not (arguments.may_come and source.run_dir is not None and not committed_steps(source.run_dir)):
        samples.check(source, sampling, scales, steps, typed)
    elif config.data.manifest is not None and storage.exists(config.data.manifest):
        spec = build.model_spec(config, Manifest.load(config.data.manifest))
        samples.check_before_training(spec, sampling, scales, steps, typed)


def _check_tokens(arguments: Arguments, config: Config, typed: Collection[str]) -> None:
    """Raises UserError where there is nothing to measure, or for what is asked of tokens and does nothing."""
    _refuse(arguments, "tokens have likelihoods, no guidance to look for and no pictures", "search", "gallery")
    tokens.check(config)
    tokens.refuse_idle(typed)


def run(arguments: Arguments, overrides: Sequence[str], world: World, announce: Announce) -> None:
    """Raises UserError for flags that do not go together, and whatever else the user can mend."""
    check(arguments, overrides)
    if arguments.make_reference is not None:
        _make_reference(arguments, overrides, world, announce)
        return
    assert arguments.source is not None
    if arguments.watch:
        _check_watched(arguments.source)
        watch.wait_for_run(arguments.source, announce if world.is_main else lambda line: None, _poll(arguments))
    elif _is_image_set(arguments):
        config = sources.config_of(Source(""), overrides, _IMAGE_READS)
        distributed.init(world)
        measure_images(images.find(arguments.source), config, world, announce)
        return
    source = sources.find(arguments.source)
    config = sources.config_of(source, overrides, _reads(arguments))
    distributed.init(world)
    _evaluate(arguments, source, config, world, announce)


def _check_watched(url: str) -> None:
    """Raises UserError for weights that no run will follow: it would be waited for without end."""
    if export.is_export(url) or export.is_checkpoint(url):
        raise UserError(f"{url} --watch: checkpoints come of a run folder, and this holds weights; leave --watch out")


def _reads(arguments: Arguments) -> tuple[str, ...]:
    if arguments.gallery is not None:
        return (*_COMMON, "evaluation.extractor.", *_OF_GALLERY)
    return tuple(key for key in READS if not arguments.search or key != "sampling.guidance_scale")


_WATCH_SECONDS = 30.0


def _poll(arguments: Arguments) -> float:
    return _WATCH_SECONDS if arguments.poll is None else arguments.poll


def _check_flags(arguments: Arguments) -> None:
    """Raises UserError for flags of which one would do nothing."""
    if arguments.poll is not None and not arguments.watch:
        raise UserError(f"--poll {arguments.poll:g} is for --watch: leave it out, or add --watch")
    if not 0 < _poll(arguments) < float("inf"):
        raise UserError(f"--poll {arguments.poll} must be above 0")
    if arguments.make_reference is not None:
        if arguments.out is None or not arguments.out.endswith(".npz"):
            raise UserError(f"--make-reference {arguments.make_reference} needs --out FILE.npz")
        _refuse(arguments, "--make-reference draws no samples", "source", "guidance", "watch", "search", "gallery")
    elif arguments.watch:
        _refuse(arguments, "--watch measures checkpoints of a run", "search", "gallery", "out")
    elif arguments.search:
        _refuse(arguments, "--search chooses the guidance itself", "guidance", "gallery", "out")
    elif arguments.gallery is not None:
        _refuse(arguments, "--gallery draws at sampling.guidance_scale, into the run's folder", "guidance", "out")


def _refuse(arguments: Arguments, why: str, *flags: str) -> None:
    """Raises UserError where one of the flags is given."""
    for flag in flags:
        value = getattr(arguments, flag)
        if value in (None, False) or (value == () and flag != "gallery"):  # () is a gallery of the run alone
            continue
        shown = value if isinstance(value, str) else "" if value is True else ",".join(map(str, value))
        given = shown if flag == "source" else f"--{flag} {shown}".rstrip()
        raise UserError(f"{given}: {why}; leave it out")


def _scales(arguments: Arguments, config: Config) -> tuple[Sequence[float], Sequence[int]]:
    """Scales of guidance, of a search the ends of its range, and the step counts."""
    if arguments.search:
        limits = search.parse(arguments.search, config.evaluation.steps)
        return (limits.low, limits.high), limits.steps
    return arguments.guidance or (config.sampling.guidance_scale,), config.evaluation.steps


def _evaluate(arguments: Arguments, source: Source, config: Config, world: World, announce: Announce) -> None:
    scales = _scales(arguments, config)[0]

    def at_all_scales(evaluator: Evaluator) -> None:
        for scale in scales:
            sampling = dataclasses.replace(config.sampling, guidance_scale=scale)
            evaluator.evaluate(sampling, config.evaluation)

    def loaded(newest: Source) -> Evaluator:
        evaluator = evaluators.choose(newest, config, world, announce, arguments.out or FOLDER)
        assert evaluator.model is not None  # read now, before the run removes it
        return evaluator

    def prepare(step_source: Source) -> Callable[[], object]:
        evaluator = loaded(step_source)
        if world.is_main:
            announce(f"step {step_source.step}")
        return lambda: at_all_scales(evaluator)

    if arguments.watch:
        watch.watch(config, world, prepare, announce, _poll(arguments))
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
    under: Conditions = {}
    for steps in search_range.steps:
        evaluation = dataclasses.replace(config.evaluation, steps=[steps])

        def measure(guidance: float, evaluation=evaluation) -> tuple[float, ...]:  # type: ignore[no-untyped-def]
            sampling = dataclasses.replace(config.sampling, guidance_scale=guidance)
            document = evaluator.evaluate(sampling, evaluation)
            (result,) = document["results"]
            under.update(cost_quality.setting(document, result))
            return tuple(result["values"])

        optima.append(search.minimize(steps, measure, search_range.low, search_range.high, _TOLERANCE, _MOST_POINTS))
    lines = [best.describe() for best in optima]
    lines.append(f"each of {under['repeats']} x {under['count']} samples, reference {under['reference']}")
    if evaluator.world.is_main:
        announce("\n".join(lines))
        _write_search(arguments, evaluator, optima, under)


def _write_search(arguments: Arguments, evaluator: Evaluator, optima: Sequence[search.Best], under: Conditions) -> None:
    """RUN/searches/step-NNNNNNNN-ID.json; the points themselves are ordinary evaluation files."""
    if evaluator.source.run_dir is None:
        return
    sampling = evaluator.config.sampling
    computed: dict[str, object] = {"precision": sampling.precision, "compile": sampling.compile}
    if evaluator.model.guide is not None:
        computed["guide"] = evaluator.model.guide.text
    key = hashlib.sha256(json.dumps([*arguments.search, computed, *map(str, optima)]).encode()).hexdigest()[:12]
    url = storage.join(evaluator.source.run_dir, "searches", f"step-{evaluator.source.step:08d}-{key}.json")
    best = [one.as_dict() for one in optima]
    storage.write_text(
        url, json.dumps({"asked": arguments.search, **computed, "conditions": under, "best": best}, indent=1)
    )


# --- reference ---


def _make_reference(arguments: Arguments, overrides: Sequence[str], world: World, announce: Announce) -> None:
    source = arguments.make_reference
    assert source is not None and arguments.out is not None
    config = sources.config_of(Source(""), overrides, _REFERENCE_READS)
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
