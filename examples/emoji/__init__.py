"""Emoji found by their names in fourteen languages: ``python -m examples.emoji`` trains on them."""
