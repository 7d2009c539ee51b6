"""What is written down of jobs: the code they start with, what SLURM was handed, how each start ended."""
