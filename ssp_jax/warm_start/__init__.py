"""Shows a model the game: supervised training on played or scripted episodes."""
