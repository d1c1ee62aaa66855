"""Replicas: processes with a model each, and their supervision.

heartbeat    how the server tells a stopped or stuck process from a busy one
outbox       token ids to text, stop strings, errors per text
worker       a replica's process: an engine's loop
process      the server's side of one such process: its pipe and the two threads on it
supervisor   starts, watches, restarts and drains the replicas' processes
"""
