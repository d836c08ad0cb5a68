// Publish a job: `node publisher.mjs GENERATION_ID PROMPT ['{"seed": 7, …}']`. Prints its task id.
//
// Needs amqplib. Reads the worker's own variables: RABBITMQ_URL, or RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST;
// RABBITMQ_QUEUE. The third argument are more fields of `data`, as docs/fields.md lists them.

import { randomUUID } from 'node:crypto';
import amqplib from 'amqplib';

const env = process.env;
const queue = env.RABBITMQ_QUEUE || 'image_generation';
const broker = env.RABBITMQ_URL || {
  hostname: env.RABBITMQ_HOST || 'localhost',
  port: Number(env.RABBITMQ_PORT || 5672),
  username: env.RABBITMQ_USER || 'guest',
  password: env.RABBITMQ_PASS || 'guest',
  vhost: encodeURIComponent(env.RABBITMQ_VHOST || '/'), // amqplib decodes it
};

/** Resolves once the broker has the message on disk; rejects where it has not. */
async function publish(message) {
  const connection = await amqplib.connect(broker);
  try {
    const channel = await connection.createConfirmChannel();
    // Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
    await channel.assertQueue(queue, { durable: true });
    let isReturned = false;
    channel.on('return', () => { isReturned = true; }); // comes before the confirm
    channel.sendToQueue(queue, Buffer.from(JSON.stringify(message)), {
      contentType: 'application/json',
      persistent: true,
      messageId: message.task_id,
      mandatory: true, // a message that reaches no queue comes back instead of vanishing
    });
    await channel.waitForConfirms();
    if (isReturned) throw new Error(`there is no queue ${queue}`);
  } finally {
    await connection.close();
  }
}

const [generationId, prompt, more = '{}'] = process.argv.slice(2);
const message = {
  // Made and stored together with the generation: to publish a task again, even in doubt, does it only once.
  task_id: randomUUID(),
  type: 'image_generation',
  data: { generation_id: /^[0-9]+$/.test(generationId) ? Number(generationId) : generationId, prompt, ...JSON.parse(more) },
  created_at: new Date().toISOString(),
};
await publish(message);
console.log(message.task_id);
