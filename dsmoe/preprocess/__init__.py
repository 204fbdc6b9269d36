"""Work done once before training: latents of a data set."""
