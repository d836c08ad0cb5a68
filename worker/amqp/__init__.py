"""RabbitMQ: the only folder that imports pika, beside the broker's check.

Two connections on two threads: behind a publish that the broker blocks (memory or disk alarm) an ack would wait too.
"""
