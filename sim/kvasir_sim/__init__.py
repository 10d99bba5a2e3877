"""The simulator: drives the router's production core under a simulated clock.

It decides nothing of its own. `run_sim` replays a request trace against modelled workers and
reports how many requests met their SLO under a policy.
"""
