"""The completions API: fields, their checks, and the shapes of responses. Knows neither replicas nor sockets.

fields     every field of a request: type, range, default
answers    the JSON of responses and events, and token usage
protocol   a request body to a valid request
prompts    the same with the prompts as token ids
intake     the threads and processes that do so, off the event loop
"""
