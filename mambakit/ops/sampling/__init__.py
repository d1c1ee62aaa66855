"""Choose one token of each row of logits: temperature, filters, and an inverse-CDF draw."""
