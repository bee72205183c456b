"""What the driver shows of a run, from the files that training writes."""
