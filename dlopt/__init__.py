"""dlopt: raw data to a trained, served and watched deep-learning model with one job file."""
