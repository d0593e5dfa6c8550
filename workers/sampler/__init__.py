"""Vocabulary-parallel sampling: every feature in its own file, `sampler.sample` calls them in order."""
