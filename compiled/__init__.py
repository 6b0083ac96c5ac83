"""How it is computed, fast on one device: torch.compile, static caches, packed weights."""
