"""The routing decision, pure: a snapshot of the fleet and a request in, a route out.

Modules, lowest first: `ring` (consistent hashing), `keys` (how long a key is), `prefix` (who holds
which block), `ledger` (work routed but not yet reported), `fleet` (the snapshot), `decode` (the
decode side) and `choose` (the whole decision, `pick`); beside them `sessions` (urgency of an
agent's later steps).
"""
