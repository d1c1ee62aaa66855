"""The page at `/`: plain HTML, CSS and ES modules, which come from this server alone, and what it must know of the
model.
"""
