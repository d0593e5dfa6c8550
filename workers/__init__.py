"""One rank: its weight shard, its KV blocks, its slot table."""
