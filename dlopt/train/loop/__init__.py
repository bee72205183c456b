"""A step: forward, gradients, clipping, the optimizer; and what tries steps out. Knows no Ray."""
