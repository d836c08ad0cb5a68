"""What it takes to break a worker from outside: a proxy, an engine that waits when told, hooks for what nobody sees."""
