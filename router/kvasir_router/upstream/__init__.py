"""A request's way to its workers: the token stream, refusals, failures and continuations."""
