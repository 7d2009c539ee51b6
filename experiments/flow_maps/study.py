"""What is compared, and under which protocol: the rows, the data sets, the sweeps over them, and their results.

A study is two sweeps on each data set: every row at every learning rate from one seed, then every row at its best rate
from the other seeds. All rows have the same net, images, order, batch, averages and number of forward passes.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments import common
from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.evaluation.records import read_evaluations
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.results import Outcome

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = (1, 2, 4, 8)  # every row is drawn in so many
CHECKPOINTS = 4  # of a run, evenly spaced
_RATE = "optimizer.lr"


@dataclass(frozen=True)
class Row:
    """A method as it is trained and drawn.

    Attributes:
        preset: file of configs/method it starts from; None for IMM as the data set's own recipe has it.
        settings: config keys laid over that.
        further: step counts beside `STEPS`.
        judged: step counts that decide its learning rate.
        group: which panel of the figures it stands in.
    """

    title: str
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    further: tuple[int, ...] = ()
    judged: tuple[int, ...] = STEPS
    group: str = "any"


_ANY, _TO_DATA, _SCALES = "jumps between any two times", "jumps to the data only", "time_scale"
ROWS = {
    "flow_matching": Row(
        "flow matching, Euler",
        settings={
            "method.name": "flow_matching",
            "method.flow_map.second_time": "none",
            "method.flow_map.time_scale": 1.0,
            "method.logit_normal": [-0.4, 1.0],
        },
        further=(16, 50),
        judged=(50,),
        group=_ANY,
    ),
    "imm": Row("IMM, as published (time_scale 1000)", group=_ANY),
    "imm_scale_1": Row("IMM, time_scale 1", settings={"method.flow_map.time_scale": 1.0}, group=_SCALES),
    "imm_tuned": Row(
        "IMM, time_scale 1, t - s, logit-normal t",
        settings={
            "method.flow_map.time_scale": 1.0,
            "method.flow_map.second_time": "t_minus_s",
            "method.logit_normal": [-0.4, 1.0],
        },
        group=_SCALES,
    ),
    "meanflow": Row("MeanFlow", "meanflow", group=_ANY),
    "meanflow_scale_1000": Row(
        "MeanFlow, time_scale 1000", "meanflow", {"method.flow_map.time_scale": 1000.0}, group=_SCALES
    ),
    "imf": Row("improved MeanFlow (loss alone)", "imf", group=_ANY),
    "alpha_flow": Row("alpha-Flow", "alpha_flow", group=_ANY),
    "soflow": Row("SoFlow", "soflow", group=_ANY),
    "shortcut": Row("shortcut", "shortcut", group=_ANY),
    "split_meanflow": Row("SplitMeanFlow", "split_meanflow", group=_ANY),
    "tvm": Row(
        "TVM, the net its own teacher",
        "tvm",
        {"method.teacher_decay": None, "ema.decays": [0.98]},
        group=_ANY,
    ),
    "ct": Row("consistency training, constant step", "ct", {"method.step.k": 10}, group=_TO_DATA),  # IMM's k here
    "ect": Row("easy consistency tuning, from scratch", "ect", group=_TO_DATA),
    "sct": Row("continuous-time consistency (sCT)", "sct", group=_TO_DATA),
}


@dataclass(frozen=True)
class DataSet:
    """Images or latents, and what a config of configs/stability.yaml needs for them."""

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """How much is trained.

    Attributes:
        base: config file under configs/ with the net, the batch and the evaluation.
        units: forward passes of one image in a run, those of the backward pass included, as `Passes.forwards`.
        rates: learning rates of the first sweep.
        seeds: training seeds; the first one decides the rates.
    """

    base: str
    units: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


SMALL = Protocol("stability.yaml", 460_800, (3e-4, 1e-3), (0, 1, 2))
FULL = Protocol("digits.yaml", 5_120_000, (1e-4, 3e-4, 1e-3, 3e-3), (0, 1, 2, 3, 4))


@dataclass(frozen=True)
class Run:
    """One finished (or diverged) run of a row at its best rate."""

    seed: int
    outcome: Outcome

    @cached_property
    def means(self) -> dict[int, float]:
        """{steps: distance}; {} for one that diverged."""
        return {result["steps"]: result["mean"] for result in self.outcome.results}


@dataclass(frozen=True)
class Study:
    """A protocol on a data set, below a folder."""

    data: DataSet
    protocol: Protocol
    folder: Path
    rows: tuple[str, ...] = tuple(ROWS)

    # --- training ---

    def run(self, at_once: int) -> None:
        """Trains and measures what is not there yet, so many runs side by side; goes on where it was stopped."""
        self._submit("rates", self._rates_file(), at_once)
        self._submit("seeds", self._seeds_file(), at_once)
        for name in self.rows:  # how distances fell during training
            common.run("imm_scale", "evaluate", self._runs(name)[0].outcome.cell.run_dir, "--watch", "--steps", "2")

    def _submit(self, stage: str, document: Mapping[str, Any], at_once: int) -> None:
        common.sweep(self.folder / f"{self.data.name}_{stage}.yaml", document, at_once)

    def _rates_file(self) -> dict[str, Any]:
        variants = {name: self._variant(ROWS[name]) for name in self.rows}
        return {
            **self._common("rates"),
            "variants": variants,
            "grid": {_RATE: list(self.protocol.rates)},
            "seeds": [self.protocol.seeds[0]],
        }

    def _seeds_file(self) -> dict[str, Any]:
        variants = {name: self._variant(ROWS[name]) | {_RATE: self.rate(name)} for name in self.rows}
        return {**self._common("seeds"), "variants": variants, "seeds": list(self.protocol.seeds[1:])}

    def _common(self, stage: str) -> dict[str, Any]:
        return {
            "name": f"{self.data.name}_{stage}",
            "description": f"Flow maps at equal forward passes on {self.data.title}.",
            "folder": str(self.folder / f"{self.data.name}_{stage}"),
            "configs": [str(CONFIGS / self.protocol.base)],
            "settings": dict(self.data.settings),
        }

    def _variant(self, row: Row) -> dict[str, Any]:
        """The row's settings, its run being as long as the units say and its schedules as long as the run."""
        settings = {**row.settings, "evaluation.steps": [*STEPS, *row.further]}
        files = [str(CONFIGS / "method" / f"{row.preset}.yaml")] if row.preset else []
        steps = CHECKPOINTS * round(self.protocol.units / self._units_of_a_step(files, settings) / CHECKPOINTS)
        settings |= {"train.max_steps": steps}
        settings |= dict.fromkeys(("train.checkpoint_every", "train.keep_every"), steps // CHECKPOINTS)
        if self._config(files, settings).method.name == "eulerian":
            settings["method.schedule_images"] = steps * self._config(files, {}).train.global_batch_size
        return {"include": files, **settings}

    def _config(self, files: Sequence[str], settings: Mapping[str, Any]) -> Config:
        base = configs.unfinished([str(CONFIGS / self.protocol.base), *files])
        shape = {"data.latent_shape": [1, 8, 8], "data.num_classes": 10, "method.schedule_images": 1}
        known = configs.entries(base)
        return configs.changed(base, {k: v for k, v in shape.items() if k in known} | dict(settings), "flow_maps")

    def _units_of_a_step(self, files: Sequence[str], settings: Mapping[str, Any]) -> float:
        config = self._config(files, settings)
        return definition.step_passes(config).forwards * config.train.global_batch_size

    # --- results ---

    @cached_property
    def _rates(self) -> list[Outcome]:
        return self._outcomes("rates")

    @cached_property
    def _seeds(self) -> list[Outcome]:
        return self._outcomes("seeds")

    def _outcomes(self, stage: str) -> list[Outcome]:
        return results.outcomes(definition.load(str(self.folder / f"{self.data.name}_{stage}")))

    @cached_property
    def _by_rate(self) -> dict[str, dict[float, Outcome]]:
        found: dict[str, dict[float, Outcome]] = {}
        for outcome in self._rates:
            found.setdefault(outcome.cell.factors["variant"], {})[outcome.cell.factors[_RATE]] = outcome
        return found

    def scores(self, name: str) -> dict[float, float]:
        """{learning rate: geometric mean of the judged distances}; infinite for a run that diverged."""
        return {rate: _score(outcome, ROWS[name].judged) for rate, outcome in self._by_rate[name].items()}

    def rate(self, name: str) -> float:
        """The learning rate that did best from the first seed."""
        scores = self.scores(name)
        return min(scores, key=lambda rate: scores[rate])

    def _runs(self, name: str) -> list[Run]:
        return [Run(self.protocol.seeds[0], self._by_rate[name][self.rate(name)])]

    @cached_property
    def _further(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {}
        for outcome in self._seeds:
            factors = outcome.cell.factors
            found.setdefault(factors["variant"], []).append(Run(factors["seed"], outcome))
        return found

    def runs(self, name: str) -> list[Run]:
        """A row's runs at its best rate, by seed."""
        return [*self._runs(name), *self._further[name]]

    def distances(self, name: str) -> dict[int, tuple[float, float]]:
        """{steps: (mean, standard deviation) over the training seeds that did not diverge}."""
        found: dict[int, list[float]] = {}
        for run in self.runs(name):
            for steps, mean in run.means.items():
                found.setdefault(steps, []).append(mean)
        return {steps: (statistics.fmean(values), common.deviation(values)) for steps, values in found.items()}

    def outcomes(self) -> list[Outcome]:
        """Of all runs of both sweeps."""
        return [*self._rates, *self._seeds]

    def forward_flops(self, name: str) -> int:
        """Multiply-adds of a forward pass of one sample."""
        return self.runs(name)[0].outcome.cell.forward_flops

    def in_training(self, name: str) -> Iterator[tuple[float, float]]:
        """(units, distance in two steps) at the checkpoints of the first seed's run."""
        cell = self._runs(name)[0].outcome.cell
        for evaluation in read_evaluations(cell.run_dir):
            for result in evaluation["results"]:
                if result["steps"] == 2:
                    yield self.protocol.units * evaluation["step"] / cell.config.train.max_steps, result["mean"]


def _score(outcome: Outcome, judged: Sequence[int]) -> float:
    values = [result["mean"] for result in outcome.results if result["steps"] in judged]
    return statistics.geometric_mean(values) if values else float("inf")
