"""Settings of the RabbitMQ connection and the job queue."""

from urllib.parse import quote

from pydantic import Field, SecretStr, field_validator

from config.section import Section, split_url


class BrokerSettings(Section):
    """Connection to RabbitMQ and the queue of the jobs."""

    url: SecretStr | None = Field(
        None, validation_alias="RABBITMQ_URL", description="amqp:// or amqps:// URL; wins over the five names below"
    )
    host: str = Field("localhost", validation_alias="RABBITMQ_HOST", description="Broker host")
    port: int = Field(5672, validation_alias="RABBITMQ_PORT", ge=1, le=65535, description="Broker port")
    user: str = Field("guest", validation_alias="RABBITMQ_USER", description="Broker user")
    password: SecretStr = Field(SecretStr("guest"), validation_alias="RABBITMQ_PASS", description="Broker password")
    vhost: str = Field("/", validation_alias="RABBITMQ_VHOST", description="Virtual host")
    queue: str = Field(
        "image_generation",
        validation_alias="RABBITMQ_QUEUE",
        pattern=r"^[A-Za-z0-9_.\-]{1,100}$",
        description="Queue of the jobs; the worker's own queues are named after it",
    )
    heartbeat_seconds: int = Field(
        20, validation_alias="RABBITMQ_HEARTBEAT_SECONDS", ge=2, le=600, description="AMQP heartbeat"
    )

    consumer_timeout_seconds: float = Field(
        1800.0,
        validation_alias="RABBITMQ_CONSUMER_TIMEOUT_SECONDS",
        ge=6,
        description="The broker's own `consumer_timeout`; jobs at work for a third of it go on lease",
    )

    @field_validator("url")
    @classmethod
    def _is_amqp_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and split_url(url.get_secret_value()).scheme not in ("amqp", "amqps"):
            raise ValueError("must begin with amqp:// or amqps://")
        return url

    @property
    def amqp_url(self) -> str:
        """The connection URL including the password. Never log it."""
        if self.url is not None:
            return self.url.get_secret_value()
        password = quote(self.password.get_secret_value(), safe="")
        return f"amqp://{quote(self.user, safe='')}:{password}@{self.host}:{self.port}/{quote(self.vhost, safe='')}"
