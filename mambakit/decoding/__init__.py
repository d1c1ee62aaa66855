"""The one place where tokens are chosen for many texts at once: between models and generation."""
