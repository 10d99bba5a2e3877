"""Router: decides which prefill and decode worker serve a request, and when."""
