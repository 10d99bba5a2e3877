"""The routing decision, pure: a view of the fleet and a request in, a route out.

Modules, lowest first: `ring` (consistent hashing), `exchange` and `keys` (how long a key is, agreed
between replicas), `prefix` (who holds which block), `ledger` (work routed but not yet reported),
`calibrate` (what experience corrects), `order` (the least of many at once), `fleet` (the view),
`estimate` (TTFT at a worker), `decode` (the decode side), `choose` (the whole decision, `pick`) and
`rebalance` (second thoughts: hand-backs and moves between the two candidates).
"""
