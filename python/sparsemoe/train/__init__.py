"""Training: the run's config, the trainer, its checkpoints and its progress."""
