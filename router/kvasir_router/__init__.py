"""The router: which prefill and which decode worker serve a request, and when."""
