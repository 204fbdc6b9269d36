"""Where this process runs: its place among the ranks, its device, its log. Nothing of models or data."""
