"""Damaged and hostile input files: how they are made, which readers meet them, what may come of it."""
