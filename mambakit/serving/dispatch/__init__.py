"""Dispatch: which replica gets which text. Knows neither torch nor HTTP nor processes.

shares       how many texts each owner has somewhere, and whether one more is within its share
jobs         one text of a request, its inbox, and a replica as dispatch sees it
fair_queue   the fair order of texts: keys, their clients, their requests
queue        the texts that no replica has yet: whose turn it is, room at the replicas, admission, deadlines
affinity     which replica has which prompts and states in memory
rates        how fast texts end, and so what `Retry-After` says
promises     clients who were told when to return, for whom room is kept then
suspects     texts that may have killed replicas, and are refused
dispatcher   takes requests, sends their texts to replicas, delivers what comes back
"""
