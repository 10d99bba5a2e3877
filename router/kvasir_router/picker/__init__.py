"""Chooses endpoints for gateways: Envoy's ext_proc, as the Gateway API Inference Extension uses it.

The gateway sends the parts of an HTTP request (`service`, `exchange`), the same core decides as for
requests that come straight to the router (`endpoints`), and the gateway takes the request there.
"""
