"""How good a model is: minimal pairs, last words, bits per byte on local files, and the language model evaluation harness."""
