"""The user's passages: files and folders of them, their words, and answers that stand in them."""
