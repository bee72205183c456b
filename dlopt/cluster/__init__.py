"""Where one machine ends: jobs that are sent to a Ray cluster, a small cluster on this machine, and a look at either before a run."""
