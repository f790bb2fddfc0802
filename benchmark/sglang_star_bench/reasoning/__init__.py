"""A small reasoning model of our own: worked traces, training, weights, prompts, checks."""
