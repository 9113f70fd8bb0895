"""The demonstration behind `make demo`: a value network made on a small base steers a larger one inside vLLM."""
