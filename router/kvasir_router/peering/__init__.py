"""What router replicas tell one another: extended keys, by streams that each opens to the others.

A replica only reads from peers that its operator named; nobody can write into it. Without peers,
and while one is silent, a replica decides by what it sees itself.
"""
