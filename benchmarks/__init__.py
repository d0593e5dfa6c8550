"""What the claims are measured with."""
