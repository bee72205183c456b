"""Data: from a source to clean, split, encoded rows, and from those to batches. Ray only in `prepare`, `feed` and `sources`."""
