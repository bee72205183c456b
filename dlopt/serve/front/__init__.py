"""What every request passes before anybody looks at what it asks: who may ask, how much, and how long; and what answers it."""
