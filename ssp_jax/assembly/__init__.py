"""Builds the parts of a run from its config. Below this room only typed sections are read."""
