"""Given answers for the proposer, taken from a corpus of the user's."""
