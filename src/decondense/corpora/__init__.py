"""Text and tokens: the embedded corpus, passages to measure on, tokenised and packed training data."""
