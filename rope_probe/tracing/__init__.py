"""Perturbations of position, and how the change travels through the layers to the logits."""
