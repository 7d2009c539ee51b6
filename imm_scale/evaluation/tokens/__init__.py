"""What a step of a product of tokens loses: information profile, schedules, nll@L, paired Brier score."""
