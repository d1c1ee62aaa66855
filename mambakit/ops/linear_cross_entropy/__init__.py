"""Cross-entropy of a language model's head, without the matrix of all logits."""
