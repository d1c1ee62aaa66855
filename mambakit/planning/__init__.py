"""What a model of a shape takes on a device: memory, tokens a second, a recipe. Figures are from recorded benchmarks.

`recorded.json` holds those of docs/benchmarks that this reads; `benchmarks/render.py` writes it.
"""
