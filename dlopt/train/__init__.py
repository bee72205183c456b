"""Training: a loop without Ray, and the worker and the stage that put it on Ray Train."""
