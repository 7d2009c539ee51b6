"""What was handed to SLURM for a run: RUN/launches/0001/ with script, state of the code, config, and the job's id."""

from imm_scale import storage
from imm_scale.errors import UserError
from launchers import slurm

_FOLDER = "launches"
_JOB = "job"
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def new_folder(run_dir: str) -> str:
    """The folder of the next submission."""
    names = storage.list_names(storage.join(run_dir, _FOLDER))
    return storage.join(run_dir, _FOLDER, f"{int(names[-1]) + 1 if names else 1:04d}")


def record(folder: str, job: int) -> None:
    """Writes the job's id into the folder of its submission."""
    storage.write_text(storage.join(folder, _JOB), str(job))


def last_job(run_dir: str) -> int | None:
    """The id of the run's last job."""
    for name in reversed(storage.list_names(storage.join(run_dir, _FOLDER))):
        url = storage.join(run_dir, _FOLDER, name, _JOB)
        if storage.exists(url):
            return int(storage.read_text(url))
    return None


def job_of(run_dir: str) -> int:
    """Raises UserError for a run that was never submitted."""
    job = last_job(run_dir)
    if job is None:
        raise UserError(f"{run_dir} was not submitted by imm-scale submit: it has no {_FOLDER}/ with a job")
    return job


def state_of(job: int) -> slurm.JobState | None:
    """What SLURM says of a job, None where it has forgotten it."""
    states = slurm.jobs([job])
    return states[0] if states else None


def is_over(state: slurm.JobState | None) -> bool:
    """Whether SLURM will not run the job any more, or has forgotten it."""
    return state is None or state.state in _OVER
