"""Ray Train: room for workers, groups of them, and why they ended."""
