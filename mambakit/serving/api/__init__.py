"""The API: operations, their fields and checks, and the shapes of answers. Knows neither replicas nor sockets.

declarations  how fields and operations are declared, and how a request is checked by them
values        types of fields
checks        checks that several fields share
shapes        JSON schemas of answers
fields        the fields of every request for texts
asked         a valid request for texts, and the JSON that it is read from
prompts       prompts as token ids
completions   fields of completions, and a body to a valid request
operations    the table of operations
openapi       the OpenAPI document of operations
answers       the JSON of responses and events, and token usage
intake        the threads and processes that read bodies, off the event loop
"""
