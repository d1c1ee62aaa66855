"""States that clients keep: files on a disk, and what is known of each. Knows neither torch nor HTTP.

tensors   the layout of a safetensors file, and whether it is a state of this server's model
blobs     files named by their contents, durable when they are there
records   what is known of a state: its owner, its blob, what it has read, when it expires
store     states by their ids: budgets, shares of keys, expiry, what is there after a restart
options   of a server
"""
