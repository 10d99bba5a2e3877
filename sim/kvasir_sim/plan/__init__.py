"""A day of load against rules that decide how many workers there are, and in which role.

The planner that runs here is the operator's own core. Prefill and decode pools are modelled as
such (first come first served; shared steps), because it is pools that rules compare by.
"""
