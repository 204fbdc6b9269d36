"""Weight files: safetensors with the plan inside, loadable without DeepSpeed."""
