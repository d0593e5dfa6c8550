"""Octavo serves large language models from many GPUs as one."""
