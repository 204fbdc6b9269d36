"""Weight files, and resumable checkpoints that any layout writes and any other reads."""
