"""The API: operations, their fields and checks, and the shapes of answers. Knows neither replicas nor sockets.

declarations  how fields and operations are declared, and how a request is checked by them
values        types of fields
checks        checks that several fields share
shapes        JSON schemas of answers
formats       the form of a text: JSON, a schema, a regular expression, a grammar
fields        the fields of every request for texts
asked         a valid request for texts, and the JSON that it is read from
templates     the tokenizer's chat template
prompts       prompts as token ids
completions   fields of completions, and a body to a valid request
chat_messages, chat    the same of chats
reply         what a model's reply says, thinks and calls
log_probs     log-probabilities in answers
answers, chat_answers    the JSON of responses and events, and token usage
tokens, score    the same of tokenising and of scoring
operations    the table of operations
openapi       the OpenAPI document of operations
intake        the threads and processes that read bodies, off the event loop
"""
