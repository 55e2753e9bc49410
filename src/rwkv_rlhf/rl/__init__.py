"""Sampling from a model, and learning from samples."""
