"""The supervisor: consumes jobs from RabbitMQ, runs them, reports their ends. It never imports torch."""
