"""Who is in the fleet, what each worker said of itself, and who may be given requests."""
