"""What is seen of training while it runs: health, speed, logs, whether it moves."""
