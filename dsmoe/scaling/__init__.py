"""Scaling studies: what a model costs, where it fits, and how quality follows compute."""
