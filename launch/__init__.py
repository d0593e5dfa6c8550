"""The command line, the Ray cluster, the supervisor, offline LLM."""
