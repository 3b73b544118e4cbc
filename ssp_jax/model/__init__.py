"""The decoder, its sharding, and Hugging Face folders in and out. Knows nothing of the game."""
