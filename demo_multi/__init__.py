"""Programs that train one model in several processes, on one copy of the graph and of its features."""
