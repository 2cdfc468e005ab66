"""Run directories: whole or not there, with a frame and a manifest; and progress while they are made."""
