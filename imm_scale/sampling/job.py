"""The job of `imm-scale sample`: many samples on many ranks, kept part by part, then written as asked for."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from imm_scale import precision, storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export, run_folder
from imm_scale.config.schema import SamplingConfig
from imm_scale.data.spaces import Artifacts, SampleSpace
from imm_scale.data.tokens.spaces import Tokens
from imm_scale.errors import UserError
from imm_scale.methods.samplers import SAMPLES_PER_CALL
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling import guides, outputs, profiles, set_record
from imm_scale.sampling.check import check
from imm_scale.sampling.draw import Drawer, SamplingPlan, check_machine, plan_of
from imm_scale.sampling.guides import Guide
from imm_scale.sampling.parts import Parts
from imm_scale.sampling.source import Source

Announce = Callable[[str], None]
TELL_SECONDS = 60.0
_ENDINGS = {
    "grid": ".png", "text": ".txt", "jsonl": ".jsonl", "npz": ".npz", "folder": "", "webdataset": ".shards"
}  # fmt: skip
READS = ("plugins", "sampling.")  # keys of the config


@dataclass(frozen=True)
class Request:
    """What is asked for beside the samples themselves.

    Attributes:
        out: folder to write to; None: `folder_of` what is drawn from.
        formats: of `outputs.FORMATS`; none takes those that the samples are usually looked at in.
        latents: whether the normalized latents are kept in npz and WebDataset.
        guidance: scales, each with all step counts.
        typed: keys of the config that were given for this job.
    """

    out: str | None
    guidance: tuple[float, ...]
    formats: tuple[str, ...] = ()
    latents: bool = False
    typed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in outputs.FORMATS]
        if unknown:
            raise UserError(f"--format {','.join(self.formats)}: choose of {', '.join(outputs.FORMATS)}")
        if self.latents and self.formats and not {"npz", "webdataset"} & set(self.formats):
            raise UserError(f"--latents does nothing with --format {','.join(self.formats)}: add npz or webdataset")


def folder_of(source: Source) -> str:
    """Where samples of a source go by default: in the run's folder, by step; of other weights, here."""
    if source.run_dir is None:
        return "samples"
    return storage.join(source.run_dir, "samples", f"step-{source.step:08d}")


