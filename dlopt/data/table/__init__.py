"""Rows on their way through `prepare`: spilled into sorted pieces, then planned, split, summed up and written range by range."""
