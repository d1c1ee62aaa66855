"""HTTP: connections with limits, access rules, and the endpoints.

access               API keys, Host and Origin checks
refusals             errors as responses
connection_limits    the limits of a connection, and how many connections fit
connection           uvicorn's connection within those limits
app                  the endpoints
"""
