"""Private, throw-away real servers for the demo, the tests and the benchmarks: a broker, an object store, a backend."""
