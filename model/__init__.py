"""What is trained: mixture-of-experts models. Knows nothing of Flower, privacy or accounting."""
