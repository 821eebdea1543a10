"""Recipes: linear, readable training scripts; run from a clone."""
