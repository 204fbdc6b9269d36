"""dsmoe: train diffusion transformers with mixture-of-experts on DeepSpeed."""

__version__ = "0.1.0"
