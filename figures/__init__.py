"""One script per figure; each reads a run directory and nothing else."""
