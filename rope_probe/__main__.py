"""`python -m rope_probe`, as `accelerate launch -m rope_probe distill ...` runs it."""

from rope_probe.cli import main

main()
