"""Methods for tokens: masked diffusion, and prediction of the next ones."""
