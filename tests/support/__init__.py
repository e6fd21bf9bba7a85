"""What the tests share. Imported as ``support``: tests/ is on the path (pyproject.toml)."""
