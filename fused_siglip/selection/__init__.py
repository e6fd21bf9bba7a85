"""Which negatives take part: hashes of pairs, and thresholds of scores."""
