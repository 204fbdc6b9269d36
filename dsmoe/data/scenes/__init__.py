"""The embedded data set: procedural scenes rendered from an integer index, without files.

`catalogue` says what the classes are, `scene` draws one scene from its index, `geometry` intersects rays with
solids, `textures` paints them, `render` makes the images and the exact labels, `dataset` is the data set.
"""

from dsmoe.data.scenes.dataset import SPLITS, SceneFrames, Scenes

__all__ = ["SPLITS", "SceneFrames", "Scenes"]
