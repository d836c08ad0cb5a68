# Publish a job: `ruby publisher.rb GENERATION_ID PROMPT ['{"seed": 7, …}']`. Prints its task id.
#
# Needs bunny (`gem install bunny`, or Debian's ruby-bunny). Reads the worker's own variables: RABBITMQ_URL, or
# RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST; RABBITMQ_QUEUE. The third argument are more fields of `data`, as
# docs/fields.md lists them.

require 'bunny'
require 'json'
require 'securerandom'
require 'time'

QUEUE = ENV.fetch('RABBITMQ_QUEUE', 'image_generation')
BROKER = ENV['RABBITMQ_URL'] || {
  host: ENV.fetch('RABBITMQ_HOST', 'localhost'),
  port: ENV.fetch('RABBITMQ_PORT', '5672').to_i,
  user: ENV.fetch('RABBITMQ_USER', 'guest'),
  pass: ENV.fetch('RABBITMQ_PASS', 'guest'),
  vhost: ENV.fetch('RABBITMQ_VHOST', '/')
}

# Return once the broker has the message on disk; raises where it has not.
def publish(job)
  connection = Bunny.new(BROKER).start
  channel = connection.create_channel
  # Durable and without arguments, as the worker declares it: RabbitMQ refuses any other declaration.
  channel.queue(QUEUE, durable: true)
  channel.confirm_select
  is_returned = false
  exchange = channel.default_exchange
  exchange.on_return { is_returned = true } # comes before the confirm
  exchange.publish(
    JSON.generate(job),
    routing_key: QUEUE,
    content_type: 'application/json',
    persistent: true,
    mandatory: true, # a message that reaches no queue comes back instead of vanishing
    message_id: job[:task_id]
  )
  raise 'the broker refused the message' unless channel.wait_for_confirms
  raise "there is no queue #{QUEUE}" if is_returned
ensure
  connection&.close
end

generation_id, prompt, more = ARGV
# A number or text: it is told back as it is published.
data = { generation_id: generation_id.match?(/\A\d+\z/) ? generation_id.to_i : generation_id, prompt: prompt }
job = {
  # Made and stored together with the generation: to publish a task again, even in doubt, does it only once.
  task_id: SecureRandom.uuid,
  type: 'image_generation',
  data: data.merge(JSON.parse(more || '{}', symbolize_names: true)),
  created_at: Time.now.utc.iso8601(3)
}
publish(job)
puts job[:task_id]
