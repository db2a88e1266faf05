"""Checkpoints of one form and layout made into those of another, on paper: no process group, no live model, no GPU."""