@dataclass(frozen=True)
class Model:
    """Weights ready to draw images with, or latents alone where there is no codec."""

    spec: ModelSpec
    net: Any
    artifacts: Artifacts | None
    weights_id: str
    guide: Guide | None = None

    @classmethod
    def load(cls, source: Source, config: SamplingConfig, device: torch.device, decoding: bool = True) -> "Model":
        """Raises UserError for weights or a codec that are not there, or what this machine cannot compute."""
        check_machine(config)
        spec, net = export.load_net(source.weights_url, config.ema)
        artifacts = open_artifacts(spec.space, config, device) if decoding else None
        model = cls(spec, net.to(device), artifacts, export.identity(spec, net))
        guide = guides.load(source, config)
        return model if guide is None else model.guided_by(guide)

    def guided_by(self, guide: Guide) -> "Model":
        """The model with a guide. Raises UserError for one that does not fit."""
        guide.net.to(next(self.net.parameters()).device)
        guided = guides.put(self.net, self.spec, self.weights_id, guide)
        return dataclasses.replace(self, net=guided, guide=guide)

    def guide_of(self, plan: SamplingPlan) -> Guide | None:
        """The guide where a plan uses it."""
        return self.guide if plan.guidance_scale != 1.0 else None

    def decode(self, z_N: Tensor) -> Tensor:
        """uint8 (N, H, W, channels) images of samples (N, ...). Raises UserError for samples that are none."""
        return self.shown(z_N)

    @property
    def shown(self) -> Artifacts:
        """What makes files and images of samples."""
        assert self.artifacts is not None, "loaded for latents alone"
        return self.artifacts

    def formats(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Formats of samples, as a request has them. Raises UserError for what these samples cannot be written in."""
        for name in wanted:
            if name not in self.shown.formats:
                raise UserError(f"--format {name}: these samples can be {', '.join(self.shown.formats)}")
        return wanted or self.shown.formats[:2]


def open_artifacts(space: SampleSpace, config: SamplingConfig, device: torch.device) -> Artifacts:
    """What makes images of samples, as the `sampling` section wants it. Raises UserError as `space.artifacts` does."""
    if space.needs_decoder:
        precision.check(config.vae_precision, "sampling.vae_precision")
    return space.artifacts(config.vae, device, config.vae_precision)


def run(source: Source, config: SamplingConfig, request: Request, world: World, announce: Announce) -> None:
    """Draws and writes every (guidance, steps) of the request; what a stopped job finished is kept.

    Args:
        announce: is told on rank 0 what was written, and how fast.

    Raises:
        UserError: whatever the user can mend.
    """
    storage.check_writable(request.out or source.run_dir or ".")
    check(source, config, request.guidance, config.steps, request.typed)
    device = distributed.device(world)
    source, model = source.use_newest(world, lambda newest: Model.load(newest, config, device))
    if request.latents and isinstance(model.spec.space, Tokens):
        raise UserError("--latents: tokens are drawn as they are, and every format but text has them; leave it out")
    announce = announce if world.is_main else _silent
    for warning in export.warnings(source.weights_url, config.ema) if world.is_main else []:
        announce(f"warning: {warning}")
    shown = {"labels": f"labels-{config.labels}", "times": f"grid-{config.grid}", **_average(config)}
    by_steps = profiles.written_out(source, config, config.steps, model.weights_id)
    sets = []  # all of them before the first is drawn: what cannot be drawn is said at once
    for scale in request.guidance:
        for steps, section in by_steps.items():
            chosen = dataclasses.replace(section, guidance_scale=scale)
            plan = plan_of(chosen, model.spec, steps, config.num, config.seed)
            sets.append(_SetOfSamples(model, plan, request, source, world, announce, shown))
    for one in sets:
        one.finish()


def _average(config: SamplingConfig) -> dict[str, str]:
    """What stands for the weights in the name of a set, where the user chose among a run's averages."""
    if config.ema is None:
        return {}
    return {"weights": f"ema-{config.ema!r}" if config.ema != export.RAW_WEIGHTS else "raw-weights"}


def _silent(line: str) -> None:
    """What the other ranks announce."""


def stem(plan: SamplingPlan, guide: Guide | None = None) -> str:
    """Name of a set of samples."""
    guidance = "" if plan.guidance_scale == 1.0 else f"-guidance-{plan.guidance_scale:g}"
    counts = "-".join(str(len(times) - 1) for times in plan.block_times) or str(plan.steps)
    given = "" if plan.given is None else f"-given-{plan.given.blocks}"
    given += "" if plan.known is None else f"-given-{plan.known.sha256[:8]}"
    return f"steps-{counts}{guidance}{given}" + ("" if guide is None else f"-guide-{guide.weights_id[:8]}")


class _SetOfSamples:
    """All samples of one plan."""

    def __init__(
        self,
        model: Model,
        plan: SamplingPlan,
        request: Request,
        source: Source,
        world: World,
        announce: Announce,
        shown: Mapping[str, str],
    ):
        self.model, self.plan, self.world = model, plan, world
        self.request = dataclasses.replace(request, formats=model.formats(request.formats))
        self.source, self.announce = source, announce
        self.drawer = Drawer(model.net, model.spec, plan)
        self.settings = self._settings()
        self.identity = set_record.identity(self.settings)
        self.folder, base = request.out or folder_of(source), stem(plan, model.guide_of(plan))
        self.name = distributed.from_main(
            lambda: set_record.begin(self.folder, base, self.settings, plan.num, shown), world
        )
        if self.name != base:
            announce(f"{storage.join(self.folder, base)} holds other samples: these go to {self.name}")
        self.stem = storage.join(self.folder, self.name)
        self.parts = Parts(f"{self.stem}.shards", self.identity, plan.batches)

    def _settings(self) -> dict[str, Any]:
        """All that decides the bits of a sample."""
        plan, spec, guide = self.plan, self.model.spec, self.model.guide_of(self.plan)
        labels = hashlib.sha256(json.dumps(plan.labels).encode()).hexdigest()
        return {
            "weights": self.model.weights_id,
            "steps": plan.steps,
            "times": self.drawer.times.tolist(),
            "sampler": plan.sampler,
            "seed": plan.seed,
            "guidance_scale": plan.guidance_scale,
            "guidance_interval": list(plan.guidance_interval),
            "labels": f"sha256 {labels}" if len(plan.labels) > 1000 else list(plan.labels),
            "precision": plan.precision,
            "compile": plan.compile,
            "space": spec.space.to_fields(),
            "vae_precision": self.model.artifacts.precision if self.model.artifacts is not None else None,
            "latents": self.request.latents,
            "samples_per_call": SAMPLES_PER_CALL,
            "device": next(self.model.net.parameters()).device.type,
            "torch": torch.__version__,
            **({} if guide is None else {"guide": guide.weights_id}),
            **({"order": plan.order} if plan.sampler == "unmask" else {}),
            **({"block_times": [list(times) for times in plan.block_times]} if plan.block_times else {}),
            **({"given": [plan.given.sha256, plan.given.blocks]} if plan.given is not None else {}),
            **({"known": plan.known.sha256} if plan.known is not None else {}),
        }

    # --- drawing ---

    def finish(self) -> None:
        """Draws what is missing, writes what was asked for, and says so."""
        if self._is_finished():
            self.announce("\n".join(f"{self._output(name)} is there already" for name in self.request.formats))
            return
        began = time.perf_counter()
        missing = self._missing()
        self._draw(missing)
        distributed.barrier()
        seconds = time.perf_counter() - began
        written = self._write_outputs()
        drawn = sum(stop - start for start, stop in (self.parts.ranges[part] for part in missing))
        reused = self.plan.num - drawn
        speed = f"{drawn} samples in {seconds:.1f} s, {drawn / seconds:.1f} a second on {self.world.size} ranks"
        self._close(written, {"seconds": seconds, "samples_drawn": drawn, "samples_kept": reused})
        reuse_note = f"; {reused} were there already" if reused else ""
        self.announce("\n".join([*written, f"{self.name}: {speed}{reuse_note}"]))

    def _missing(self) -> list[int]:
        """Parts yet to be drawn, the same list on every rank; ranks share the checking."""
        if self.world.is_main:
            self._write_record(set_record.unfinished(self.settings, self.plan.num))
            self.parts.clear()
        distributed.barrier()
        missing = torch.zeros(len(self.parts.ranges), dtype=torch.int64)
        for part in range(self.world.rank, len(missing), self.world.size):
            missing[part] = not self.parts.is_intact(part)
        return distributed.all_sum(missing).nonzero()[:, 0].tolist()

    def _draw(self, missing: Sequence[int]) -> None:
        mine = missing[self.world.rank :: self.world.size]
        total = sum(stop - start for start, stop in (self.parts.ranges[part] for part in mine))
        hidden = None if self.world.is_main else True  # None: shown on a terminal only
        name = self.name + (f", rank 0 of {self.world.size}" if self.world.size > 1 else "")
        last_report = began = time.monotonic()
        with tqdm(total=total, desc=name, unit="sample", disable=hidden) as bar:
            for done, part in enumerate(mine):
                # No terminal: a line in the job's log.
                if bar.disable and time.monotonic() - last_report > TELL_SECONDS:
                    last_report = time.monotonic()
                    self.announce(f"{name}: {done} of {len(mine)} parts after {last_report - began:.0f} s")
                start, stop = self.parts.ranges[part]
                _, label, z = self.drawer.draw(start, stop)
                latents = z.float().numpy() if self.request.latents else None
                self.parts.write(part, self.model.shown.files(z), label.tolist(), latents)
                bar.update(stop - start)

    # --- outputs ---

    def _write_record(self, record: Mapping[str, Any]) -> None:
        storage.write_text(set_record.url(self.folder, self.name), json.dumps(record, indent=1))

    def _is_finished(self) -> bool:
        """Whether an earlier job wrote all outputs of these samples; rank 0 looks. Shards are checked one by one."""
        finished = False
        record = set_record.read(self.folder, self.name) if self.world.is_main else None
        if record is not None and record.get("finished", True) and "webdataset" not in self.request.formats:
            finished = record["identity"] == self.identity and record["num"] == self.plan.num
            finished = finished and set(self.request.formats) <= set(record["formats"])
            finished = finished and all(storage.exists(self._output(name)) for name in self.request.formats)
        return bool(distributed.all_sum(torch.tensor(int(finished))))

    def _output(self, name: str) -> str:
        return self.stem + _ENDINGS[name]

    def _write_outputs(self) -> list[str]:
        formats = self.request.formats
        of_rank_0 = {"grid": outputs.write_grid, "text": outputs.write_text, "jsonl": outputs.write_jsonl}
        for name, write in of_rank_0.items() if self.world.is_main else ():
            if name in formats:
                write(self._output(name), self.parts)
        if self.world.is_main and "npz" in formats:
            outputs.write_npz(self._output("npz"), self.parts, {"num": self.plan.num, **self.settings})
        if "folder" in formats:
            outputs.write_folder(self._output("folder"), self.parts, self.world)
        distributed.barrier()
        return [self._output(name) for name in formats]

    def _close(self, written: list[str], speed: dict[str, Any]) -> None:
        """The record of the whole, last of all; then the parts go, unless they are wanted as they are."""
        guide = self.model.guide_of(self.plan)
        record = {
            **set_record.unfinished(self.settings, self.plan.num),
            "finished": True,
            "formats": list(self.request.formats),
            "outputs": written,
            "source": storage.shown(self.source.url),
            "guide": None if guide is None else guide.text,
            "function_evaluations": self.plan.function_evaluations(self.drawer.times),
            "ranks": self.world.size,
            "versions": run_folder.versions(),
            **speed,
        }
        if self.world.is_main:
            self._write_record(record)
            if "webdataset" not in self.request.formats:
                storage.remove(self.parts.folder)
        distributed.barrier()
