"""What the architecture promises, shown with our own runs: see experiments/README.md."""
