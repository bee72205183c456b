"""What the app runs under: one process of this machine, or Ray Serve; how they start, listen and end."""
