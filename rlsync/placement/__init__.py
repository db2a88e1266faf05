"""Placements: what each holder has, in HF coordinates. Pure; one file per kind of holder."""
