"""The model architectures that workers can run."""
