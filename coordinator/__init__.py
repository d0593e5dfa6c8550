"""The coordinator: decisions in core/, processes and wires in shell/."""
