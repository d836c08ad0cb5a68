"""RabbitMQ: the home of pika."""
