"""Dassl trainers: the baselines and their GRAM versions, a file each, found by its name."""
