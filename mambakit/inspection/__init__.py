"""What a model does with a text: numbers (`inspect`), a page and a picture of them."""

from mambakit.inspection.attention import implicit_attention
from mambakit.inspection.numbers import Inspection, LayerTrace, inspect
from mambakit.inspection.page import page
from mambakit.inspection.picture import draw
from mambakit.inspection.summary import Summary, summarize

__all__ = ["Inspection", "LayerTrace", "Summary", "draw", "implicit_attention", "inspect", "page", "summarize"]
