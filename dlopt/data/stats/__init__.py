"""What the rows say: statistics that preprocessing is made of, and the profile with its warnings."""
