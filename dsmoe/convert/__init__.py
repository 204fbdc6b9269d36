"""Published checkpoints in and out: key layouts here, file formats beside them."""
