"""Figures of tidy frames, and pages of figures."""
