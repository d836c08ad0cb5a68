"""Tools to break a worker from outside: a proxy, an engine that waits on command, hooks into code without a seam."""
