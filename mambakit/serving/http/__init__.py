"""HTTP: connections with limits, access rules, and the endpoints.

access               API keys, Host and Origin checks
refusals             errors as responses
connection_limits    the limits of a connection, and how many connections fit
connection           uvicorn's connection within those limits
request_ids          X-Request-Id
routing              endpoints as routes: an operation and what answers it
services             the parts of the server that endpoints call
texts                a request's texts as one response or as events
generation, scores, tokens, models, probes    endpoints, a file for each subject
app                  the table of endpoints, behind what every request passes
"""
