"""What a site is like: `configs/cluster/NAME.yaml` as a `Cluster`."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import yaml

from imm_scale import shipped
from imm_scale.config import twice
from imm_scale.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """Defaults of a site; what the command line says comes first.

    Attributes:
        partition, account, qos, time: for sbatch; None leaves the choice to SLURM.
        gpus_per_node: GPUs a node has; 0 where ranks run on CPUs.
        gpu_type: asked for by name, as in --gpus-per-node=h100:8; None takes any.
        ranks_per_node: processes per node; None means one per GPU.
        cpus_per_task: CPUs of each rank, for its threads that read and decode.
        memory: per node, for sbatch --mem ("0": all of it); None takes the partition's default.
        launch: srun (a task per GPU), torchrun or deepspeed (a task per node).
        grace_seconds: how long before the time limit all ranks are told to commit and stop.
        setup: shell lines run on the first node before anything else, as written (module load, source .../activate).
        environment: variables for all ranks.
        srun: further options of srun (pyxis: --container-image=...).
        wrap: words before each rank's command (apptainer exec --nv image.sif).
        sbatch: further options of sbatch, as in --constraint=ib.
        local_paths: folders that are not the same folder on all nodes; no run may lie there.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gpus_per_node: int = 8
    gpu_type: str | None = None
    ranks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    launch: str = "srun"
    grace_seconds: int = 300
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    srun: list[str] = field(default_factory=list)
    wrap: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)
    local_paths: list[str] = field(default_factory=lambda: ["/tmp", "/var/tmp", "/dev/shm"])


def names() -> list[str]:
    """The sites that come along."""
    return shipped.names("cluster")


def load(name: str) -> Cluster:
    """A site by its name, or by the path of its YAML file.

    Raises:
        UserError: no such site, or a key or a value that it cannot have.
    """
    path = name if name.endswith((".yaml", ".yml")) else shipped.find("cluster", name)
    if path is None:
        raise UserError(f"no cluster {name!r}: {shipped.known('cluster', name)}; or give a YAML file of your own")
    try:
        with open(path, encoding="utf-8-sig") as file:
            document = twice.load(file.read(), path) or {}
    except OSError as error:
        raise UserError(f"cannot read cluster {path!r}: {error.strerror}; {shipped.known('cluster', name)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no YAML: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} must be a mapping of keys to values")
    return _checked(path, document)


def _checked(path: str, document: dict[str, Any]) -> Cluster:
    hints = get_type_hints(Cluster)
    for key, value in document.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            raise UserError(
                f"{path}: unknown key {key!r}; " + (f"did you mean {near[0]}?" if near else "see clusters.md")
            )
        if not _fits(value, hints[key]):
            raise UserError(f"{path}: {key}={value!r} is not {hints[key]}; put words and times in quotes")
    cluster = dataclasses.replace(Cluster(), **document)
    if cluster.launch not in ("srun", "torchrun", "deepspeed"):
        raise UserError(f"{path}: launch={cluster.launch!r} does not exist; choose srun, torchrun or deepspeed")
    return cluster


def _fits(value: Any, hint: Any) -> bool:
    if hint == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint == dict[str, str]:
        return isinstance(value, dict) and all(isinstance(word, str) for pair in value.items() for word in pair)
    return isinstance(value, hint) and not isinstance(value, bool)
