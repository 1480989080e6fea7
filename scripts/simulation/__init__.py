"""A service that only adds up time: everything that decides is the real thing.

real    `Cluster` with its placement; on each instance `Scheduler`, `RManager`, `derive`, handoffs, shards
made    the clock, messages that arrive after a fixed time, devices whose steps take as long as `times` says, token values

clock.py      what happens next
times.py      how long a step takes
device.py     steps that run beside each other, and those that wait for each other
instance.py   an instance: what it is told, and what it says
parties.py    who steps with whom, in each lane
service.py    gManager, clients and instances: one trace from its first request to its last token
cases.py      a trace under several policies and rates, and what came of it
search.py     how many instances should prefill and how many decode
plots.py      pictures of it
validate.py   the same trace simulated and for real
"""
