"""A model answers prompts, or questions with searches, from a file or as they are typed."""
