"""Functions and classes of the user's own files, as values FILE.py:NAME of config keys.

They are loaded where a run starts, and tried once. What they raise later ends the run in one
sentence, with the line of the file.
"""
