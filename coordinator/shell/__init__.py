"""Moves bytes between gateways, the core and the workers."""
