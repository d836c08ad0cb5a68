"""Settings of the RabbitMQ connection and the jobs' queues."""

import re
from typing import Annotated, NamedTuple
from urllib.parse import quote

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from config.section import Section, split_commas, split_url

QUEUE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,100}")
# What the worker's own queues end in, see `worker.amqp.topology`.
OWN_ENDING = re.compile(r"\.(recover|outbox|dead|lease|cancel|retry\.\d+)$")
MAX_WEIGHT = 100


class QueueWeight(NamedTuple):
    """A queue of jobs and its weight among the others."""

    name: str
    weight: int


class BrokerSettings(Section):
    """Connection to RabbitMQ and the queues of the jobs."""

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
        pattern=rf"^{QUEUE_NAME.pattern}$",
        description="Queue of the jobs; the worker's own queues are named after it",
    )
    queues: Annotated[tuple[QueueWeight, ...], NoDecode] = Field(
        (),
        validation_alias="RABBITMQ_QUEUES",
        description="Several queues of jobs with weights, like `express:3,image_generation:1`; `RABBITMQ_QUEUE` must be"
        " one of them. Unset: that one alone",
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

    @field_validator("queues", mode="before")
    @classmethod
    def _read_weights(cls, given: object) -> object:
        pairs = split_commas(given)
        return tuple(map(_read_pair, pairs)) if isinstance(pairs, tuple) else given

    @field_validator("queues")
    @classmethod
    def _are_consistent(cls, queues: tuple[QueueWeight, ...], settings: ValidationInfo) -> tuple[QueueWeight, ...]:
        names = [queue.name for queue in queues]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"has {', '.join(sorted(twice))} twice")
        own = settings.data.get("queue")  # missing where it is wrong itself
        if own is not None and names and own not in names:
            raise ValueError(
                f"must hold {own}, the queue that RABBITMQ_QUEUE names or has by default: the worker's own queues are"
                f" named after it, and jobs return to it; add {own}:1, or set RABBITMQ_QUEUE to one of the list"
            )
        return queues

    @property
    def consumed(self) -> tuple[QueueWeight, ...]:
        """The queues to take jobs from."""
        return self.queues or (QueueWeight(self.queue, 1),)

    @property
    def amqp_url(self) -> str:
        """The connection URL including the password. Never log it."""
        if self.url is not None:
            return self.url.get_secret_value()
        password = quote(self.password.get_secret_value(), safe="")
        return f"amqp://{quote(self.user, safe='')}:{password}@{self.host}:{self.port}/{quote(self.vhost, safe='')}"


def _read_pair(text: str) -> QueueWeight:
    name, _, weight = text.rpartition(":")
    if not QUEUE_NAME.fullmatch(name) or not weight.isdecimal() or not 1 <= int(weight[:9]) <= MAX_WEIGHT:
        raise ValueError(
            f"{text[:120]!r} is no queue with its weight, like express:3: a name of up to 100 letters, digits, dots,"
            f" dashes and underscores, and an integer from 1 to {MAX_WEIGHT}"
        )
    if OWN_ENDING.search(name):
        raise ValueError(f"{name!r} ends like a queue of the worker's own, which takes no jobs from publishers")
    return QueueWeight(name, int(weight))
