"""The API server: one HTTP address for any number of replicas of a model.

Each entry imports only those above it:

errors, messages, metrics   errors of the API; messages between server and replicas; Prometheus series
api/                        the completions API: fields, checks, responses
dispatch/                   which replica gets which text
replicas/                   processes: start, heartbeat, restart, drain
http/                       connections, access, endpoints
server                      the server's process, from the first socket to the last request
"""
