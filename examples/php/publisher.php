<?php
// Publish a job: `php publisher.php GENERATION_ID PROMPT ['{"seed": 7, …}']`. Prints its task id.
//
// Needs php-amqplib (`composer require php-amqplib/php-amqplib`, or Debian's php-amqplib). Reads the worker's own
// variables: RABBITMQ_URL, or RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST; RABBITMQ_QUEUE. The third argument are
// more fields of `data`, as docs/fields.md lists them.

declare(strict_types=1);

use PhpAmqpLib\Connection\AMQPConnectionConfig;
use PhpAmqpLib\Connection\AMQPConnectionFactory;
use PhpAmqpLib\Message\AMQPMessage;

foreach ([__DIR__ . '/vendor/autoload.php', '/usr/share/php/PhpAmqpLib/autoload.php'] as $autoloader) {
    if (is_file($autoloader)) {
        require $autoloader;
        break;
    }
}

const CONFIRM_SECONDS = 30;

function env(string $name, string $default): string
{
    return getenv($name) ?: $default;
}

function broker(): AMQPConnectionConfig
{
    $url = parse_url(env('RABBITMQ_URL', 'amqp:')) ?: [];
    $isSecure = ($url['scheme'] ?? '') === 'amqps';
    $config = new AMQPConnectionConfig();
    $config->setIsSecure($isSecure);
    if ($isSecure) {
        // php-amqplib verifies no certificate unless it is told to.
        $config->setSslVerify(true);
        $config->setSslVerifyName(true);
    }
    $config->setHost($url['host'] ?? env('RABBITMQ_HOST', 'localhost'));
    $config->setPort($url['port'] ?? ($isSecure ? 5671 : (int) env('RABBITMQ_PORT', '5672')));
    $config->setUser(rawurldecode($url['user'] ?? env('RABBITMQ_USER', 'guest')));
    $config->setPassword(rawurldecode($url['pass'] ?? env('RABBITMQ_PASS', 'guest')));
    $vhost = rawurldecode(substr($url['path'] ?? '', 1));
    $config->setVhost($vhost !== '' ? $vhost : env('RABBITMQ_VHOST', '/'));
    return $config;
}

/** Returns once the broker has the message on disk; throws where it has not. */
function publish(array $job): void
{
    $queue = env('RABBITMQ_QUEUE', 'image_generation');
    $connection = AMQPConnectionFactory::create(broker());
    $channel = $connection->channel();
    // Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
    // The third is `durable`, the fifth `auto_delete`, which php-amqplib turns on where it is not given.
    $channel->queue_declare($queue, false, true, false, false);
    $channel->confirm_select();
    $problem = null;
    $channel->set_nack_handler(function () use (&$problem) { $problem = 'the broker refused the message'; });
    // Comes before the confirm.
    $channel->set_return_listener(function () use (&$problem, $queue) { $problem = "there is no queue $queue"; });
    $message = new AMQPMessage(json_encode($job, JSON_THROW_ON_ERROR | JSON_UNESCAPED_UNICODE), [
        'content_type' => 'application/json',
        'delivery_mode' => AMQPMessage::DELIVERY_MODE_PERSISTENT,
        'message_id' => $job['task_id'],
    ]);
    // The fourth is `mandatory`: a message that reaches no queue comes back instead of vanishing.
    $channel->basic_publish($message, '', $queue, true);
    $channel->wait_for_pending_acks_returns(CONFIRM_SECONDS);
    $connection->close();
    if ($problem !== null) {
        throw new RuntimeException($problem);
    }
}

function uuid4(): string
{
    $bytes = random_bytes(16);
    $bytes[6] = chr(ord($bytes[6]) & 0x0f | 0x40);
    $bytes[8] = chr(ord($bytes[8]) & 0x3f | 0x80);
    return vsprintf('%s%s-%s-%s-%s-%s%s%s', str_split(bin2hex($bytes), 4));
}

[, $generationId, $prompt] = $argv;
// A number or text: it is told back as it is published.
$data = ['generation_id' => ctype_digit($generationId) ? (int) $generationId : $generationId, 'prompt' => $prompt];
$more = (array) json_decode($argv[3] ?? '{}', false, 512, JSON_THROW_ON_ERROR);
$job = [
    // Made and stored together with the generation: to publish a task again, even in doubt, does it only once.
    'task_id' => uuid4(),
    'type' => 'image_generation',
    'data' => $more + $data,
    'created_at' => (new DateTimeImmutable('now', new DateTimeZone('UTC')))->format('Y-m-d\TH:i:s.vp'),
];
publish($job);
echo $job['task_id'], "\n";
