"""Data: from a source to clean, split, encoded rows, and from those to batches. Ray only in `prepare` and `feed`."""
