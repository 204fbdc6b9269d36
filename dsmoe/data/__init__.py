"""Data: formats, data sets, transforms, sampling by index and the latent cache."""

from dsmoe.data.dataset import ImageDataset, build_dataset

__all__ = ["ImageDataset", "build_dataset"]
