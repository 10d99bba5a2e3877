"""The KV node: a process that holds blocks which workers computed, for workers that need them."""
