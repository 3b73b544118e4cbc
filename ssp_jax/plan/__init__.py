"""Whether a config fits on absent hardware, and a lower bound of a step's time there."""
