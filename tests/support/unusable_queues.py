"""Make one queue of a running RabbitMQ unusable, and usable again."""

from examples.parts.rabbitmq import RabbitMQ

USER, PASSWORD = "narrow-taker", "narrow-password"


def permit(rabbitmq: RabbitMQ, pattern: str) -> None:
    """Give the user `USER`, made where it is missing, all rights to what matches the pattern, and none to the rest."""
    rabbitmq.evaluate(
        f'User = <<"{USER}">>, Pattern = <<"{pattern}">>, By = <<"test">>,'
        f' catch rabbit_auth_backend_internal:add_user(User, <<"{PASSWORD}">>, By),'
        ' rabbit_auth_backend_internal:set_permissions(User, <<"/">>, Pattern, Pattern, Pattern, By).',
    )


def all_but(queue: str) -> str:
    """Return the pattern that leaves out a queue and what is named after it."""
    return f"^(?!{queue}($|[.]))"


def set_state(rabbitmq: RabbitMQ, queue: str, state: str) -> None:
    """Have the broker take the queue for one that has `crashed`, as for one whose node is down, or for `live`."""
    rabbitmq.evaluate(
        f'Name = rabbit_misc:r(<<"/">>, queue, <<"{queue}">>),'
        f" Set = fun(Queue) -> amqqueue:set_state(Queue, {state}) end,"
        " case erlang:function_exported(rabbit_db_queue, update, 2) of"
        " true -> rabbit_db_queue:update(Name, Set);"
        " false -> rabbit_misc:execute_mnesia_transaction(fun() -> rabbit_amqqueue:update(Name, Set) end)"
        " end.",
    )
