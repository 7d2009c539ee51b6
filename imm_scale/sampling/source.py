"""What `sample` and `evaluate` are pointed at: a run, one of its checkpoints, or exported weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint import export
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World

Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        url: as the user gave it.
        run_dir: folder of the run, None for exports and for checkpoints that lie outside of one.
        step: of the checkpoint, None for exports and for a run as such.
    """

    url: str
    run_dir: str | None = None
    step: int | None = None

    def at_newest(self) -> "Source":
        """The newest checkpoint of a run; all else as it is. Raises UserError where there is none."""
        if self.run_dir is None or self.step is not None:
            return self
        return Source(self.url, self.run_dir, Checkpoint.latest(self.run_dir).meta.step)

    def use_newest(self, world: World, use: "Callable[[Source], Result]") -> "tuple[Source, Result]":
        """`use` of the newest checkpoint, the same one on every rank; of the next, should the run remove it meanwhile.

        Args:
            use: reads a source; no collective.

        Returns:
            The source that was read, and what `use` returned.

        Raises:
            UserError: there is no checkpoint, or the one that was named is gone.
        """
        while True:
            source = distributed.from_main(self.at_newest, world)
            result = [] if (loaded := unless_removed(source, use)) is None else [loaded]
            if distributed.all_agree(bool(result), distributed.device(world)):
                return source, result[0]
            if self.step is not None:
                raise UserError(
                    f"the run has removed {source.weights_url}: name a later one; train.keep_last keeps more"
                )

    @property
    def weights_url(self) -> str:
        """What `export.load_net` reads: a checkpoint's folder or an export."""
        if self.run_dir is None or self.step is None:
            return self.url
        return checkpoints.folder(self.run_dir, self.step)


def unless_removed(source: Source, use: Callable[[Source], Result]) -> Result | None:
    """What `use` returns; None where the run has removed the checkpoint meanwhile, so that it failed."""
    try:
        return use(source)
    except (UserError, FileNotFoundError):
        if source.run_dir is None or source.step in checkpoints.committed_steps(source.run_dir):
            raise
        return None


def find(url: str) -> Source:
    """Raises UserError for what is none of the three."""
    url = url.rstrip("/")
    if export.is_checkpoint(url):
        run_dir, step = storage.parent(storage.parent(url)), Checkpoint(url).meta.step
        inside = storage.exists(storage.join(run_dir, "config.yaml")) and checkpoints.folder(run_dir, step) == url
        return Source(url, run_dir if inside else None, step)
    if export.is_export(url):
        if not storage.exists(url):
            raise UserError(f"{url} does not exist")
        return Source(url)
    if not storage.exists(storage.join(url, "config.yaml")):
        raise UserError(
            f"{url} is not a run folder (it has no config.yaml), nor a checkpoint's folder, nor exported weights"
        )
    return Source(url, url)


def config_of(source: Source, overrides: Sequence[str], reads: Sequence[str]) -> Config:
    """The config the weights were trained with (defaults for exports), changed by key=value overrides.

    Args:
        reads: keys that the caller reads, and sections with a dot at the end.

    Raises:
        UserError: a config that cannot be read, what `config.load` refuses, or an override of what nobody reads.
    """
    config = _config_of(source, overrides)
    for key in configs.settings_of(overrides):
        if not any(key == read or (read.endswith(".") and key.startswith(read)) for read in reads):
            leaf = key.rpartition(".")[2]
            meant = [other for other in configs.flatten(config) if other in reads or other.startswith(tuple(reads))]
            same = [other for other in meant if other.rpartition(".")[2] == leaf and other != "plugins"]
            hint = f"; did you mean {same[0]}?" if same else ""
            raise UserError(
                f"{key} does nothing here: what is read is {', '.join(read.rstrip('.') for read in reads)}; all else "
                f"is as in training, or of no use to this command. Leave it out{hint}"
            )
    return config


def _config_of(source: Source, overrides: Sequence[str]) -> Config:
    if source.run_dir is not None:
        text = storage.read_text(storage.join(source.run_dir, "config.yaml"))
        configs.from_yaml(text, f"the config of {source.url}")  # which is never empty
        overrides = [f"run.dir={source.run_dir}", *overrides]
    elif export.is_checkpoint(source.url):
        text = Checkpoint(source.url).meta.config
    else:
        return configs.load([], [*_method_of(source, overrides), *overrides]).config
    return configs.load_text(text, f"the config of {source.url}", overrides).config


def _method_of(source: Source, overrides: Sequence[str]) -> list[str]:
    """The method of an export as an override, where its nets are drawn by other samplers than those of the default."""
    if not (source.url and export.is_export(source.url) and storage.exists(source.url)):
        return []
    default = configs.load([], [word for word in overrides if word.startswith("plugins=")]).config.method
    method = export.read_spec(source.url)[0].method
    return [] if method.SAMPLERS == default.SAMPLERS else [f"method.name={method.name}"]


def check_start(config: Config) -> None:
    """What a run starts from and where it goes to, before it works. Raises UserError, or OSError with a path."""
    storage.check_writable(config.run_dir)
    if config.train.init_from is not None and not checkpoints.committed_steps(config.run_dir):
        try:
            find(config.train.init_from)
        except UserError as error:
            raise UserError(f"train.init_from={config.train.init_from}: {error}") from error
