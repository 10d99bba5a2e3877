"""The planner: how many workers of which pool serve in which role.

`decide.plan` is the only door: facts and a time in, one plan out. The operator and the simulator
call the same function.

    facts      what a plan looks at and what it is
    queueing   how many workers of one kind a load needs within its SLO
    cover      the cheapest mix of kinds, by exact search
    decide     growth, shrinking, role flips; dwell and hysteresis
    history    from telemetry samples to the present load and the recent peak
    memory     whether a worker's parts fit into its memory limit
"""
