"""Who samples. An engine turns prompts into responses with the log-probs they were sampled at."""
