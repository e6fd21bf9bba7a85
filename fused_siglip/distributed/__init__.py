"""The loss of the global batch: who is in it, what ranks agree on, how texts reach all of them."""
