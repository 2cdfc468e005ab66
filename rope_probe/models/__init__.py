"""Language models: loaded from checkpoints, built or wrapped, and read through hooks by any attention kernel."""
