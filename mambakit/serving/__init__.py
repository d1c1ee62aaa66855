"""Built on generation: one HTTP address for any number of replicas of a model.

messages   what the front and a replica's process say to each other
heartbeat  how the front learns that a replica is stopped or stuck
worker     a replica: a process with a model of its own and an engine's loop
jobs       a text on its way through the front, and where its request hears of it
router     which replica does what, and what becomes of it when a replica dies; knows neither torch nor HTTP
protocol   the completions API: what is asked, what is answered, what is refused
prompts    from a body to a valid request, with its prompts as token ids
intake     the threads and processes in which that happens
metrics    the Prometheus series
access     who may ask: keys, hosts, origins
refusals   requests that are none, and errors as answers
app        the endpoints
connections, connection_limits   what a connection may take: bytes, time and a place
server     the front's process, from the first socket to the last request
"""
