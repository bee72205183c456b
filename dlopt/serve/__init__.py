"""Serving (being written)."""

from dlopt.part import Part


class Serve(Part):
    """How a model is served."""
