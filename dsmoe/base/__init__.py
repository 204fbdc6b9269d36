"""Recipes, presets, plans, errors and paper-table arithmetic. Nothing here imports torch or deepspeed."""
