"""Faults on purpose: a server under load, things that go wrong by a script, and every token compared."""
