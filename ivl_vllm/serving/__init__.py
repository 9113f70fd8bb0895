"""The value networks inside vLLM's engine: loading, the joined forward, and the logits processor."""
