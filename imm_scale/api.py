"""The package from Python: load, sample, evaluate, train. Import them from `imm_scale`."""

import atexit
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imm_scale import config as configs
from imm_scale.config.schema import Config, SamplingConfig
from imm_scale.errors import UserError
from imm_scale.evaluation import command as evaluation
from imm_scale.evaluation import evaluators
from imm_scale.evaluation.records import FOLDER
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling import draw
from imm_scale.sampling import source as sources
from imm_scale.sampling.job import Model, open_artifacts
from imm_scale.training import trainer
from imm_scale.training.loop import Outcome


def load(
    source: str, ema: float | None = None, device: str | torch.device | None = None, *, vae: str | None = None
) -> Model:
    """Weights ready to sample from: in eval mode, without gradients.

    Args:
        source: folder of a run (its newest checkpoint) or of one checkpoint, or exported weights; any fsspec URL.
        ema: decay of the moving average; None the first of the run's config, 0 the raw weights. Exports hold one only.
        device: None takes this rank's GPU, the CPU where there is none.
        vae: folder or hub name of the AutoencoderKL that decodes vae latents; without it such a model gives latents
            alone.

    Returns:
        The model: `spec` says what it is, `net` is the net as its method wraps it, for flow maps `net(x, s, t, label)`
        is f_{s,t}(x), and `decode(z)` makes images.

    Raises:
        UserError: nothing to load there, an average that is not held, or another autoencoder than the data's.
    """
    where = torch.device(device) if device is not None else distributed.device(distributed.detect())
    config = SamplingConfig(ema=ema, vae=vae)
    model = Model.load(sources.find(source).at_newest(), config, where, decoding=False)
    if model.spec.space.needs_decoder and vae is None:
        return model
    return dataclasses.replace(model, artifacts=open_artifacts(model.spec.space, config, where))


def sample(
    source: str | Model,
    steps: int = 1,
    num: int | None = None,
    *,
    labels: str | Sequence[int] = "all",
    seed: int = 0,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    sampler: str = "auto",
    grid: str = "auto",
    latents: bool = False,
) -> Tensor:
    """Draws samples in this process: the bits that `imm-scale sample` writes at the same settings.

    The arguments decide them; the `sampling` section of a run's config is not read. `imm-scale sample` shares the work
    among ranks and goes on when stopped.

    Args:
        source: a loaded model, or what `load` takes.
        steps: steps of the sampler.
        num: samples, 64 if None; labels with counts say it themselves.
        labels: "all", "0-9", "3,7" or [3, 7]: classes in turn; "0:500,3-4:100": so many of each.
        seed: of the starting noise; sample i depends on it and on i alone.
        guidance: w of w G(label) + (1 - w) G(null); 1 is off.
        guidance_interval: (low, high] of t in which guidance is in force.
        sampler: auto (the first that fits the method), pushforward, restart, pushforward_restart or heun.
        grid: auto, uniform, edm, eta_1.4 or times as in "0.994,0.5,0".
        latents: normalized latents in place of images.

    Returns:
        (num, H, W, channels) uint8 images, or (num, C, H, W) fp32 latents, on CPU.

    Raises:
        UserError: what `load` raises, labels or a grid that do not fit, guidance without a null label, samples that
            are not finite, or images of vae latents without the autoencoder.
    """
    model = source if isinstance(source, Model) else load(source)
    if model.artifacts is None and not latents:
        raise UserError(
            "the model gives vae latents: name the autoencoder's folder, load(..., vae=FOLDER), or latents=True"
        )
    label_spec = labels if isinstance(labels, str) else ",".join(map(str, labels))
    if num is not None and draw.has_counts(label_spec):
        raise UserError(f"num={num} beside labels={label_spec!r}: the counts say how many, leave num out")
    config = SamplingConfig(
        labels=label_spec,
        guidance_scale=guidance,
        guidance_interval=list(guidance_interval),
        sampler=sampler,  # type: ignore[arg-type]  # SamplingPlan refuses another
        grid=grid,
    )
    plan = draw.plan_of(config, model.spec, steps, config.num if num is None else num, seed)
    batches = draw.sample(model.net, model.spec, plan)
    return torch.cat([z.float() if latents else model.decode(z) for _, _, z in batches])


def evaluate(
    source: str,
    steps: int | Sequence[int] | None = None,
    num: int | None = None,
    *,
    seed: int | None = None,
    repeats: int | None = None,
    guidance: float | None = None,
    reference: str | None = None,
    ema: float | None = None,
    overrides: Sequence[str] = (),
    out: str | None = None,
) -> dict[str, Any]:
    """Measures a model's samples against a reference, as `imm-scale evaluate` does; what was measured is read again.

    Whatever is None is as the run's config says, the defaults for exports. Under a launcher all ranks share the work.

    Args:
        source: folder of a run (its newest checkpoint) or of one checkpoint, or exported weights.
        steps: step counts, each evaluated.
        num: samples per sampling seed.
        seed: the first sampling seed.
        repeats: sampling seeds; their spread is the error.
        guidance: guidance scale w; 1 is off.
        reference: .npz of `imm-scale evaluate --make-reference`; else the training data.
        ema: decay of the moving average, 0 for the raw weights.
        overrides: further key=value words, as in "evaluation.metrics=[frechet,kernel]".
        out: folder for the files of an export, "evaluations" if None; those of a run lie in its folder.

    Returns:
        What the written files hold: `results`, one a step count, each with `metric`, `steps`, `value`, `error` and
        all `measures`; and what is needed to get them again.

    Raises:
        UserError: what `load` raises, unknown keys, or nothing to compare with.
    """
    weights = sources.find(source)
    if out is not None and weights.run_dir is not None:
        raise UserError(f"out={out!r}: evaluations of a run lie in its folder, leave out away")
    settings = {
        "evaluation.steps": [steps] if isinstance(steps, int) else steps and list(steps),
        "evaluation.num": num,
        "evaluation.repeats": repeats,
        "evaluation.reference": reference,
        "sampling.seed": seed,
        "sampling.guidance_scale": guidance,
        "sampling.ema": ema,
    }
    settings_overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
    config = sources.config_of(weights, [*settings_overrides, *overrides], evaluation.READS)
    with _ranks() as world:
        evaluator = evaluators.choose(weights, config, world, lambda line: None, out or FOLDER)
        return evaluator.evaluate(config.sampling, config.evaluation)


def train(config: str | Config, *words: str) -> Outcome:
    """Trains a run to its end, from its newest checkpoint if it has one, as `imm-scale train CONFIG WORD...` does.

    Args:
        config: a YAML file, or a config.
        words: further YAML files and key=value overrides.

    Returns:
        "completed", or "preempted" when a signal asked for it.

    Raises:
        UserError: whatever the user can mend; nothing that was committed is touched.
        RunError: steps that are skipped or spike again and again.
    """
    if isinstance(config, str):
        chosen = configs.load_words([config, *words]).config
    else:
        chosen = configs.changed(config, configs.settings_of(words), "train()")
    atexit.register(distributed.shutdown)  # not before: DeepSpeed keeps its groups for the next engine
    return trainer.train(chosen)


@contextlib.contextmanager
def _ranks() -> Iterator[World]:
    """This process among its peers, its process group started; one that was not there before ends afterwards."""
    was_started, world = dist.is_initialized(), distributed.detect()
    distributed.init(world)
    try:
        yield world
    finally:
        if not was_started:
            distributed.shutdown()
