"""One script per claim; each composes the package and writes a run directory."""
