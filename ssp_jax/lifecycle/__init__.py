"""What all runs that train have in common: how they start, save, and what they end with."""
