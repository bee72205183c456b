"""From a prepared set to batches: the order of rows, each worker's share of it, and how they get there."""
