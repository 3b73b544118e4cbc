"""What was trained, as a folder that others load: weights, a card, and how to ask it."""
