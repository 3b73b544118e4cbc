"""The user's passages: files and folders of them, and their words."""
