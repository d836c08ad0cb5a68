// Publish a job: `java -cp 'lib/*' Publisher.java GENERATION_ID PROMPT ['{"seed": 7, …}']`. Prints its task id.
//
// Needs com.rabbitmq:amqp-client and com.fasterxml.jackson.core:jackson-databind, by Maven or Debian's
// librabbitmq-client-java and libjackson2-databind-java. Reads the worker's own variables: RABBITMQ_URL, or
// RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST; RABBITMQ_QUEUE. The third argument are more fields of `data`, as
// docs/fields.md lists them.

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import com.rabbitmq.client.AMQP;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.Connection;
import com.rabbitmq.client.ConnectionFactory;
import java.io.IOException;
import java.time.Instant;
import java.util.UUID;
import java.util.concurrent.atomic.AtomicBoolean;
import javax.net.ssl.SSLContext;

public final class Publisher {
    private static final String QUEUE = env("RABBITMQ_QUEUE", "image_generation");
    private static final long CONFIRM_MILLISECONDS = 30_000;
    private static final int PERSISTENT = 2;

    private static String env(String name, String otherwise) {
        String value = System.getenv(name);
        return value == null || value.isEmpty() ? otherwise : value;
    }

    private static ConnectionFactory broker() throws Exception {
        ConnectionFactory factory = new ConnectionFactory();
        String url = env("RABBITMQ_URL", "");
        if (!url.isEmpty()) {
            factory.setUri(url);
            if (factory.isSSL()) {
                // By setUri alone any certificate is taken. From amqp-client 5.4 on enableHostnameVerification() too.
                factory.useSslProtocol(SSLContext.getDefault());
            }
            return factory;
        }
        factory.setHost(env("RABBITMQ_HOST", "localhost"));
        factory.setPort(Integer.parseInt(env("RABBITMQ_PORT", "5672")));
        factory.setUsername(env("RABBITMQ_USER", "guest"));
        factory.setPassword(env("RABBITMQ_PASS", "guest"));
        factory.setVirtualHost(env("RABBITMQ_VHOST", "/"));
        return factory;
    }

    /** Returns once the broker has the message on disk; throws where it has not. */
    private static void publish(String taskId, byte[] body) throws Exception {
        try (Connection connection = broker().newConnection()) {
            Channel channel = connection.createChannel();
            // Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
            channel.queueDeclare(QUEUE, true, false, false, null);
            channel.confirmSelect();
            AtomicBoolean isReturned = new AtomicBoolean(); // set before the confirm comes
            channel.addReturnListener((code, text, exchange, key, properties, content) -> isReturned.set(true));
            AMQP.BasicProperties properties = new AMQP.BasicProperties.Builder()
                    .contentType("application/json")
                    .deliveryMode(PERSISTENT)
                    .messageId(taskId)
                    .build();
            // The third is mandatory: a message that reaches no queue comes back instead of vanishing.
            channel.basicPublish("", QUEUE, true, properties, body);
            channel.waitForConfirmsOrDie(CONFIRM_MILLISECONDS);
            if (isReturned.get()) {
                throw new IOException("there is no queue " + QUEUE);
            }
        }
    }

    public static void main(String[] arguments) throws Exception {
        ObjectMapper mapper = new ObjectMapper();
        ObjectNode data = mapper.createObjectNode();
        // A number or text: it is told back as it is published.
        if (arguments[0].matches("[0-9]+")) {
            data.put("generation_id", Long.parseLong(arguments[0]));
        } else {
            data.put("generation_id", arguments[0]);
        }
        data.put("prompt", arguments[1]);
        if (arguments.length > 2) {
            data.setAll((ObjectNode) mapper.readTree(arguments[2]));
        }
        // Made and stored together with the generation: to publish a task again, even in doubt, does it only once.
        String taskId = UUID.randomUUID().toString();
        ObjectNode job = mapper.createObjectNode();
        job.put("task_id", taskId);
        job.put("type", "image_generation");
        job.set("data", data);
        job.put("created_at", Instant.now().toString());
        publish(taskId, mapper.writeValueAsBytes(job)); // UTF-8
        System.out.println(taskId);
    }
}
