"""Replicas: processes with a model each, and their supervision.

heartbeat    how the server tells a stopped or stuck process from a busy one
states       states that texts start from and leave: in memory, and written durably
outbox       token ids to text, stop strings, errors per text
receiving    the thread that receives tasks, and reads the states that they start from
constraints  grammars of texts, compiled in a thread of their own
scoring      log-probabilities of prompts and continuations, between the engine's steps
worker       a replica's process: an engine's loop
process      the server's side of one such process: its pipe and the two threads on it
supervisor   starts, watches, restarts and drains the replicas' processes
"""
