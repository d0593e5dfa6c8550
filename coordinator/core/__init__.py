"""Pure decisions: events in, plans out. No clock, no randomness, no input or output."""
