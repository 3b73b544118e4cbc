"""The ground: processes, platforms, checkpoints, logs, files. Knows nothing of the game."""
