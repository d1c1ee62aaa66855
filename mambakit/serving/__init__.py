"""Built on generation: one HTTP address for any number of replicas of a model.

messages   what the front and a replica's process say to each other
worker     a replica: a process with a model of its own and an engine's loop
jobs       a text on its way through the front, and where its request hears of it
router     which replica does what, and what becomes of it when a replica dies; knows neither torch nor HTTP
protocol   the completions API: what is asked, what is answered, what is refused
metrics    the Prometheus series
app        the endpoints
server     the front's process, from the first socket to the last request
"""
