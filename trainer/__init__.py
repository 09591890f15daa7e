"""One training loop for all stages: options, losses, optimizers, checkpoints, metrics; imports evaluation and below."""
