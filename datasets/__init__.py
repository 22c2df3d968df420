"""Dassl datasets in CoOp's folder layout, found by their name."""
