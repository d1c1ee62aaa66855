"""From files of text to a trained model: data, tokenizer, optimiser, loop, evaluation, export."""
