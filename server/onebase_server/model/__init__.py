"""The model: configuration, weights, tokenizer and the single decoder. It knows nothing of requests or HTTP."""
