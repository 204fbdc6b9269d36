"""Diffusion transformers: embedders, attention, blocks, the model. No noise schedule, no DeepSpeed."""
