"""Takes a config to SLURM and tells how it goes: `python -m launchers.submit --help`."""

from launchers import slurm
from launchers.cluster import CHECKOUT, Cluster
from launchers.script import Job, script


def submit(job: Job, cluster: Cluster) -> int:
    """Queues a job as it is and returns its id. Raises UserError."""
    return slurm.queue(script(job, cluster, CHECKOUT))
