"""Dispatch: which replica gets which text. Knows neither torch nor HTTP nor processes.

jobs         one text of a request, its inbox, and a replica as dispatch sees it
queue        the texts that no replica has yet: fair order, room at the replicas, admission
suspects     texts that may have killed replicas, and are refused
dispatcher   takes requests, sends their texts to replicas, delivers what comes back
"""
