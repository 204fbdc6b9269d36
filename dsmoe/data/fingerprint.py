"""What tells one data set from another: a hash over its items' names, sizes and labels."""

import hashlib
import json

from dsmoe.data.dataset import ImageDataset


def source_fingerprint(dataset: ImageDataset) -> str:
    """32 hex digits; equal for the same items in the same order, whatever the resolution they are read at."""
    known = getattr(dataset, "fingerprint", None)
    if known is not None:
        return known
    found = hashlib.sha256(json.dumps([type(dataset).__name__, len(dataset), list(dataset.class_names)]).encode())
    if hasattr(dataset, "name"):
        for item in range(len(dataset)):
            found.update(f"{dataset.name(item)}\n".encode(errors="surrogateescape"))
    return found.hexdigest()[:32]
