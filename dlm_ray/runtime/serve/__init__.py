"""Services: the engine and its HTTP ingress on Ray Serve."""
