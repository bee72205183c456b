"""What training must remember, and where it is written."""
