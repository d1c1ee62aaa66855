"""The selective scan: the recurrence at the heart of Mamba."""
