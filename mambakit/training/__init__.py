"""From files of text to a trained model: data, tokenizer, optimiser, loop, evaluation, export."""

from mambakit._versions import check_models

check_models()
